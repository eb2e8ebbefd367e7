"""The proof that ranks cannot part ways: every rank's collectives are projected, and matched against each other.

A collective happens when all ranks of its group have come to it with the same op, dtype and shapes. `prove` runs that
rule to the end, on the projections alone; where it gets stuck, it says which rank waits for what. The proof holds for
any timing, since each rank's sequence is fixed by the program and not by data.
"""
from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import prod
from typing import Mapping, Sequence

from shardlib.cond import COND
from shardlib.errors import SpecError
from shardlib.mesh import Mesh
from shardlib.moves import COLLECTIVES
from shardlib.program import Program
from shardlib.project import Call, check_given, project


@dataclass(frozen=True)
class Proof:
    """What was proven: on `mesh`, all ranks end after `collectives` collectives. `digest` is equal on ranks with equal plans."""
    mesh: Mesh
    collectives: int
    digest: str

    def __str__(self) -> str:
        return f"on mesh {self.mesh}: {self.mesh.world_size} ranks, {self.collectives} collectives, all matched; plan {self.digest[:12]}"

    __repr__ = __str__


def prove(program: Program, mesh: Mesh, sizes: Mapping[str, int], dtypes: Mapping[str, str] | None = None) -> Proof:
    """Prove that all ranks issue the same collectives in the same order. SpecError where they do not.

    sizes: of every dim of the program; dtypes: of arguments by path, float32 where nothing is said.

    >>> from shardlib import Layout, einsum, lower, sharded
    >>> mesh = Mesh(dp=2, tp=4)
    >>> f = sharded("B F, F D -> B D")(lambda x, w: einsum("B F, F D -> B D", x, w))
    >>> proof = prove(lower(f, Layout(B="dp", F="tp", D="dp"), mesh=mesh), mesh, dict(B=8, D=16, F=32))
    >>> proof                                                           # doctest: +ELLIPSIS
    on mesh dp=2,tp=4: 8 ranks, 6 collectives, all matched; plan ...
    """
    sizes = check_given(program, mesh, sizes, dtypes or {})
    check_branches(program)
    return match(mesh, [project(program, mesh, rank, sizes, dtypes) for rank in range(mesh.world_size)])


def check_branches(program: Program) -> None:
    """SpecError where a branch that communicates hangs on a predicate that ranks may see differently."""
    for step in program.steps:
        for body in step.bodies:
            check_branches(body)
        if step.op is COND and step.ins[0].owed and any(_communicates(b) for b in step.bodies):
            raise SpecError(f"cond on {step.inputs[0]}, which is {step.ins[0]}: ranks that see different pieces of it part ways before "
                            f"the collectives of {step.body.name} and {step.orelse.name}")


def _communicates(program: Program) -> bool:
    return any(s.op in COLLECTIVES or any(map(_communicates, s.bodies)) for s in program.steps)


def match(mesh: Mesh, ranks: Sequence[Sequence[Call]]) -> Proof:
    """Match the ranks' sequences of calls. SpecError, naming ranks and steps, where they cannot all end."""
    for rank, calls in enumerate(ranks):
        for call in calls:
            mine = dict(zip(call.group, call.shapes)).get(rank)
            if mine is not None and call.numel != prod(mine):
                raise SpecError(f"{_say(rank, call)}; its piece has shape {mine}")
    at, done = [0] * len(ranks), 0
    fired: list[str] = []
    while any(i < len(calls) for i, calls in zip(at, ranks)):
        for rank, calls in enumerate(ranks):
            if at[rank] == len(calls):
                continue
            call = calls[at[rank]]
            heads = [ranks[m][at[m]] if at[m] < len(ranks[m]) else None for m in call.group]
            if all(h is not None and h.group == call.group for h in heads):
                wrong = next((m for m, h in zip(call.group, heads) if not call.same(h)), None)
                if wrong is not None:
                    raise SpecError(f"ranks {rank} and {wrong} meet in different collectives: {_say(rank, call)}; "
                                    f"{_say(wrong, ranks[wrong][at[wrong]])}")
                for m in call.group:
                    at[m] += 1
                done += 1
                fired.append(f"{call.op}{call.group}{call.dtype}{call.shapes}{call.root}")
                break
        else:
            raise SpecError("the ranks part ways: " + "; ".join(
                _say(r, calls[i]) if i < len(calls) else f"rank {r} has ended" for r, (i, calls) in enumerate(zip(at, ranks))))
    return Proof(mesh, done, hashlib.sha256("\n".join(fired).encode()).hexdigest())


def _say(rank: int, call: Call) -> str:
    return f"rank {rank} is in {call}{f' at {call.step}' if call.step else ''}"
