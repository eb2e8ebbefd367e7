"""Training as a pipeline on GPUs: a step of the first layers of a published Llama under each schedule, beside
the same written for torch.distributed.pipelining; and what a message takes.

    torchrun --nproc-per-node 4 benchmarks/pipeline.py
    python benchmarks/pipeline.py --draw                # results/pipeline.svg, of the rows that are there

bf16, one row of 4,096 tokens a microbatch, loss and all gradients, no optimizer. Each row of
results/pipeline.json: `ours` is the time of a step in ms, from a barrier until all ranks have their
gradients, the median; `peers` torch's schedules in the same run, with layers alike on all stages and, where
ours are cut by cost (`balance`), cut so; `predicted` what our schedule takes on a
clock (`schedules.clock`), given how long each stage was at each kind of action in a step that was measured;
`even` the same if all stages took equally long; `idle` measured, by the marks of that step; `loss` of both;
`memory` the most GB that a rank held, and what `explain` says of the fullest. Messages: µs one way, of two
ranks that send each other one in turn, ours over channels, torch's by isend and irecv of one group.
profiles/pipeline.json: when each action was, in ms.
"""
from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from plain_pipeline import PlainPipeline, draw
from record import RESULTS, row, write

from shardlib import Layout, Mesh, compile, explain, lower, value_and_grad
from shardlib.distributed.channels import Parcel
from shardlib.distributed.runtime import Runtime, connect
from shardlib.models import random_weights
from shardlib.models.decoding import weights_of
from shardlib.models.llama import LlamaConfig, loss
from shardlib.params import fill, leaf_values
from shardlib.reports.balance import balance
from shardlib.schedules import generators
from shardlib.schedules.clock import Timeline, run
from shardlib.schedules.folding import Fold, timeless
from shardlib.schedules.schedule import Action, Schedule

MAKE: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": generators.gpipe, "1f1b": generators.one_f_one_b,
    "interleaved": lambda p, m: generators.interleaved(p, m, 2), "zero_bubble": generators.zero_bubble,
    "zbv": generators.zbv}
TINY = LlamaConfig(vocab_size=300, d_model=32, num_layers=8, num_kv_heads=2, queries_per_kv=2, head_dim=8,
                   d_ff=48, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=False, max_context=64)
BYTES = tuple(8 * 1024 << i for i in range(0, 12))


class Ours:
    """A step under a schedule, on this rank, with its weights."""

    def __init__(self, c: LlamaConfig, schedule: Schedule, ids: torch.Tensor, labels: torch.Tensor,
                 runtime: Runtime, dtype: torch.dtype, balanced: bool = False) -> None:
        self.device, self.c = runtime.device, c
        sizes = dict(c.sizes, B=ids.shape[0], T=ids.shape[1])
        if balanced:
            program = lower(value_and_grad(loss), Layout(L="pp", B="mb"), None, None, weights_of(c), None,
                            mesh=runtime.mesh, schedule=schedule, config=c)
            schedule = balance(program, runtime.mesh, sizes, schedule)
        self.schedule = schedule
        self.run = compile(value_and_grad(loss), Layout(L="pp", B="mb"), runtime=runtime, schedule=schedule,
                           sizes=sizes, config=c)
        self.fold = Fold(schedule, runtime.mesh)
        like = weights_of(c)
        start = torch.zeros(ids.shape[0], dtype=torch.int64, device=self.device)
        program, _ = self.run.lower(None, None, like, None)
        kinds = dict(program.arg_leaves())
        w = fill(like, "w", lambda path: self._leaf(path, kinds[path], sizes, runtime.coordinate, dtype))
        self.args = ids, labels, w, start
        self.dtypes = {path: "int64" if path in ("ids", "labels", "start") else str(dtype).split(".")[1]
                       for path in kinds}
        self.explained = explain(program, runtime.mesh, sizes, schedule=schedule, dtypes=self.dtypes)

    def _leaf(self, path: str, kind: Any, sizes: Any, coordinate: Any, dtype: torch.dtype) -> torch.Tensor:
        fold, stages = self.fold, self.fold.stages(coordinate["pp"])
        held = next((o.at for o in kind.owed if o.kind == "@"), None)
        shape = fold.still.local_shape(timeless(kind), sizes, fold.place(coordinate, stages[0], 0))
        if held is not None and held not in stages:
            return torch.empty(shape, dtype=dtype, device="meta")
        fan = sizes["F"] if path.endswith("down") else \
            sizes["K"] * sizes["G"] * sizes["H"] if path.endswith("wo") else sizes["D"]
        if "L" not in kind.labels:
            return draw(path, None, shape, fan, dtype, self.device)
        rows = [fold.still.rows(timeless(kind).dims[0], sizes, fold.place(coordinate, s, 0)) for s in stages]
        layers = [i for first, many in rows for i in range(first, first + many)]
        out = torch.empty((len(layers), *shape[1:]), dtype=dtype, device=self.device)
        for place, layer in zip(out, layers):
            place.copy_(draw(path, layer, shape[1:], fan, dtype, self.device))
        return out

    def step(self) -> tuple[torch.Tensor, Any]:
        return self.run(*self.args)



