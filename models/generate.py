"""Generate text: `python -m shardlib.models.generate --prompt "..."`, alone or under torchrun with a mesh.

    torchrun --nproc-per-node 3 -m shardlib.models.generate --model smollm2 --mesh tp=3 \\
        --prompt "The capital of France is"

Rank 0 reads the headers and the tokenizer, and tells the others; each rank reads the bytes of its own shards.
Progress goes to stderr, text to stdout; `--json` prints one object for machines. `--plan` prints every
collective of one token, or of the prompts, to stdout instead. Bad input ends every rank with a non-zero exit
code and one line.

With `--results FILE` what is finished is kept: started again, by hand or by `torchrun --max-restarts`, the
command generates the requests that are not in the file yet, to the tokens that they would have had, since a
draw depends on the seed, the position and the row in its batch alone. So the file may come from other meshes
and layouts, and from other batches where they leave the rows.
"""
from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from shardlib import Mesh, SpecError
from shardlib.distributed.rank_error import RankError
from shardlib.distributed.runtime import connect
from shardlib.errors import bytes_text
from shardlib.models.decoding import Generated, Model, Sampling, check_prompts
from shardlib.models.families import config_of
from shardlib.models.files.byte_tokenizer import ByteTokenizer
from shardlib.models.files.checkpoint import Checkpoint, CheckpointError, CheckpointWarning
from shardlib.models.files.model_files import open_checkpoint
from shardlib.models.files.tokenizer import Tokenizer
from shardlib.models.layouts import named_layout
from shardlib.models.random_weights import shape_of
from shardlib.models.results import Result, Results, digest
from shardlib.params import leaf_values
from shardlib.reports.explain import Explanation, explain

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and on one rank."""

    def error(self, message: str) -> NoReturn:
        raise SpecError(f"{message}; --help lists the options")


def arguments() -> argparse.ArgumentParser:
    parser = _Parser(prog="shardlib.models.generate",
                     description="Generate text with a Llama, a Mixtral, or a decoder of the gallery.")
    parser.add_argument("--model", default="smollm2",
                        help="smollm2, a Hugging Face folder whose model_type is known, or a .gguf file")
    parser.add_argument("--weights", help="in place of --model, random ones of a published shape, to "
                        "measure: random:llama3-8b")
    parser.add_argument("--mesh", default="", help='axes and sizes, as in "dp=2,tp=2"; by default one rank')
    parser.add_argument("--layout", default="tp",
                        help="tp, sp, fsdp, cp, joined by +; or a layout, as in B=dp,K=tp,F=tp")
    parser.add_argument("--prompt", action="append", default=[], help="may be repeated")
    parser.add_argument("--batch", type=int, help="prompts that are generated at once; by default all")
    parser.add_argument("--results", help="a file of JSON lines: requests that are in it are done, finished "
                        "ones are appended")
    parser.add_argument("--raw", action="store_true",
                        help="continue the prompt as it is; otherwise it is a chat turn")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        help="by default cuda where there is one for each process")
    parser.add_argument("--json", action="store_true",
                        help="one JSON object on stdout: tokens, text, tokens_per_second; or the plan")
    parser.add_argument("--plan", nargs="?", const="token", choices=("token", "prompts"),
                        help="print every collective of one token, or of the prompts, with its cost, to "
                        "stdout, and end")
    parser.add_argument("--quiet", action="store_true", help="no progress: only errors go to stderr")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show an answer must not end the job
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _reporting():
            run(arguments().parse_args(argv))
        return 0
    except _Reported:
        return 1
    except KeyboardInterrupt:
        return 130


class _Reported(Exception):
    """The error that ends this rank has been said, here or on another rank; `str` repeats it."""


@contextmanager
def _reporting() -> Iterator[None]:
    """What a user can do wrong, or meet, becomes one line on stderr,
    said by the first rank that comes to it."""
    try:
        yield
    except RankError as error:          # the watchdog has said it
        raise _Reported(str(error)) from None
    except (SpecError, CheckpointError, OSError, RuntimeError, MemoryError, IndexError, EOFError) as error:
        if _first():
            _report(error)
        raise _Reported(str(error)) from None


def _first() -> bool:
    """Whether no rank before this one has met an error: the others follow, or lose their peer.

    torchrun keeps the count.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                              timeout=timedelta(seconds=10))
        return store.add(f"shardlib/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except (RuntimeError, ValueError, KeyError):
        return True


def _report(error: Exception) -> None:
    """One line, and the same into the file that SHARDLIB_ERROR_FILE names."""
    text = str(error).strip() or type(error).__name__
    line = f"error: {text}" if isinstance(error, (SpecError, CheckpointError, OSError)) else \
        f"error on rank {os.environ.get('RANK', '0')}: {type(error).__name__}: {text.splitlines()[0]}"
    print(line, file=sys.stderr, flush=True)
    if path := os.environ.get("SHARDLIB_ERROR_FILE"):
        Path(path).write_text(line + "\n", errors="backslashreplace")


def run(options: argparse.Namespace) -> None:
    say = _speaker(options)
    mesh = Mesh.parse(options.mesh)
    sampling = _sampling(options)
    if options.batch is not None and options.batch < 1:
        raise SpecError(f"--batch {options.batch}: at least one prompt at once")
    layout = named_layout(options.layout, mesh)
    layout.on(mesh)
    with connect(mesh, options.device) as runtime, _reporting():
        world = tuple(mesh.axes)
        runtime.create_groups([world] if world else [])
        runtime.open_queue(world)
        say(f"{mesh.world_size} rank{'s' * (mesh.world_size > 1)} on {runtime.device.type}, mesh "
            f"{str(mesh) or '()'}, layout {str(layout) or '()'}; "
            f"{'drawing ' + options.weights if options.weights else 'reading ' + options.model}")
        job, request = None, None
        if runtime.rank == 0:
            with _saying(say):
                request, job = _prepare(options)
        job = runtime.group(world).broadcast_message(job, 0) if world else job
        if "error" in job:
            raise SpecError(job["error"])
        began, dtype = time.perf_counter(), DTYPES[options.dtype]
        model = Model.random(options.weights, layout, runtime, dtype, options.seed) if options.weights else \
            Model.load(Checkpoint.from_plain(job["checkpoint"]), layout, runtime, dtype)
        held = sum(t.numel() * t.element_size() for t in _tensors(model.weights))
        say(f"loaded {bytes_text(held)} of weights on this rank in {time.perf_counter() - began:.1f} s")
        model.pack()
        plan, said = _plan(model, job["prompts"][:options.batch], sampling, options)
        if options.plan:
            return _print_plan(plan, said, options.json) if request else None
        _say_plan(plan, say)
        made = []
        for rows in job["batches"]:
            stream = (_Stream(request.tokenizer) if request and not options.json and len(job["prompts"]) == 1
                      else None)
            prompts = [job["prompts"][row] for row in rows]
            made.append(model.generate(prompts, options.max_new_tokens, set(job["eos"]), sampling,
                                       stream or (lambda new: None)))
            if request:
                request.keep(rows, made[-1])
            if stream:
                stream.end()
        if request:
            _finish(made, request.results.done, options, say)


def _sampling(options: argparse.Namespace) -> Sampling:
    if not options.temperature >= 0 or not 0 < options.top_p <= 1:
        raise SpecError(f"--temperature {options.temperature} --top-p {options.top_p}: temperature is at "
                        "least 0, top-p above 0 and at most 1")
    if abs(options.seed) >= 2 ** 63:
        raise SpecError(f"--seed {options.seed}: a seed is above -2**63 and below 2**63")
    return Sampling(options.temperature, options.top_p, options.seed)


@dataclass(frozen=True)
class _Request:
    """What rank 0 alone has: the tokenizer, the prompts, and what is finished."""
    tokenizer: Tokenizer | ByteTokenizer
    prompts: list[list[int]]
    results: Results

    def batches(self, size: int | None) -> list[list[int]]:
        """The batches of which something is not done.

        They are the same in every attempt: a draw depends on the row.
        """
        rows, size = list(range(len(self.prompts))), size or len(self.prompts)
        batches = [rows[i:i + size] for i in rows[::size]]
        return [batch for batch in batches if not self.results.done.keys() >= set(batch)]

    def keep(self, rows: Sequence[int], made: Generated) -> None:
        for row, tokens in zip(rows, made.tokens):
            self.results.add(row, tokens, self.tokenizer.decode(tokens[len(self.prompts[row]):]))


def _prepare(options: argparse.Namespace) -> tuple[_Request | None, dict[str, Any]]:
    """Rank 0: what all ranks must know, or the error that all of them end with."""
    try:
        if any(not text.strip() for text in options.prompt) or not options.prompt:
            raise SpecError("the prompt is empty; give one with --prompt")
        # how Python hands on bytes it cannot decode
        if any("\udc80" <= c <= "\udcff" for text in options.prompt for c in text):
            raise SpecError("the prompt is not UTF-8 text")
        checkpoint = None if options.weights else open_checkpoint(options.model)
        tokenizer = Tokenizer.load(options.model) if checkpoint else ByteTokenizer()
        texts = (options.prompt if options.raw
                 else [tokenizer.chat([{"role": "user", "content": text}]) for text in options.prompt])
        prompts = [tokenizer.encode(text) for text in texts]
        check_prompts(prompts, options.max_new_tokens,
                      config_of(checkpoint) if checkpoint else shape_of(options.weights))
        request = _Request(tokenizer, prompts,
                           Results(None if options.plan else options.results, _digests(prompts, options)))
        return request, {"checkpoint": checkpoint and checkpoint.to_plain(), "prompts": prompts,
                         "eos": sorted(tokenizer.eos_ids), "batches": request.batches(options.batch)}
    except (SpecError, CheckpointError, OSError) as error:
        return None, {"error": str(error)}


def _digests(prompts: Sequence[Sequence[int]], options: argparse.Namespace) -> list[str]:
    """What every request is known by.

    Greedy tokens depend on no seed, and drawn ones on the row in the batch too.
    """
    model = f"{options.weights} {options.seed} {options.mesh}" if options.weights else options.model
    all_tokens, size = (model, options.max_new_tokens, options.dtype), options.batch or len(prompts)
    draws = (options.temperature, options.top_p, options.seed)
    return [digest(p, (*all_tokens, *draws, row % size) if options.temperature else all_tokens)
            for row, p in enumerate(prompts)]


def _speaker(options: argparse.Namespace) -> Callable[[str], None]:
    quiet = options.quiet or options.json or os.environ.get("RANK", "0") != "0"
    return lambda text: None if quiet else print(text, file=sys.stderr, flush=True)


@contextmanager
def _saying(say: Callable[[str], None]) -> Iterator[None]:
    """What the files of a model leave open becomes a line of the command."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        say(f"note: {message}") if issubclass(category,
                                              CheckpointWarning) else shown(message, category, *rest)
    with warnings.catch_warnings():
        warnings.simplefilter("always", CheckpointWarning)
        warnings.showwarning = show
        yield


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    return (t for _, t in leaf_values(tree, ""))


def _plan(model: Model, prompts: Sequence[Sequence[int]], sampling: Sampling,
          options: argparse.Namespace) -> tuple[Explanation, str]:
    """The collectives of one token, or of the prompts, by the line that asked for them, and what there is to
    say of how it goes. Every rank calls it."""
    rows, longest, new, said = len(prompts), max(map(len, prompts)), options.max_new_tokens, ""
    if options.plan == "prompts":
        plan = model.decoder(sampling, model.runtime.device.type == "cuda").prompts(rows, longest, new)
        program, sizes = plan.program, plan.sizes
        said = f"prompts, {rows} x {longest} tokens: {plan.way}{'. One half:' if plan.way.halved else ''}"
    else:
        program, sizes = model.lower(sampling), dict(model.config.sizes, B=rows, T=1, S=longest + new)
    return explain(program, model.runtime.mesh, sizes, default=options.dtype, runtime=model.runtime), said


def _print_plan(plan: Explanation, said: str, as_json: bool) -> None:
    text = "\n".join(filter(None, (said, str(plan).rstrip("\n"))))
    print(json.dumps(plan.to_json() | ({"way": said} if said else {})) if as_json else text, flush=True)


def _say_plan(plan: Explanation, say: Callable[[str], None]) -> None:
    say(f"plan of one token: {plan.collectives} collectives, {bytes_text(plan.bytes)} received per rank")
    for t in plan.traffic:
        say(f"  {t.where:16} {t.times:3} x {t.op:14} {'/'.join(t.axes)}={t.group_size}  "
            f"{bytes_text(t.bytes):>8}  {t.before} -> {t.after}")


class _Stream:
    """Prints the answer of a single prompt as it comes."""

    def __init__(self, tokenizer: Tokenizer | ByteTokenizer) -> None:
        self.tokenizer, self.ids, self.shown = tokenizer, [], ""

    def __call__(self, new: list[int | None]) -> None:
        self.ids += [t for t in new if t is not None]
        text = "".join(self.tokenizer.stream(self.ids))
        if text.startswith(self.shown) and not text.endswith("\ufffd"):
            print(text[len(self.shown):], end="", flush=True)
            self.shown = text

    def end(self) -> None:
        """Prints what was held back: the bytes of a character that never became whole."""
        print(self.tokenizer.decode(self.ids)[len(self.shown):], flush=True)


def _finish(made: Sequence[Generated], done: Mapping[int, Result], options: argparse.Namespace,
            say: Callable[[str], None]) -> None:
    """All results, those of earlier attempts too; the rate is that of this attempt."""
    results, new, seconds = ([done[row] for row in sorted(done)], sum(m.new_tokens for m in made),
                             sum(m.seconds for m in made))
    rate = new / seconds if made else 0.0
    if options.json:
        one = [{"tokens": r.tokens, "text": r.text} for r in results]
        print(json.dumps({**(one[0] if len(one) == 1 else {"completions": one}), "tokens_per_second": rate}),
              flush=True)
        return
    if len(results) > 1 or not made:            # one alone was shown as it came
        for r in results:
            print(f"[{r.request}] {r.text}" if len(results) > 1 else r.text, flush=True)
    say(f"{new} tokens in {seconds:.1f} s: {rate:.1f} tokens/s")


if __name__ == "__main__":
    sys.exit(main())
