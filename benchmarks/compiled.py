"""The compiled program on one rank against the same math hand-written in plain torch: paired runs."""
from __future__ import annotations

import torch
from plain_llama import PlainLlama
from record import medians, paired, ratio, row, write

from shardlib import Layout, Mesh, compile, init
from shardlib.models.causal import Cache
from shardlib.models.decoding import weights_of
from shardlib.models.files.model_files import open_checkpoint
from shardlib.models.llama import Llama, LlamaConfig, next_logits
from shardlib.models.llama_config import config_of
from shardlib.models.llama_weights import load
from shardlib.params import fill, struct

SMALL = LlamaConfig(vocab_size=256, d_model=64, num_layers=32, num_kv_heads=2, queries_per_kv=2, head_dim=16,
                    d_ff=128, norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None, tied=True,
                    max_context=512)


def contestants(config: LlamaConfig, w: Llama, rows: int, t: int, slots: int) -> dict:
    plain = PlainLlama(w, config, rows, slots)
    step = compile(next_logits, Layout(), sizes=config.sizes, donate=("cache",), config=config)
    packed = step.prepare("w", w)
    cache = step.prepare("cache",
                         init(Cache, dict(config.sizes, B=rows, S=slots), dtype=w.embed.dtype, path="cache"))
    ids, start, last = (torch.randint(0, config.vocab_size, (rows, t)), torch.full((rows,), 3),
                        torch.full((rows,), t - 1))
    ours, theirs = step(ids, packed, cache, start, last)[0], plain.step(ids, start, last)
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
        raise SystemExit(f"the two disagree by {float((ours - theirs).abs().max())}")
    return {"ours": lambda: step(ids, packed, cache, start, last),
            "plain torch": lambda: plain.step(ids, start, last)}


def main() -> None:
    rows = []
    torch.set_num_threads(1)  # one thread of a quiet core: with more, what else the machine does decides
    with torch.inference_mode():
        checkpoint = open_checkpoint("smollm2")
        real = config_of(checkpoint)
        shapes = struct(weights_of(real))
        for name, config, t, dtype, builds, rounds, calls in (
                ("overhead-bound: D=64, 32 layers, T=1, fp32", SMALL, 1, torch.float32, 9, 20, 10),
                ("SmolLM2-135M decode, T=1, fp32", real, 1, torch.float32, 2, 20, 1),
                ("SmolLM2-135M decode, T=1, bf16", real, 1, torch.bfloat16, 2, 20, 1),
                ("SmolLM2-135M prefill, T=128, fp32", real, 128, torch.float32, 2, 8, 1)):
            if config is real:
                shards = load(checkpoint, dict((p[1:], s) for p, s in shapes.leaves("")), Mesh(), {}, dtype)
                w = fill(weights_of(real), "", lambda path: shards[path[1:]])
            else:
                w = init(weights_of(config), config.sizes, dtype=dtype)
            times: dict[str, list[float]] = {}
            for _ in range(builds):         # where the memory of a build lies moves its ratio by 2 %
                for contestant, found in paired(contestants(config, w, 1, t, 160), rounds, calls).items():
                    times.setdefault(contestant, []).extend(found)
            middle = medians(times, 1e6)
            entry = row(name, "µs", middle["ours"], {"plain torch": middle["plain torch"]})
            rows.append(entry | {"paired_ratio": round(ratio(times, "ours", "plain torch"), 4)})
            print(name, "paired ratio", rows[-1]["paired_ratio"], flush=True)
    write("compiled", rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
