"""What stands at the ends of a step, and rope at the beginning of prompts, on one GPU: by kernels, with the
bits of torch; angles as near as torch's. Exit status 1 where anything is wrong.

    python tests/gpu/ends_worker.py CASES [SEED]
"""
from __future__ import annotations

import random
import sys

import torch
from torch import Tensor

from shardlib.ops.few_rows import choose_few, counts_of
from shardlib.triton_kernels.follow import follow, follow_reference
from shardlib.triton_kernels.lookup import lookup, lookup_reference, note, note_reference
from shardlib.triton_kernels.rope_angles import rope_angles, rope_angles_reference
from shardlib.triton_kernels.rope_into_cache import rope_into_cache, rope_into_cache_reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Ends:
    def __init__(self, seed: int) -> None:
        self.random, self.wrong = random.Random(seed), []
        torch.manual_seed(seed)

    def equal(self, what: str, got: Tensor, want: Tensor) -> None:
        if got.shape != want.shape or not torch.equal(got, want):
            self.wrong.append(what)

    def lookups(self, dtype: torch.dtype) -> None:
        rows, size, width = (self.random.choice((1, 3, 500)), self.random.choice((1, 7, 3000)),
                             self.random.choice((1, 100, 4096, 8192)))
        x = torch.randn(1 if self.random.random() < 0.7 else rows, size, width, device="cuda").to(dtype)
        if x.numel() > 1 << 26:
            x = x[:1].contiguous()
        index = torch.randint(-2, size + 9, (rows,), device="cuda")
        seen = torch.tensor([-1, 5], device="cuda")
        noted = seen.clone()
        title = f"lookup {rows} {tuple(x.shape)} {dtype}"
        self.equal(title, lookup(x, index, 4, noted), lookup_reference(x, index, 4))
        self.equal(f"{title}: note", noted, note_reference(index, seen))
        note(index, seen)
        self.equal(f"{title}: note alone", seen, noted)

    def angles(self) -> None:
        half = self.random.choice((4, 20, 32, 64))
        start = torch.randint(0, 120000, (self.random.randint(1, 9),), device="cuda")
        inv = 5e5 ** -(torch.arange(half, device="cuda") / half)
        got = rope_angles(start, 3, 5, inv)
        ours = rope_angles_reference(start, 3, 5, inv)
        position = start[:, None] + torch.arange(3, 8, device="cuda")
        angle = (position[..., None].float() * inv).double()
        exact = torch.cat((angle.cos(), angle.sin()), -1)
        if (got - exact).abs().max() > 2 * (ours - exact).abs().max():
            self.wrong.append(f"angles {half}")

    def choice(self, dtype: torch.dtype) -> None:
        rows, columns = self.random.choice((1, 2, 31, 200)), self.random.choice((1, 999, 32064, 128256))
        x = torch.randint(-9, 9, (rows, columns), device="cuda").to(dtype)
        self.equal(f"choice {rows} {columns} {dtype}", choose_few(x, counts_of(x.device)), x.argmax(-1))

    def fed_next(self) -> None:
        rows, ends = self.random.choice((1, 5, 128, 300)), self.random.choice((0, 3, 16))
        chosen, ids, position = (torch.randint(0, 6, (rows,), device="cuda") for _ in range(3))
        live, over = torch.rand(rows, device="cuda") < 0.5, torch.randint(-1, 6, (ends,), device="cuda")
        want = chosen, *follow_reference(chosen, ids, position, live, over)
        state = torch.zeros_like(chosen), ids, position, live
        follow(chosen, *state, over)
        for got, expected in zip(state, want):
            self.equal(f"follow {rows} {ends}", got, expected)

    def rope(self, dtype: torch.dtype) -> None:
        rows, new, heads, group, h = (self.random.randint(1, 3), self.random.choice((1, 7, 200)),
                                      self.random.randint(1, 8), self.random.choice((1, 3, 4, 8)),
                                      self.random.choice((8, 64, 80, 128)))
        slots = new + self.random.randint(0, 50)
        both = torch.randn(rows, new, heads * (group + 2) * h, device="cuda").to(dtype)
        q, k, v = both.split([heads * group * h, heads * h, heads * h], -1)
        q, k, v = q.unflatten(-1, (heads, group, h)), k.unflatten(-1, (heads, h)), v.unflatten(-1, (heads, h))
        start = torch.randint(0, slots - new + 1, (rows,), device="cuda")
        angles = rope_angles_reference(start, 0, new, torch.rand(h // 2, device="cuda"))
        keys, values = torch.randn(2, rows, slots, heads, h, device="cuda").to(dtype).unbind(0)
        want = rope_into_cache_reference(q, k, v, angles, keys, values, start)
        got = *rope_into_cache(q, k, v, angles, keys, values, start), keys, values
        for name, one, other in zip(("q", "k", "keys", "values"), got, want):
            self.equal(f"rope {name} {rows} {new} {heads} {group} {h} {dtype}", one, other)


def main() -> None:
    cases, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    ends = Ends(seed)
    for i in range(cases):
        dtype = DTYPES[i % 3]
        ends.lookups(dtype)
        ends.choice(dtype)
        ends.rope(dtype)
        ends.fed_next()
        ends.angles()
    print(*ends.wrong[:20], f"ends {cases}: {len(ends.wrong)} wrong", sep="\n", flush=True)
    sys.exit(bool(ends.wrong))


if __name__ == "__main__":
    main()