def timed(call: Callable[[], object], steps: int, device: torch.device) -> list[float]:
    """ms from a barrier until the slowest rank is done; the first two calls are not counted."""
    times = []
    for _ in range(steps + 2):
        settle(device)
        dist.barrier()
        began = time.perf_counter()
        made = call()
        settle(device)
        mine = torch.tensor([time.perf_counter() - began])
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        times.append(mine.item() * 1e3)
        del made
    return times[2:]


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def predicted(schedule: Schedule, made: Timeline) -> tuple[float, float]:
    """ms of the schedule on a clock: with the measured median of each stage and kind, and with that of all
    stages."""
    found: dict[Any, list[float]] = defaultdict(list)
    for span in made.spans:
        found[span.action.stage, span.action.kind].append(span.end - span.start)
    median = {key: statistics.median(values) for key, values in found.items()}
    even = {kind: statistics.mean(v for (_, k), v in median.items() if k == kind) for kind in schedule.kinds}

    def length(of: Callable[[Action], float]) -> float:
        return run(schedule, duration=lambda kind: 0.0, delay=of).length * 1e3
    return length(lambda a: median[a.stage, a.kind]), length(lambda a: even[a.kind])


def forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def most(device: torch.device) -> float:
    """GB that the fullest rank has held."""
    mine = torch.tensor([torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0])
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    return round(mine.item(), 2)


def told(x: torch.Tensor | None) -> float:
    """A number that some ranks have."""
    mine = torch.tensor([0.0, 0.0] if x is None else [x.item(), 1.0])
    dist.all_reduce(mine)
    return round((mine[0] / mine[1]).item(), 5)


def case(name: str, microbatches: int, c: LlamaConfig, tokens: int, runtime: Runtime, dtype: torch.dtype,
         steps: int, peers: list[str], group: dist.ProcessGroup, balanced: bool) -> tuple[dict, dict]:
    device, ranks = runtime.device, runtime.mesh.axes["pp"]
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(c.vocab_size, (microbatches, tokens), generator=generator).to(device)
                   for _ in range(2))
    theirs, said = {}, {}
    forget(device)
    schedule = MAKE[name](ranks, microbatches)
    began = time.perf_counter()
    mine = Ours(c, schedule, ids, labels, runtime, dtype, balanced)
    schedule = mine.schedule
    times = timed(mine.step, steps, device)
    built, memory = time.perf_counter() - began, most(device)
    value, grads = mine.step()
    embed = next(g for p, g in leaf_values(grads, "") if p.endswith("embed"))
    first = 0 in mine.fold.stages(runtime.coordinate["pp"])
    made = mine.run.timeline(*mine.args)
    clock, even = predicted(schedule, made)
    grads = norm(embed) if first else None
    mine.args = mine.run = embed = None
    for peer, layers in ((peer, layers) for peer in peers for layers in dict.fromkeys(((), schedule.layers))):
        forget(device)
        plain = PlainPipeline(c, peer, microbatches, ids, labels, dtype, device, group, layers)
        title = f"{peer}{', the same cut' if layers else ''}"
        theirs[f"torch {title}"] = statistics.median(timed(plain.step, steps, device))
        said[title] = told(plain.step()), told(norm(plain.gradient("embed"))), most(device)
        del plain
    fullest = max(p.arguments + p.kept + p.sums for p in mine.explained.ranks)
    cut = f", {' + '.join(map(str, schedule.layers))} layers" if schedule.layers else ""
    done = row(f"{ranks} stages, {name}, {microbatches} microbatches{cut}", "ms", statistics.median(times),
               theirs)
    done |= {"predicted": round(clock, 2), "even": round(even, 2), "measured_idle": round(made.idle, 4),
             "predicted_idle": round(mine.explained.idle, 4), "marked": round(made.length * 1e3, 2),
             "tokens_per_s": round(microbatches * tokens / statistics.median(times) * 1e3),
             "loss": told(value), "embed_gradient": told(grads),
             "theirs": {peer: dict(zip(("loss", "embed_gradient", "memory_gb"), of))
                        for peer, of in said.items()},
             "memory_gb": memory, "explained_gb": round(fullest / 1e9, 2), "build_s": round(built, 1)}
    spans = [[s.rank, str(s.action), round(s.start * 1e3, 3), round(s.end * 1e3, 3)] for s in made.spans]
    return done, {done["case"]: spans}


