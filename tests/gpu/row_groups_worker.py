"""One rank of a small random Llama in stages that generates in groups of rows, captured and op by op: the
tokens of one process, where dtypes and sums leave no choice.

    torchrun --nproc-per-node 2 row_groups_worker.py pp=2 L=pp
"""
from __future__ import annotations

import sys

import torch
from llama_worker import CONFIG, DEVICE, Alone

from shardlib import Layout, Mesh, init
from shardlib.api import shard_of
from shardlib.distributed.runtime import connect
from shardlib.models import row_groups
from shardlib.models.decoding import Model, Sampling, used_weights, weight_types, weights_of
from shardlib.models.layouts import named_layout
from shardlib.params import fill, leaf_values
from shardlib.run import turns

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12] * 20, [13, 14], [15, 3]]
row_groups.WORTH_MOVING = row_groups.WORTH_CAPTURING = 2


def main(mesh_text: str, layout_text: str) -> None:
    mesh, whole = Mesh.parse(mesh_text), init(weights_of(CONFIG), CONFIG.sizes, dtype=torch.float32)
    layout, leaves = named_layout(layout_text, mesh), dict(leaf_values(whole, ""))
    if DEVICE == "cpu":
        turns.by_number = lambda group: None            # as over NCCL
    cases = [(PROMPTS, 24, (), Sampling()), (PROMPTS, 24, (7, 100, 30), Sampling(0.9, 0.95, 5)),
             (PROMPTS[:1], 9, (), Sampling()), (PROMPTS * 4, 24, (), Sampling())]
    with torch.device("cpu"):
        alone = Model(CONFIG, whole, Layout(), Alone, torch.float32)
        wanted = [alone.generate(p, new, ends, s, graph=False).tokens for p, new, ends, s in cases]
    with connect(mesh, DEVICE) as runtime:
        kinds, used = weight_types(CONFIG, layout, mesh), used_weights(CONFIG, layout, runtime)
        model = Model(CONFIG, fill(weights_of(CONFIG), "", lambda p: shard_of(
            leaves[p], kinds[p[1:]], mesh, runtime.coordinate).contiguous().to(
                runtime.device if p[1:] in used else "meta")), layout, runtime, torch.float32).pack()
        for (prompts, new, ends, sampling), tokens in zip(cases, wanted):
            for graph in (False, True, True):
                for groups in (None, 1, 3):
                    made = model.generate(prompts, new, ends, sampling, graph=graph, groups=groups).tokens
                    assert made == tokens, (runtime.rank, graph, groups, len(prompts), made, tokens)
        if runtime.rank == 0:
            print(f"tokens equal on {mesh_text}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
