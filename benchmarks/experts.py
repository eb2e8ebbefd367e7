"""A gated feed-forward layer of experts with few tokens on one GPU: ours beside torch's grouped matmul and a
loop of cuBLAS calls, against the rate at which the GPU reads.

    python benchmarks/experts.py             adds rows to results/experts.json
    python benchmarks/experts.py sweep       tiles for each shape: what `tiles_of` in ops/expert_ffn.py is
                                             taken from

The shapes are those of one rank of Mixtral-8x7B at tp=4, bf16: all experts by a quarter of their width, and
two experts of their whole width. Tokens choose two of eight experts at random, others in each call. From
chosen experts to the weighted sum; `grouped mm` sorts its rows by torch, as a captured step has to; the loop
sends all tokens through every expert. The floor is the bytes of the experts that are hit at the rate of a sum
of 2 GiB.
"""
from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from on_gpu import graph_us, read_bytes_per_us
from record import row, write
from torch import Tensor

from shardlib.ops.expert_ffn import tiles_of
from shardlib.ops.expert_rows import chosen_rows, combined, grouped_product
from shardlib.ops.few_rows import counts_of
from shardlib.triton_kernels.expert_ffn import expert_ffn, expert_ffn_reference
from shardlib.triton_kernels.limits import Tile
from shardlib.triton_kernels.route import route, route_reference

D, WIDTH, EXPERTS, CHOICES, CALLS = 4096, 14336, 8, 2, 6
TOKENS = (1, 8, 32, 128)
SPLITS = {"a quarter of 8 experts": (8, WIDTH // 4), "2 of 8 experts": (2, WIDTH)}
"""name -> (experts here, width here)."""
GATES = [Tile(*t) for t in ((32, 64, 4, 5), (32, 128, 4, 4), (32, 128, 2, 4), (64, 64, 4, 3), (64, 64, 4, 4),
                            (64, 64, 4, 6), (64, 32, 4, 8), (64, 128, 4, 3), (64, 128, 8, 3), (128, 32, 4, 4),
                            (128, 64, 8, 3), (128, 32, 8, 5))]
DOWNS = [Tile(*t, s) for t, s in product(((32, 128, 4, 5), (64, 64, 4, 5), (64, 64, 4, 8), (64, 128, 4, 4),
                                          (128, 64, 4, 4), (128, 64, 8, 4), (128, 32, 4, 6)), (1, 2, 4, 7))]


class Case:
    """Weights, and calls' tokens and choices."""

    def __init__(self, experts: int, width: int, tokens: int) -> None:
        g = torch.Generator("cuda").manual_seed(1)

        def normal(*shape: int) -> Tensor:
            made = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
            return made.normal_(0, shape[-2] ** -0.5, generator=g)
        self.gate, self.up = normal(experts, D, width), normal(experts, D, width)
        self.down = normal(experts, width, D)
        self.x, self.weights = normal(tokens, D), torch.rand(tokens, CHOICES, device="cuda")
        self.chosen = [torch.rand(tokens, EXPERTS, device="cuda", generator=g).topk(CHOICES).indices
                       for _ in range(CALLS)]
        if experts < EXPERTS and tokens == 1:           # one of the two is here
            self.chosen = [torch.tensor([[i % experts, EXPERTS - 1]], device="cuda") for i in range(CALLS)]
        hit = sum(int((c.unique() < experts).sum()) for c in self.chosen) / CALLS
        self.bytes = 6 * D * width * hit

    def us(self, call: Callable[..., object], replays: int = 7) -> float:
        return graph_us([lambda c=c: call(self.x, c, self.weights, self.gate, self.up, self.down)
                         for c in self.chosen], replays)


def grouped(x: Tensor, chosen: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """By torch's grouped matmul."""
    sizes = len(gate), len(x), CHOICES
    rows, at = chosen_rows(x, chosen, *sizes, 0, chosen.numel())
    h = F.silu(grouped_product(rows, at, gate, *sizes)) * grouped_product(rows, at, up, *sizes)
    return combined(grouped_product(h, at, down, *sizes), at, *sizes, x.shape, weights)


def ours(tiles: tuple[Tile, Tile] | None = None) -> Callable[..., Tensor]:
    def call(x: Tensor, chosen: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return expert_ffn(x, chosen, weights, gate, up, down, 0, tiles or tiles_of(len(x), gate.shape[2]),
                          counts_of(x.device))
    return call


def sweep() -> None:
    rate = read_bytes_per_us()
    print(f"{torch.cuda.get_device_name()} reads {rate / 1e6:.3f} TB/s", flush=True)
    for (name, sizes), tokens in product(SPLITS.items(), TOKENS):
        case, found, best = Case(*sizes, tokens), {}, list(tiles_of(tokens, sizes[1]))
        for which, tiles in enumerate((GATES, DOWNS)):
            times = {}
            for tile in tiles:
                tried = (tile, best[1]) if which == 0 else (best[0], tile)
                try:
                    times[tile] = case.us(ours(tried), 3)
                except Exception as error:              # too much shared memory, say
                    print(tile, str(error)[:60].replace("\n", " "), flush=True)
            found[which] = sorted(times, key=times.get)[:5]
            best[which] = found[which][0]
            print(f"{name} {tokens}: floor {case.bytes / rate:.1f}  "
                  + "  ".join(f"{tuple(t)[:5]} {times[t]:.1f}" for t in found[which]), flush=True)


def main() -> None:
    rate, rows = read_bytes_per_us(), []
    for tokens in TOKENS:
        logits = torch.randn(tokens, EXPERTS, device="cuda", dtype=torch.bfloat16)
        rows.append(row(f"route {tokens} tokens to 2 of 8 experts", "µs",
                        graph_us([lambda x=logits: route(x, CHOICES)] * 20),
                        {"torch": graph_us([lambda x=logits: route_reference(x, CHOICES)] * 20)}))
    for (name, sizes), tokens in product(SPLITS.items(), TOKENS):
        case = Case(*sizes, tokens)
        peers = {"grouped mm": case.us(grouped), "loop of cuBLAS": case.us(expert_ffn_reference)}
        rows.append(row(f"{name}, {tokens} token{'s' * (tokens > 1)}", "µs", case.us(ours()), peers,
                        case.bytes / rate))
    write("experts", rows, read_TB_s=round(rate / 1e6, 3))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("experts: measured on a GPU by python benchmarks/experts.py")
    elif sys.argv[1:] == ["sweep"]:
        sweep()
    else:
        main()