def norm(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.float().norm()


# -- messages ------------------------------------------------------------------------------------------------

def messages(runtime: Runtime, sizes: tuple[int, ...], turns: int, backend: str) -> list[dict]:
    """Ranks 0 and 1 send each other one in turn; over channels, and by torch over one group of two."""
    rank, device, found = runtime.rank, runtime.device, []
    group, pair = dist.new_group([0, 1], backend=backend), dist.new_group([0, 1], backend="gloo")
    for nbytes in sizes:
        n = nbytes // 2
        parcels = {(a, b): [Parcel(2 * i + a, (n,), torch.bfloat16) for i in range(turns)]
                   for a, b in ((0, 1), (1, 0))}
        ends = {edge: edge for edge in parcels}
        mail = runtime.open_channels(("pp",), ends, parcels if rank < 2 else {})
        if rank > 1:
            continue
        x = torch.zeros(n, dtype=torch.bfloat16, device=device)

        def ours(mail=mail, x=x, n=n) -> None:
            for i in range(turns):
                if rank == 0:
                    mail.post(x, 1, 2 * i)
                    x = mail.take((n,), torch.bfloat16, 1, 2 * i + 1)
                else:
                    x = mail.take((n,), torch.bfloat16, 0, 2 * i)
                    mail.post(x, 0, 2 * i + 1)
            mail.wait()

        def theirs(x=x) -> None:
            for i in range(2 * turns):
                way = dist.isend if i % 2 == rank else dist.irecv
                for work in dist.batch_isend_irecv([dist.P2POp(way, x, 1 - rank, group)]):
                    work.wait()
        us = {}
        for name, call in (("ours", ours), ("torch", theirs)):
            took = []
            for _ in range(6):
                settle(device)
                dist.barrier(pair)
                began = time.perf_counter()
                call()
                settle(device)
                took.append((time.perf_counter() - began) * 1e6 / (2 * turns))
            us[name] = statistics.median(took[2:])
        found.append(row(f"message of {nbytes // 1024} KB", "µs", us["ours"], {"torch": us["torch"]},
                         nbytes / 450e3) | {"gb_per_s": round(nbytes / us["ours"] / 1e3, 2)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama3-8b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--microbatches", default="8,16")
    parser.add_argument("--schedules", default="1f1b,interleaved,zero_bubble,zbv")
    parser.add_argument("--peers", default="1f1b,interleaved")
    parser.add_argument("--cuts", default="even,balanced", help="layers alike, or by `balance`")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--out", default="pipeline")
    parser.add_argument("--draw", action="store_true")
    said = parser.parse_args()
    if said.draw:
        return picture(RESULTS / f"{said.out}.json")
    cuda = torch.cuda.is_available()
    mesh = Mesh(pp=int(os.environ["WORLD_SIZE"]))
    c = TINY if said.shape == "tiny" else replace(random_weights.shape_of(said.shape),
                                                  num_layers=said.layers)
    dtype = torch.bfloat16 if cuda else torch.float32
    rows, marks = [], {}
    with connect(mesh, "cuda" if cuda else "cpu") as runtime:
        runtime.create_groups([("pp",)])
        backend = "nccl" if cuda else "gloo"
        group = dist.new_group(backend=backend)
        rows += messages(runtime, BYTES if cuda else BYTES[:2], said.turns, backend)
        for name in said.schedules.split(","):
            for many, cuts in product(said.microbatches.split(","), said.cuts.split(",")):
                microbatches, last = int(many), cuts == said.cuts.split(",")[-1]
                peers = [p for p in said.peers.split(",") if p == name and last]
                done, when = case(name, microbatches, c, said.tokens, runtime, dtype, said.steps, peers,
                                  group, cuts == "balanced")
                rows.append(done)
                marks |= when
                if runtime.rank == 0:
                    print(json.dumps(done), flush=True)
                    write(said.out, rows)
                    profiles = Path(__file__).parent / "profiles"
                    profiles.mkdir(exist_ok=True)
                    (profiles / f"{said.out}.json").write_text(json.dumps(marks) + "\n")


def picture(file: Path) -> None:
    """Step times as bars: ours, what the clock says, torch's."""
    import matplotlib.pyplot as plt
    rows = [r for r in json.loads(file.read_text())["rows"] if r["unit"] == "ms"]
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(rows) + 1.2))
    for i, r in enumerate(rows):
        theirs = next(iter(r["peers"].values()), None)
        axes.barh(i - 0.2, r["ours"], 0.38, color="#3f7fbf", label="shardlib" if i == 0 else None)
        axes.plot([r["predicted"]] * 2, [i - 0.4, i], color="black", label="by the clock" if not i else None)
        if theirs:
            axes.barh(i + 0.2, theirs, 0.38, color="#c9c9c9",
                      label="torch.distributed.pipelining" if i == 0 else None)
    axes.set_yticks(range(len(rows)), [r["case"] for r in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms a step")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
