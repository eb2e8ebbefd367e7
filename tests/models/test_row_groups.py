"""Rows in groups through a pipeline: the tokens of one rank, its stages at different groups at once, in the
schedule `decode`; in the simulator, and over gloo."""
from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import ranks
from simulated_ranks import generate, model_at

from shardlib import Layout, Mesh, SpecError, init
from shardlib.distributed.runtime import connect
from shardlib.models import decoder
from shardlib.models.decoding import Model, Sampling, weights_of
from shardlib.models.layouts import named_layout
from shardlib.models.llama import LlamaConfig
from shardlib.models.row_groups import split_rows
from shardlib.run.turns import Sent
from shardlib.schedules.generators import decode
from shardlib.schedules.waits import messages, prove_schedule

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = LlamaConfig(vocab_size=13, d_model=24, num_layers=3, num_kv_heads=3, queries_per_kv=2, head_dim=4,
                     d_ff=29, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=True, max_context=48)
WEIGHTS = init(weights_of(CONFIG), CONFIG.sizes, dtype=torch.float64)
DRAWN, GREEDY = Sampling(1.5, 0.95, 7), Sampling()
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8], [9, 9], [10, 11], [12], [3, 1, 4]]
PLACES = [("pp=2", "L=pp"), ("pp=3", "L=pp,V=pp"), ("pp=4", "L=pp"), ("pp=2,tp=2", "L=pp,K=tp,F=tp,V=tp"),
          ("dp=2,pp=2", "B=dp,L=pp")]


@pytest.fixture(scope="module")
def one(one_thread: None) -> Model:
    with connect(Mesh(), "cpu") as runtime:
        yield Model(CONFIG, WEIGHTS, Layout(), runtime, torch.float64)


@pytest.fixture(scope="module")
def placed(one_thread: None) -> dict[str, list[Model]]:
    """By mesh, the model of each rank."""
    return {text: [model_at(WEIGHTS, CONFIG, named_layout(layout, mesh), mesh, rank)
                   for rank in range(mesh.world_size)]
            for text, layout in PLACES for mesh in [Mesh.parse(text)]}


@settings(max_examples=6)
@given(st.sampled_from(PLACES), st.integers(1, 7), st.integers(1, 6), st.sampled_from((None, 1, 2, 3, 7)),
       st.sets(st.integers(0, 12), max_size=3), st.sampled_from((DRAWN, GREEDY)), st.booleans())
def test_the_tokens_of_one_rank(one: Model, placed: dict[str, list[Model]], place, rows, new, groups, ends,
                                sampling, buckets) -> None:
    """More groups than stages and fewer; uneven ones; rows and groups that end; stages without a layer."""
    wanted, told = [], [[] for _ in placed[place[0]]]
    answer = one.generate(PROMPTS[:rows], new, ends, sampling, wanted.append, graph=False).tokens
    found, _ = generate(placed[place[0]], PROMPTS[:rows], new, ends, sampling, told, buckets, groups)
    assert found == [answer] * len(found) and told == [wanted] * len(told)


@pytest.mark.parametrize("text, groups, ends", (("pp=2", 2, ()), ("pp=3", 4, (3, 8))))
def test_it_is_the_schedule(placed: dict[str, list[Model]], text: str, groups: int, ends: tuple) -> None:
    """From each stage to each other go the messages of `decode`, in its order, also where groups end before
    others; and that schedule is proven, with no more slots than groups."""
    (found, *_), log = generate(placed[text], PROMPTS, 8, ends, DRAWN, groups=groups)
    parts, stages = split_rows(len(PROMPTS), groups, 0), Mesh.parse(text).axes["pp"]
    steps = [max(len(found[row]) - len(PROMPTS[row]) for row in rows) for rows in parts]
    assert (len({*steps}) > 1) == bool(ends)
    schedule, sent = decode(stages, groups, steps), defaultdict(list)
    turns = [(step, g) for step in range(max(steps)) for g, n in enumerate(steps) if step < n]
    for message in (message for message, _, _ in log if isinstance(message, Sent)):
        sent[message.source, message.target].append((message.turn, message.call))
    for edge, expected in messages(schedule).items():
        asked = [turns[sender.microbatch] for sender, _ in expected]
        goes_on = [(turn, g) for turn, g in sent[edge] if edge[1] > edge[0] or turn + 1 < steps[g]]
        assert sorted(goes_on) == sorted(asked) == asked
    proof = prove_schedule(schedule)
    assert {*proof.slots} == {*sent} and max(proof.slots.values()) <= groups


