"""The simulator: all ranks of a mesh in one process, on the code that each rank would run.

Every rank's generated function is a generator that yields its collectives. A round runs each rank to its next
one; a collective happens when all ranks of its group ask for the same. Ranks that part ways are an error that
says how.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardlib.compiler.microbatches import cut
from shardlib.compiler.sizes import complete_sizes
from shardlib.errors import SpecError
from shardlib.lowering.emit import Emitter
from shardlib.lowering.load import load
from shardlib.mesh import Mesh
from shardlib.program import Program
from shardlib.run.failures import explain_failure
from shardlib.run.rank_program import RankProgram
from shardlib.run.surroundings import without_autocast
from shardlib.schedules.folding import Fold
from shardlib.wires import WIRES, Wire


def simulate(program: Program, mesh: Mesh, args: Sequence[Mapping[str, Tensor]], sizes: Mapping[str, int],
             log: list | None = None) -> list[dict[str, Tensor]]:
    """Run an explicit program on every rank. `args`: each rank's shards by path. `sizes`: those that no other
    follows from.

    Each rank's result leaves, by position name.

    `log` receives (rank, group ranks, method, numel) of every collective.
    """
    ranks, lines, wires, sizes = [], {}, {}, complete_sizes(program, sizes)
    given = {path: str(t.dtype).removeprefix("torch.") for path, t in args[0].items()}
    device = next((t.device for t in args[0].values()), torch.device("cpu"))
    for rank in range(mesh.world_size):
        e = Emitter(mesh, rank, sizes, yields=True, given=given)
        source = e.program(program)
        wires |= e.wires
        groups = {name: mesh.group(axes, rank) for axes, name in e.groups.items()}
        main = load(source, e.space(device), groups, f"{program.name} rank {rank}")
        lines[main.__code__.co_filename] = e.lines
        ranks.append(main(*(args[rank][path] for path, _ in program.arg_leaves())))
    try:
        with without_autocast():
            outs = run_ranks(ranks, log, wires)
    except Exception as error:
        explain_failure(error, lines)
        raise
    return [{f"{i}": v for i, v in enumerate(out)} for out in outs]


def simulate_schedule(program: Program, fold: Fold, args: Sequence[Mapping[str, Tensor]],
                      sizes: Mapping[str, int], log: list | None = None,
                      most: list | None = None) -> list[dict[str, Tensor]]:
    """The same of a program under a schedule, on every rank of its mesh.

    `most` receives of each rank the bytes that it kept for backward at once.
    """
    given = {path: str(t.dtype).removeprefix("torch.") for path, t in args[0].items()}
    device = next((t.device for t in args[0].values()), torch.device("cpu"))
    parts, sizes = cut(program, fold.whole, given, fold.schedule.kinds), complete_sizes(program, sizes)
    ranks = [RankProgram(fold, parts, sizes, fold.mesh.coordinate(r),
                         lambda axes, r=r: fold.mesh.group(axes, r), device)
             for r in range(fold.mesh.world_size)]
    mail: dict = {}
    try:
        with without_autocast():
            outs = run_ranks([rank.run(args[r]) for r, rank in enumerate(ranks)], log,
                             WIRES | {k: w for rank in ranks for k, w in rank.wires.items()}, mail)
    except Exception as error:
        explain_failure(error, {name: lines for rank in ranks for name, lines in rank.lines.items()})
        raise
    if mail:
        raise SpecError(f"schedule: nobody takes {next(iter(mail))}")
    if most is not None:
        most += [rank.most for rank in ranks]
    return [{f"{i}": v for i, v in enumerate(out)} for out in outs]


def run_ranks(ranks: Sequence[Any], log: list | None = None, wires: Mapping[str, Wire] = WIRES,
              mail: dict | None = None) -> list[tuple]:
    """Drive the ranks' generators to their ends, performing the collectives they ask for over `wires`.

    mail: messages that were posted and not taken yet.
    """
    waiting: dict[int, tuple] = {}
    done: dict[int, tuple] = {}
    mail = mail if mail is not None else {}

    def advance(rank: int, value: Any) -> None:
        try:
            while (asked := ranks[rank].send(value))[0] == "post":
                mail[asked[1]], value = asked[2].clone(), None
            waiting[rank] = _between_two(asked) if asked[1] == "send" else asked
        except StopIteration as stop:
            done[rank] = stop.value
    for rank in range(len(ranks)):
        advance(rank, None)
    while waiting:
        taker = next((r for r, asked in waiting.items() if asked[0] == "take" and asked[1] in mail), None)
        if taker is not None:
            _, message, room = waiting.pop(taker)
            if log is not None:
                log.append((message, "send", room.numel()))
            advance(taker, wires["send"].perform([mail.pop(message), room], [(), ()])[1])
            continue
        ready = next((g for g in dict.fromkeys(r[0] for r in waiting.values() if r[0] != "take")
                      if all(m in waiting and waiting[m][0] == g for m in g)), None)
        if ready is None:
            raise SpecError("the ranks part ways: " + "; ".join(
                f"rank {r} has ended" if r not in waiting else f"rank {r} waits for {waiting[r][1]}"
                if waiting[r][0] == "take" else
                f"rank {r} waits in {waiting[r][1]} of ranks {list(waiting[r][0])}"
                for r in range(len(ranks))))
        requests = [waiting.pop(m) for m in ready]
        if log is not None:
            log.append((ready, requests[0][1], max(_numel(r[2]) for r in requests)))
        for member, value in zip(ready, perform(requests, wires)):
            advance(member, value)
    return [done[r] for r in range(len(ranks))]


def _between_two(asked: tuple) -> tuple:
    """A send, which names its group and two of its members, as what these two do together."""
    group, method, x, source, target = asked
    return (group[source], group[target]), method, x


def _numel(x: Any) -> int:
    return sum(t.numel() for t in x) if isinstance(x, tuple) else x.numel()


def perform(requests: Sequence[tuple], wires: Mapping[str, Wire] = WIRES) -> list[Any]:
    """What each member of one collective gets; `requests`: theirs, (group, method, operand, *more).

    SpecError where these do not fit.
    """
    method = requests[0][1]
    if any(r[1] != method for r in requests):
        raise SpecError(
            f"the ranks part ways: {', '.join(sorted({r[1] for r in requests}))} in one group at once")
    wire, xs, more = wires[method], [r[2] for r in requests], [r[3:] for r in requests]
    told = [said[wire.own:] for said in more]
    if any(t != told[0] for t in told):
        raise SpecError(
            f"{method}: the ranks say {' and '.join(map(str, dict.fromkeys(told)))} of one collective")
    if len(dtypes := dict.fromkeys(p.dtype for x in xs for p in (x if wire.many else (x,)))) > 1:
        raise SpecError(
            f"{method}: the ranks bring {' and '.join(str(d).removeprefix('torch.') for d in dtypes)}")
    return wire.perform(xs, more)
