"""The builder: adds typed steps to a program that is being made,
converting values where they are needed otherwise.

Completion and the backward transform both write programs with it. Everything it adds is explicit: results
have the type that the op's rule gives.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardlib.compiler.planner import plan
from shardlib.dtypes import FLOATS
from shardlib.language.arithmetic import DIV, SCALE
from shardlib.language.casts import CAST, CAST_LIKE
from shardlib.language.einsum import EINSUM
from shardlib.language.held import held
from shardlib.language.reductions import SPREAD
from shardlib.language.trace import RESERVED, fresh
from shardlib.mesh import Mesh
from shardlib.program import Op, Program, Step
from shardlib.rules import natural
from shardlib.source import Where
from shardlib.spec import Spec


class Builder:
    """Steps under construction, and the type of every value so far."""

    def __init__(self, mesh: Mesh, taken: set[str] | None = None) -> None:
        self.mesh = mesh
        self.taken = {*RESERVED, *(taken or ())}
        self.types: dict[str, Spec] = {}
        self.dtypes: dict[str, str | None] = {}     # as far as they are known, where that is of use
        self.steps: list[Step] = []
        self.source: dict[str, str] = {}  # converted value -> the value it was converted from, at the root
        self._converted: dict[tuple[str, Spec], str] = {}
        self.where: Where | None = None
        self.called: dict[str, str] = {}            # value -> the user's variable that holds it

    def declare(self, name: str, kind: Spec) -> str:
        """An argument."""
        self.types[name] = kind
        self.taken.add(name)
        return name

    def add(self, op: Op, inputs: Sequence[str], outs: Sequence[Spec], names: Sequence[str] | None = None, *,
            attrs: tuple = (), body: Program | None = None, orelse: Program | None = None, why: str = "",
            base: str = "") -> tuple[str, ...]:
        """A step whose result types are known."""
        outputs = tuple(names or (fresh(base, self.taken) for _ in outs))
        said = tuple(self.called.get(self.source.get(i, i), "") for i in inputs) if op.index else ()
        self.steps.append(Step(op, tuple(self.types[i] for i in inputs), tuple(outs), tuple(inputs), outputs,
                               attrs, body, orelse, self.where, why, said=said))
        self.types.update(zip(outputs, outs))
        return outputs

    def call(self, op: Op, inputs: Sequence[str], outs: Sequence[Spec] | None = None, base: str = "",
             **attrs: Any) -> Any:
        """A step typed by its rule; `outs` are the results' dims, for an op with a spec string.

        One name, or several.
        """
        ins = tuple(self.types[i] for i in inputs)
        dims = tuple(outs) if outs is not None else op.infer(ins, attrs)
        step = Step(op, ins, dims, tuple(inputs), (), tuple(sorted(attrs.items())))
        kinds = natural(op.name, op.rule(step), ins, dims, inputs)
        made = self.add(op, inputs, kinds, attrs=step.attrs, base=base)
        return made if len(made) > 1 else made[0]

    def move(self, name: str, want: Spec, why: str = "") -> str:
        """`name` converted to type `want`; the same conversion is made once."""
        root = self.source.get(name, name)
        if self.types[name] == want:
            return name
        if self.types[root] == want:
            return root
        if (root, want) in self._converted:
            return self._converted[root, want]
        here = name
        for move in plan(self.types[name], want, self.mesh):
            done = self._converted.get((root, move.want))
            if done is None:
                (done,) = self.add(move.op, [here], [move.want], why=why,
                                   base=name.rstrip("0123456789").replace(".", "_"))
                self.source[done] = root
                self._converted[root, move.want] = done
            here = done
        return here

    def settle(self, name: str) -> str:
        """`name` with what it owes paid, on every rank."""
        kind = self.types[name]
        return self.move(name, held(kind), "joins the pieces of a split dim")

    # -- what derivatives are written with -------------------------------------------------------------------

    def einsum_to(self, spec: Spec, names: Sequence[str]) -> str:
        """The product of `names`, summed or repeated to the dims of `spec`."""
        known = [d for d in spec.dims if any(d.label in self.types[n].labels for n in names)]
        if len(names) == 1 and self.types[names[0]].labels == tuple(d.label for d in known):
            made = names[0]
        else:
            made = self.call(EINSUM, names, outs=(Spec(tuple(known)),))
        return made if len(known) == len(spec.dims) else self.spread(made, spec)

    def spread(self, name: str, like: Spec, mean: bool = False) -> str:
        """`name` repeated along the dims of `like` that it lacks; with `mean`, over their sizes."""
        return self.call(SPREAD, [name], outs=(like.owing(),), **({"mean": True} if mean else {}))

    def scale(self, name: str, by: float) -> str:
        return self.call(SCALE, [name], by=by)

    def like(self, name: str, value: str) -> str:
        """`name` in the dtype of `value`; where both are known it need not be asked for it."""
        have, want = self.dtypes.get(name), self.dtypes.get(value)
        if have is None or want not in FLOATS:
            return self.call(CAST_LIKE, [name, value])
        return name if have == want else self.call(CAST, [name], dtype=want)

    def quotient(self, a: str, b: str) -> str:
        return self.call(DIV, [a, b])
