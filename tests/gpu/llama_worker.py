"""One rank of a small random Llama on NCCL: tokens, logits,
loss and gradients held against one CPU process in fp64."""
from __future__ import annotations

import sys

import torch

from shardlib import Layout, Mesh, compile, init, value_and_grad
from shardlib.api import arg_types, shard_of
from shardlib.distributed.runtime import connect
from shardlib.models.decoding import Model, weights_of
from shardlib.models.layouts import named_layout
from shardlib.models.llama import LlamaConfig, logits_of, loss
from shardlib.ops.nvlink import nvlink
from shardlib.params import fill, leaf_values

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"      # cpu: a rehearsal
CONFIG = LlamaConfig(vocab_size=131, d_model=48, num_layers=3, num_kv_heads=3, queries_per_kv=2, head_dim=8,
                     d_ff=67, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=True, max_context=64)


def error(a: torch.Tensor, exact: torch.Tensor) -> float:
    return float((a.double().cpu() - exact).abs().max()) if exact.numel() else 0.0


def main(mesh_text: str, layout_text: str) -> None:
    mesh = Mesh.parse(mesh_text)
    layout = named_layout(layout_text, mesh)
    ids, labels, start = (torch.randint(131, (4, 9), generator=torch.Generator().manual_seed(0)),
                          torch.randint(131, (4, 9)), torch.zeros(4, dtype=torch.int64))
    labels = (ids * 7 + 3) % 131
    whole = init(weights_of(CONFIG), CONFIG.sizes)
    wide = fill(whole, "w", lambda p, v=dict(leaf_values(whole, "w")): v[p].double())
    with torch.device("cpu"):
        exact = compile(logits_of, mesh=Mesh(), runtime=Alone, config=CONFIG)(ids, wide, start)
        plain = compile(logits_of, mesh=Mesh(), runtime=Alone, config=CONFIG)(ids, whole, start)
        exact_loss, exact_grads = compile(value_and_grad(loss), mesh=Mesh(), runtime=Alone,
                                          config=CONFIG)(ids, labels, wide, start)
        plain_loss, plain_grads = compile(value_and_grad(loss), mesh=Mesh(), runtime=Alone,
                                          config=CONFIG)(ids, labels, whole, start)
    with connect(mesh, DEVICE, communicators=(nvlink,)) as runtime:
        step = compile(value_and_grad(loss), layout, runtime=runtime, sizes=dict(CONFIG.sizes, B=4, T=9),
                       config=CONFIG)
        program = step.lower(None, None, whole, None)
        kinds, args = arg_types(program, "w"), dict(program.args)
        mine = fill(whole, "w", lambda p, v=dict(leaf_values(whole, "w")): shard_of(
            v[p], kinds[p], mesh, runtime.coordinate).contiguous().to(runtime.device))

        def local(name: str, x: torch.Tensor) -> torch.Tensor:
            return shard_of(x, args[name], mesh, runtime.coordinate).contiguous().to(runtime.device)
        value, grads = step(local("ids", ids), local("labels", labels), mine, local("start", start))
        bound = 2 * max(error(plain_loss, exact_loss), 1e-6)
        assert error(value, exact_loss) <= bound, (float(value), float(exact_loss))
        exact_leaves, plain_leaves = dict(leaf_values(exact_grads, "w")), dict(leaf_values(plain_grads, "w"))
        for path, g in leaf_values(grads, "w"):
            want = shard_of(exact_leaves[path], kinds[path], mesh, runtime.coordinate)
            allowed = 4 * max(error(plain_leaves[path], exact_leaves[path]),
                              1e-7 * float(exact_leaves[path].abs().max()))
            assert error(g, want) <= allowed, (path, error(g, want), allowed)
        forward = compile(logits_of, layout, runtime=runtime, sizes=dict(CONFIG.sizes, B=4, T=9),
                          config=CONFIG)
        logits = forward(local("ids", ids), mine, local("start", start))
        kind = forward.program.result_leaves()[0][1]
        want = shard_of(exact, kind, mesh, runtime.coordinate)
        assert error(logits, want) <= 4 * error(plain, exact), (error(logits, want), error(plain, exact))
        model = Model(CONFIG, mine, layout, runtime, torch.float32)
        tokens = model.generate([[1, 2, 3], [4], [5, 6]], 12).tokens
        alone = Model(CONFIG, whole, Layout(), Alone,
                      torch.float32).generate([[1, 2, 3], [4], [5, 6]], 12).tokens
        assert tokens == alone, (tokens, alone)
        if runtime.rank == 0:
            print(f"equal on {mesh_text} {layout_text}", flush=True)


class Alone:
    """One CPU process without groups, beside the runtime of the GPUs."""
    mesh, rank, coordinate, device = Mesh(), 0, {}, torch.device("cpu")

    @staticmethod
    def create_groups(products) -> None:
        assert not products

    @staticmethod
    def compare_plans(name, text) -> None:
        """There is nobody to compare with."""


if __name__ == "__main__":
    main(*sys.argv[1:])
