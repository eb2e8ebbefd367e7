"""Trace and lower a Llama: seconds, for 2 and for 64 layers."""
from __future__ import annotations

from dataclasses import replace

from record import medians, paired, row, write

from shardlib import Layout, Mesh, lower
from shardlib.lowering.emit import Emitter
from shardlib.models.decoding import weights_of
from shardlib.models.llama import LlamaConfig, next_token

CONFIG = LlamaConfig(vocab_size=128256, d_model=4096, num_layers=2, num_kv_heads=8, queries_per_kv=4,
                     head_dim=128, d_ff=14336, norm_eps=1e-5, rope_theta=500000.0, rope_scaling=None,
                     tied=False, max_context=8192)
MESH, LAYOUT = Mesh(dp=2, tp=4), Layout(B="dp", K="tp", F="tp", V="tp", T="tp", D="dp")


def trace_and_lower(layers: int) -> str:
    """From the Python function to the source that rank 0 runs."""
    config = replace(CONFIG, num_layers=layers)
    program = lower(next_token, LAYOUT, None, weights_of(config), mesh=MESH, config=config)
    return Emitter(MESH, 0, dict(config.sizes, B=8, T=1, S=1024)).program(program)


def main() -> None:
    times = medians(
        paired({"2 layers": lambda: trace_and_lower(2), "64 layers": lambda: trace_and_lower(64)}, 31))
    write("tracing", [row("trace + lower a Llama of 64 layers, DP x TP + SP + FSDP", "s", times["64 layers"],
                          {"2 layers": times["2 layers"]}),
                      row("the same against its bound", "s", times["64 layers"], {"bound": 0.1})])


if __name__ == "__main__":
    main()
