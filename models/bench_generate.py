"""How fast a model generates: `python -m shardlib.models.bench_generate`,
alone or under torchrun with a mesh.

    torchrun --nproc-per-node 4 -m shardlib.models.bench_generate \\
        --weights random:llama3-8b --mesh tp=4 --batch 1,8,32,128

For each batch: ms a step as the device takes it, one replay after another; ms between two tokens as a user of
`generate` sees them; time to the first token; tokens/s of the whole call. `floor` is the share of the memory
floor: the bytes of weights and of live cache that a step must read on this rank, over the rate at which the
device reads memory, measured in the same run. `--json` prints one object.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch

from shardlib import Mesh, SpecError
from shardlib.distributed.runtime import connect
from shardlib.errors import bytes_text
from shardlib.models.decoding import Model, Sampling
from shardlib.models.files.model_files import open_checkpoint
from shardlib.models.layouts import named_layout
from shardlib.models.mixtral import MixtralConfig
from shardlib.params import Params, leaf_values

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDS = 3
EXPERTS = (".gate", ".up", ".down")


@dataclass(frozen=True)
class Measured:
    """Of one batch.

    step_ms: by the device; token_ms: between tokens; call_ms: the whole call over a row's tokens.
    """
    rows: int
    step_ms: float
    token_ms: float
    call_ms: float
    first_ms: float
    tokens_per_second: float
    floor_ms: float


def measure(model: Model, rows: int, prompt: int, new: int, rate: float, graph: bool = True) -> Measured:
    """Generates `new` tokens after prompts of `prompt`;
    medians of ROUNDS calls, after one that makes the programs."""
    prompts = [[(7 * row + 3 * at + 1) % model.config.vocab_size for at in range(prompt)]
               for row in range(rows)]
    calls = []
    for _ in range(ROUNDS + 1):
        came: list[float] = []
        began = time.perf_counter()
        made = model.generate(prompts, new, on_tokens=lambda _: came.append(time.perf_counter()), graph=graph)
        calls.append((made.seconds / new, came[0] - began, (came[-1] - came[0]) / max(1, new - 1)))
    call, first, token = (statistics.median(column) * 1e3 for column in zip(*calls[1:]))
    floor = (step_bytes(model, rows) + model.decoder().cache_bytes(rows, prompt + new // 2)) / rate
    return Measured(rows, step_ms(model, prompts, new, graph), token, call, first, rows / call * 1e3,
                    floor * 1e3)


def step_ms(model: Model, prompts: Sequence[Sequence[int]], new: int, graph: bool = True) -> float:
    """Of steps launched one after another, without a look at what they give."""
    decoder = model.decoder(Sampling(), graph)
    with torch.inference_mode():
        slots = decoder.begin(prompts, new, [])
        decoder.advance(slots)
        return ms_of(lambda: decoder.advance(slots), new - 2, model.runtime.device)


def ms_of(call: Callable[[], object], count: int, device: torch.device) -> float:
    """ms a call of `count` calls."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - began) / count * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count


def read_rate(device: torch.device) -> float:
    """Bytes a second at which the device reads a tensor that no cache holds: the best of several sums."""
    x = torch.ones((1 << 29) if device.type == "cuda" else (1 << 24), dtype=torch.float32, device=device)
    return x.nbytes / min(ms_of(x.sum, 4, device) for _ in range(6)) * 1e3


def step_bytes(model: Model, rows: int) -> int:
    """Of weights that a step of so many rows reads here: all but other stages', and the rows of an embedding
    that no token names; of experts as many as are hit on average, where all are as likely."""
    c = model.config
    hit = 1 - (1 - c.top_k / c.num_experts) ** rows if isinstance(c, MixtralConfig) else 1.0
    return round(sum(t.nbytes * (hit if name.endswith(EXPERTS) else 1) for name, t in _tensors(model.weights)
                     if not t.is_meta and (c.tied or not name.endswith("w.embed"))))


def _tensors(tree: object) -> Iterable[tuple[str, torch.Tensor]]:
    """(path, tensor) of weights, prepared or not."""
    if isinstance(tree, Params):
        yield from leaf_values(tree, "w")
        return
    for part, leaf in zip(tree.parts, tree.flat):
        yield from ((part, t) for t in ((leaf,) if isinstance(leaf, torch.Tensor) else leaf))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shardlib.models.bench_generate",
                                     description="Measure how fast a Llama generates.")
    parser.add_argument("--weights", default="random:llama3-1b",
                        help="random:llama3-1b, random:llama3-8b, random:llama3-70b, random:mixtral-8x7b")
    parser.add_argument("--model",
                        help="in place of --weights: smollm2, a Hugging Face Llama folder, or a .gguf file")
    parser.add_argument("--mesh", default="", help='axes and sizes, as in "tp=4"; by default one rank')
    parser.add_argument("--layout", default="tp")
    parser.add_argument("--batch", default="1,8,32,128", help="rows, one number or several")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--json", action="store_true")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    try:
        run(options)
        return 0
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(options: argparse.Namespace) -> None:
    mesh = Mesh.parse(options.mesh)
    layout, dtype = named_layout(options.layout, mesh), DTYPES[options.dtype]
    batches = [int(text) for text in options.batch.split(",")]
    with connect(mesh, options.device) as runtime:
        def say(text: str) -> None:
            if runtime.rank == 0 and not options.json:
                print(text, flush=True)
        rate, began = read_rate(runtime.device), time.perf_counter()
        if options.model:
            model = Model.load(open_checkpoint(options.model), layout, runtime, dtype)
        else:
            model = Model.random(options.weights, layout, runtime, dtype)
        model.pack()
        name, read = options.model or options.weights, bytes_text(step_bytes(model, max(batches)))
        say(f"{name}, {options.dtype}, mesh {mesh}: {read} of weights a step here, made in "
            f"{time.perf_counter() - began:.1f} s; memory is read at {rate / 1e12:.2f} TB/s")
        say("  rows   ms a step   floor ms   share    ms a token   first token ms   tokens/s")
        made = []
        for rows in batches:
            made.append(
                m := measure(model, rows, options.prompt_tokens, options.new_tokens, rate, not options.eager))
            say(f"{m.rows:6} {m.step_ms:11.3f} {m.floor_ms:10.3f} {m.floor_ms / m.step_ms:6.0%} "
                f"{m.token_ms:13.3f} {m.first_ms:16.1f} {m.tokens_per_second:10.0f}")
        if options.json and runtime.rank == 0:
            print(json.dumps({"weights": name, "mesh": str(mesh), "bytes_per_second": rate,
                              "batches": [asdict(m) for m in made]}))


if __name__ == "__main__":
    sys.exit(main())
