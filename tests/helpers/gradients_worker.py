"""One rank of test_gradients: the loss and its gradients under several layouts and schedules, written to a
file per rank.

    torchrun --nproc-per-node 2 gradients_worker.py FOLDER
"""
from __future__ import annotations

import sys
from pathlib import Path

import torch

from shardlib import Layout, Mesh, compile
from shardlib.api import shard_of, value_and_grad
from shardlib.compiler.stages import needed
from shardlib.distributed.runtime import connect
from shardlib.models.llama import loss
from shardlib.params import fill, leaf_values
from shardlib.run import scheduled
from shardlib.schedules.schedule import Schedule

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    job = torch.load(folder / "job.pt", weights_only=False)
    mesh, made = Mesh.parse(job["mesh"]), {}
    with connect(mesh, "cpu") as runtime:
        for text in job["layouts"]:
            step = compile(value_and_grad(loss), Layout.parse(text), runtime=runtime, sizes=job["sizes"],
                           config=job["config"])
            program = step.lower(None, None, job["args"]["w"])
            types, used = dict(program.arg_leaves()), needed(program, runtime.coordinate)
            here = {path: shard_of(t if path in used else t.to("meta"), types[path], mesh, runtime.coordinate)
                    for name, arg in job["args"].items()
                    for path, t in (leaf_values(arg, name) if name == "w" else [(name, arg)])}
            value, grads = step(*(fill(arg, name, here.__getitem__) if name == "w" else here[name]
                                  for name, arg in job["args"].items()))
            made[text] = [value, *(g for _, g in leaf_values(grads, ""))]
    stages = Mesh(pp=mesh.world_size)
    with connect(stages, "cpu") as runtime:
        for text in job["schedules"]:
            if text == job["schedules"][-1]:            # as over NCCL, which knows no numbers
                scheduled.by_number = lambda group: None
            schedule = Schedule.parse(text)
            step = compile(value_and_grad(loss), Layout(L="pp", B="mb"), runtime=runtime, schedule=schedule,
                           sizes=job["sizes"], config=job["config"])
            shards = step.shards(*job["args"].values())
            for _ in range(2):                          # a number is a message's again in the next call
                value, grads = step(*shards)
            made[text] = [value, *(g for _, g in leaf_values(grads, ""))]
    torch.save(made, folder / f"rank{runtime.rank}.pt")
