"""What a program's collectives ask of communicators: the generated code, through a GroupCoordinator, asks the
same on every rank; explain says it.

Communicators are chosen by it, so ranks that ask otherwise would wait for each other.
"""
from __future__ import annotations

import itertools
from math import prod

import pytest
import torch
from asking import Asked

from shardlib.distributed import GroupCoordinator
from shardlib.distributed.communicators.alone import Alone
from shardlib.distributed.communicators.protocol import Call
from shardlib.errors import SpecError
from shardlib.language.moves import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    COLLECTIVES,
    PERMUTE,
    REDUCE_SCATTER,
    axes_of,
    check_move,
    placed,
)
from shardlib.lowering.emit import Emitter
from shardlib.lowering.load import load
from shardlib.mesh import Mesh
from shardlib.oracle import types
from shardlib.program import Op, Program, Result, Step
from shardlib.reports.explain import _call
from shardlib.spec import parse

MESH = Mesh(x=2, y=3)
TWO = types(parse("T D"), ("x", "y"), ("+", "max"))


def asked(step: Step, sizes: dict[str, int], rank: int) -> Call:
    """What the code of `rank` asks for the step."""
    emitter, noted = Emitter(MESH, rank, sizes), Asked()
    source = emitter.program(
        Program("f", (("v", step.ins[0]),), (step,), (Result(step.outs[0], ("w",)),), True))
    groups = {name: GroupCoordinator("/".join(axes), MESH.group(axes, rank), rank, 0, torch.device("cpu"),
                                     (noted,), Alone())
              for axes, name in emitter.groups.items()}
    x = torch.zeros(MESH.local_shape(step.ins[0], sizes, MESH.coordinate(rank)), dtype=torch.bfloat16)
    with pytest.raises(SpecError, match=": noted$"):
        load(source, {**emitter.helpers, **emitter.constants, **emitter.plan}, groups, "f")(x)
    (call,) = noted.calls
    return call


def expected(step: Step, sizes: dict[str, int], rank: int) -> Call:
    """The same, worked out from what each member of the group holds and gets."""
    members = [MESH.coordinate(r) for r in MESH.group(axes_of(step, MESH), rank)]
    held, got = ([prod(MESH.local_shape(spec, sizes, c)) for c in members]
                 for spec in (step.ins[0], step.outs[0]))
    kind = next((o.kind for o in step.ins[0].owed if o not in step.outs[0].owed), None)
    op = {"+": "sum", "max": "max"}.get(kind)
    if step.op in (ALL_TO_ALL, PERMUTE):
        return Call("all_to_all", None, torch.bfloat16, "cpu", -1, False)
    whole = {ALL_REDUCE: held[0], REDUCE_SCATTER: held[0], ALL_GATHER: got[0]}[step.op]
    even = len(set(got if step.op is REDUCE_SCATTER else held)) == 1
    return Call(step.op.name, op, torch.bfloat16, "cpu", 2 * whole, even)


@pytest.mark.parametrize("op", COLLECTIVES, ids=lambda op: op.name)
def test_all_ranks_ask_the_same_and_explain_says_it(op: Op) -> None:
    seen = set()
    for have, want, (rows, columns) in itertools.product(TWO, TWO, ((5, 4), (12, 6))):
        if check_move(op, have, want) is not None:
            continue
        step, sizes = Step(op, (have,), (want,), ("v",), ("w",)), dict(T=rows, D=columns)
        for group in {MESH.group(axes_of(step, MESH), rank) for rank in range(MESH.world_size)}:
            calls = [asked(step, sizes, rank) for rank in group]
            assert calls == calls[:1] * len(calls), f"{step.text} of {sizes}: {calls}"
            # what is even, the test of exchanges holds
            if not (op in (ALL_TO_ALL, PERMUTE) and calls[0].even):
                assert calls[0] == expected(step, sizes, group[0]), f"{step.text} of {sizes}"
            if 0 in group:
                assert calls[0] == _call(placed(step, MESH, sizes, MESH.coordinate(0)),
                                         "bfloat16"), f"{step.text} of {sizes}"
            seen.add(calls[0].even)
    assert seen == {ALL_REDUCE: {True}, PERMUTE: {False}}.get(op, {True, False})
