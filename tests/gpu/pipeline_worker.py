"""One rank of a small random Llama as a pipeline over NCCL: loss and gradients under each schedule held
against one CPU process in fp64, three calls one after another.

    torchrun --nproc-per-node 2 pipeline_worker.py pp=2
"""
from __future__ import annotations

import sys
from dataclasses import replace

import torch
from llama_worker import CONFIG, DEVICE, Alone, error

from shardlib import Layout, Mesh, compile, init, lower, value_and_grad
from shardlib.distributed.runtime import connect
from shardlib.models.decoding import weights_of
from shardlib.models.llama import loss
from shardlib.params import fill, flat_leaves, leaf_values
from shardlib.run import scheduled
from shardlib.schedules.generators import gpipe, interleaved, one_f_one_b, zbv, zero_bubble


def main(mesh_text: str) -> None:
    mesh = Mesh.parse(mesh_text)
    stages, config = mesh.axes["pp"], replace(CONFIG, num_layers=5, tied=False)
    ids = torch.randint(131, (7, 9), generator=torch.Generator().manual_seed(0))
    labels, start = (ids * 7 + 3) % 131, torch.zeros(7, dtype=torch.int64)
    whole = init(weights_of(config), config.sizes)
    wide = fill(whole, "w", lambda p, v=dict(leaf_values(whole, "w")): v[p].double())
    with torch.device("cpu"):
        alone = compile(value_and_grad(loss), mesh=Mesh(), runtime=Alone, config=config)
        exact, plain = ([value, *flat_leaves(grads)] for value, grads in (
            alone(ids, labels, w, start) for w in (wide, whole)))
    with connect(mesh, DEVICE) as runtime:
        def there(x: torch.Tensor) -> torch.Tensor:
            return x if x.is_meta else x.contiguous().to(runtime.device)
        if DEVICE == "cpu":
            scheduled.by_number = lambda group: None    # as over NCCL
        for schedule in (gpipe(stages, 3), one_f_one_b(stages, 5), interleaved(stages, stages, 2),
                         zero_bubble(stages, 4),
                         zbv(stages, 4), one_f_one_b(stages, 3).cut(3, 2, *[0] * (stages - 2))):
            layout = Layout({"L": "pp", "B": ("dp", "mb") if "dp" in mesh.axes else "mb",
                             **({"K": "tp", "F": "tp", "V": "tp"} if "tp" in mesh.axes else {})})
            step = compile(value_and_grad(loss), layout, runtime=runtime, schedule=schedule,
                           sizes=dict(config.sizes, B=7, T=9), config=config)
            cut = step.shards(ids, labels, whole, start)
            shards = [fill(x, "w", lambda p, v=dict(leaf_values(x, "w")): there(v[p])) if x is cut[2]
                      else there(x) for x in cut]
            for _ in range(3):                          # a channel begins with its first message again
                value, grads = step(*shards)
            program = lower(value_and_grad(loss), layout, ids, labels, whole, start, mesh=mesh,
                            schedule=schedule, config=config)
            for found, a, b, (name, kind) in zip([value, *flat_leaves(grads)], exact, plain,
                                                 program.result_leaves(), strict=True):
                if (want := step.fold.shard(a, kind, runtime.coordinate)).is_meta:
                    continue
                allowed = 4 * max(error(b, a), 1e-7 * float(a.abs().max()), 1e-6 * (a.ndim == 0))
                assert error(found, want) <= allowed, (str(schedule), name, error(found, want), allowed)
        if runtime.rank == 0:
            print(f"equal on {mesh_text}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
