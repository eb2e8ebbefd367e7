"""Draws docs/pipeline-*.svg: Llama 3 8B's loss and gradients on four stages, under three schedules, by work
alone; and what two GPUs did (benchmarks/profiles/pipeline.json), beside a clock that knows how long each
stage's actions take.

    python docs/make_timeline.py
"""
from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from shardlib import Layout, Mesh, explain, lower, value_and_grad
from shardlib.models.llama import LlamaConfig, loss
from shardlib.schedules.clock import Span, measured, run
from shardlib.schedules.generators import gpipe, one_f_one_b, zbv
from shardlib.schedules.timeline import svg

MESH, ROWS, TOKENS = Mesh(pp=4), 8, 4096
CONFIG = LlamaConfig(vocab_size=128256, d_model=4096, num_layers=32, num_kv_heads=8, queries_per_kv=4,
                     head_dim=128, d_ff=14336, norm_eps=1e-5, rope_theta=500000.0, rope_scaling=None,
                     tied=False, max_context=8192)


def pictures() -> Iterator[tuple[str, str]]:
    """Each file's name, and what is in it."""
    for make in (gpipe, one_f_one_b, zbv):
        schedule = make(4, ROWS)
        program = lower(value_and_grad(loss), Layout(L="pp", B="mb"), mesh=MESH, schedule=schedule,
                        config=CONFIG)
        sizes = dict(CONFIG.sizes, B=ROWS, T=TOKENS, S=TOKENS)
        told = explain(program, MESH, sizes, default="bfloat16", schedule=schedule)
        yield f"pipeline-{make.__name__}.svg", svg(told.timeline)


def measured_pictures() -> Iterator[tuple[str, str]]:
    """The same of what was measured, in ms."""
    marks = json.loads((Path(__file__).parents[1] / "benchmarks" / "profiles" / "pipeline.json").read_text())
    for name, make in (("1f1b", one_f_one_b), ("zbv", zbv)):
        schedule = make(2, ROWS)
        actions = {str(action): action for action in schedule.actions}
        spans = [Span(rank, actions[said], start, end) for rank, said, start, end
                 in marks[f"8B, 8 layers, 2 stages, {name}, {ROWS} microbatches"]]
        took = defaultdict(list)
        for span in spans:
            took[span.action.stage, span.action.kind].append(span.end - span.start)
        yield f"pipeline-{name}-measured.svg", svg(measured(schedule, spans))
        yield f"pipeline-{name}-clock.svg", svg(run(
            schedule, duration=lambda kind: 0.0, delay=lambda a, took=took: median(took[a.stage, a.kind])))


if __name__ == "__main__":
    for name, text in (*pictures(), *measured_pictures()):
        Path(__file__).with_name(name).write_text(text)