def test_what_travels_are_ids_and_the_carry(placed: dict[str, list[Model]]) -> None:
    """Of seven rows in groups of 4 and 3: the carry of a token forth, tokens back, no logits."""
    _, log = generate(placed["pp=2"], [[1]] * 7, 3, graph=False)
    assert [numel for message, _, numel in log if message.target == 1] == [4 * 24, 3 * 24] * 3
    assert [numel for message, _, numel in log if message.target == 0] == [4, 3] * 3


def test_chunks_of_prompts_wait_for_no_token(one: Model, placed: dict[str, list[Model]],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """In 3 chunks and 2, whose rows end in different ones: the first stage sends the carry of all chunks, and
    takes one message from the last, the tokens of all rows; with one group alone, too."""
    prompts = [[n % 13 for n in range(length)] for length in (40, 33, 17, 3)]
    monkeypatch.setattr(decoder, "STAGE_TOKENS", {"cpu": 1})            # chunks of 16
    for sampling in (DRAWN, GREEDY):
        wanted = one.generate(prompts, 4, (), sampling, graph=False).tokens
        for groups, chunks in ((1, [3]), (2, [3, 2])):
            found, log = generate(placed["pp=3"], prompts, 4, (), sampling, groups=groups)
            sent = [m for m, _, _ in log if isinstance(m, Sent) and m.turn == 0]
            assert found == [wanted] * 3
            ends = [(m.source, m.target, m.call) for m in sent]
            assert [ends.count((0, 1, group)) for group in range(groups)] == chunks
            assert [ends.count((2, 0, group)) for group in range(groups)] == [1] * groups


def test_groups_are_a_number() -> None:
    assert split_rows(3, None, 4) == [range(0, 1), range(1, 2), range(2, 3)]
    for wrong in (0, True, 1.0):
        with pytest.raises(SpecError) as refused:
            split_rows(3, wrong, 2)
        assert str(refused.value) == f"generate: groups is {wrong!r}; rows go into at least one"


RANKS = """
import json, sys
import torch
from shardlib import Mesh, init
from shardlib.api import shard_of
from shardlib.distributed.runtime import connect
from shardlib.models import decoder
from shardlib.models.decoding import Model, Sampling, weights_of, weight_types
from shardlib.models.layouts import named_layout
from shardlib.models.llama import LlamaConfig
from shardlib.params import fill, leaf_values

config, cases = LlamaConfig(**json.loads(sys.argv[1])), json.loads(sys.argv[2])
mesh, layout, made = Mesh.parse("pp=2"), named_layout("L=pp", Mesh.parse("pp=2")), []
whole = dict(leaf_values(init(weights_of(config), config.sizes, dtype=torch.float64), ""))
kinds = weight_types(config, layout, mesh)
with connect(mesh, "cpu") as runtime:
    weights = fill(weights_of(config), "",
                   lambda p: shard_of(whole[p], kinds[p[1:]], mesh, runtime.coordinate).contiguous())
    model = Model(config, weights, layout, runtime, torch.float64).pack()
    for prompts, new, ends, sampling in cases:
        made.append(model.generate(prompts, new, set(ends), Sampling(*sampling)).tokens)
if runtime.rank == 0:
    print(json.dumps(made))
"""


def test_over_gloo(one: Model, tmp_path: Path) -> None:
    """Weights packed, greedy and drawn, one batch after another, one row alone among them."""
    (tmp_path / "ranks.py").write_text(RANKS)
    cases: list[Any] = [(PROMPTS, 9, [3, 8], (1.5, 0.95, 7)), (PROMPTS[:5], 6, [], (0.0, 1.0, 0)),
                        (PROMPTS[:1], 4, [], (0.0, 1.0, 0))]
    wanted = [one.generate(p, new, set(ends), Sampling(*s)).tokens for p, new, ends, s in cases]
    config = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    finished = ranks(2, [tmp_path / "ranks.py", json.dumps(config), json.dumps(cases)])
    assert (finished.returncode, finished.stderr) == (0, "")
    assert json.loads(finished.stdout) == wanted
