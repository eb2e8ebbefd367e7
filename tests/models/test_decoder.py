"""Captured generation on the CPU, where a replay is the call itself:
the tokens of the eager loop, whatever rows end, move or draw."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import ranks

from shardlib import Layout, Mesh, SpecError, init
from shardlib.distributed.runtime import connect
from shardlib.models import decoder, row_groups, ways
from shardlib.models.decoding import Model, Sampling, weights_of
from shardlib.models.llama import LlamaConfig
from shardlib.models.slots import Slots, round_up

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = LlamaConfig(vocab_size=13, d_model=24, num_layers=2, num_kv_heads=3, queries_per_kv=2, head_dim=4,
                     d_ff=29, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=False, max_context=48)
DRAWN = Sampling(1.5, 0.95, 7)


def model(runtime: object) -> Model:
    return Model(CONFIG, init(weights_of(CONFIG), CONFIG.sizes, dtype=torch.float64), Layout(), runtime,
                 torch.float64)


@pytest.fixture(scope="module")
def one(one_thread: None) -> Model:
    with connect(Mesh(), "cpu") as runtime:
        yield model(runtime)


# -- slots ---------------------------------------------------------------------------------------------------

@given(st.integers(1, 40), st.integers(1, 4), st.data())
def test_rows_stay_on_their_rank_and_are_there_once(rows: int, ranks: int, data: st.DataObject) -> None:
    slots, ended = Slots.of(rows, ranks), set()
    homes = {row: s * ranks // slots.size for s, row in enumerate(slots.rows) if row is not None}
    assert sorted(homes) == list(range(rows)) and slots.size == ranks * round_up(-(-rows // ranks))
    while len(ended) < rows:
        ended |= data.draw(st.sets(st.sampled_from(sorted({*range(rows)} - ended)), min_size=1))
        smaller = slots.without(ended)
        fullest = max((sum(homes[row] == rank for row in {*range(rows)} - ended) for rank in range(ranks)),
                      default=0)
        if smaller is None:
            assert slots.size == ranks * round_up(fullest)
            continue
        assert smaller.slots.size < slots.size
        new, each, before = smaller.slots, smaller.slots.size // ranks, slots.size // ranks
        assert (new.size == ranks * round_up(fullest)
                and sorted(r for r in new.rows if r is not None) == sorted({*range(rows)} - ended))
        # what each rank's cache holds, moved
        cache = [list(slots.rows[rank * before:][:before]) for rank in range(ranks)]
        for rank, moves in enumerate(smaller.moves):
            assert ({to for to, _ in moves} <= {*range(each)}
                    and {origin for _, origin in moves} <= {*range(each, before)})
            for to, origin in moves:
                cache[rank][to] = cache[rank][origin]
        for s, row in enumerate(new.rows):
            assert slots.rows[smaller.source[s]] == cache[s // each][s % each]
            assert row is None or row == cache[s // each][s % each] and homes[row] == s // each
        slots = new


# -- the loop ------------------------------------------------------------------------------------------------

@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], int, set[int], Sampling]:
    """Prompts of unequal lengths, how many tokens are to follow, which end a row, and how they are chosen."""
    prompts = draw(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=30), min_size=1, max_size=9))
    most = CONFIG.max_context - max(map(len, prompts))
    return (prompts, draw(st.integers(1, most)), draw(st.sets(st.integers(0, 12), max_size=5)),
            draw(st.sampled_from((Sampling(), DRAWN))))


@settings(max_examples=25)
@given(batches(), st.sampled_from((1, 16, 32)), st.booleans(), st.booleans())
def test_captured_tokens_are_the_eager_ones(one: Model, batch: tuple, chunk: int, moving: bool,
                                            halved: bool) -> None:
    """Of buckets and rounded capacities, of prompts in chunks, of rows that move as soon as others end, or
    run as two halves."""
    prompts, new, ends, sampling = batch
    wanted, steps = one.generate(prompts, new, ends, sampling, graph=False), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decoder, "PROMPT_TOKENS", chunk)
        for name in ("WORTH_MOVING", "WORTH_CAPTURING"):
            patched.setattr(row_groups, name, 1 if moving else 99)
        patched.setattr(ways, "BESIDE_BYTES",
                        dict.fromkeys(("rows", "tokens"), {"cpu": -1} if halved else {}))
        made = one.generate(prompts, new, ends, sampling, steps.append, graph=True)
    assert replace(made, seconds=0) == replace(wanted, seconds=0)
    assert ([[*p, *(t for t in column if t is not None)] for p, column in zip(prompts, zip(*steps))]
            == made.tokens)


@pytest.mark.parametrize("graph", (False, True))
def test_a_prompt_in_chunks_is_continued_as_it_would_be_whole(one: Model, graph: bool,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn by where its last token stands, in its first chunk or in another one."""
    prompts = [[n % 13 for n in range(length)] for length in (40, 33, 32, 31, 17, 16, 3)]
    wanted = one.generate(prompts, 4, (), DRAWN, graph=False).tokens
    monkeypatch.setattr(decoder, "PROMPT_TOKENS", 1)
    assert one.generate(prompts, 4, (), DRAWN, graph=graph).tokens == wanted


def test_rows_that_move_draw_by_their_own_number(one: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[n] for n in range(8)]
    wanted = one.generate(prompts, 20, {2, 5}, DRAWN, graph=False).tokens
    assert len({len(tokens) for tokens in wanted}) > 3                  # they end one after another
    for name in ("WORTH_MOVING", "WORTH_CAPTURING"):
        monkeypatch.setattr(row_groups, name, 1)
    assert one.generate(prompts, 20, {2, 5}, DRAWN, graph=True).tokens == wanted


@pytest.mark.parametrize("graph", (False, True))
def test_a_text_may_fill_the_context_and_no_more(one: Model, graph: bool) -> None:
    assert len(one.generate([[1] * 40], CONFIG.max_context - 40, graph=graph).tokens[0]) == CONFIG.max_context
    with pytest.raises(SpecError) as refused:
        one.generate([[1] * 40], CONFIG.max_context - 39, graph=graph)
    assert str(refused.value) == "the prompt has 40 tokens and 9 are to follow; the model's context is 48"


def test_prompts_make_few_sizes(one: Model) -> None:
    """One graph for each bucket and capacity, whatever the prompts are;
    of their beginnings, where a size comes again."""
    made = one.decoder(Sampling(), True)
    one.generate([[1] * 40] * 4, 6, graph=True)         # a cache that holds all that follow
    made._forget()
    for length in range(1, 11):
        for rows in (3, 4):
            one.generate([[1] * length] * rows, 6, graph=True)
    assert sorted(made._graphs) == [(4, 8), (4, 16)] and made.capacity == 16
    one.generate([[1] * 40], 6, graph=True)
    assert ({key: held is not None for key, held in made._beginnings.items()}
            == {(4, 8, 8): True, (4, 16, 16): True, (1, 48, 48): False})
    assert (made.capacity == CONFIG.max_context and list(made._chunks(4, 40)) == [(0, 48)]
            and [*made._chunks(4096, 40)] == [(0, 16), (16, 16), (32, 16)])


def test_nothing_is_launched_before_the_step_before_the_last_is_known(
        one: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that all ranks launch the same; and no more than one step beyond the last token."""
    log: list[str] = []
    advance, fetch = decoder.Decoder.advancing, decoder.Decoder.fetch

    def fetching(self: decoder.Decoder, slots: Slots) -> object:
        number, wait = sum(e.startswith("launch") for e in log), fetch(self, slots)
        return lambda: (log.append(f"wait {number}"), wait())[1]
    monkeypatch.setattr(decoder.Decoder, "advancing",
                        lambda self, slots: (log.append(f"launch {slots.size}"), advance(self, slots))[1])
    monkeypatch.setattr(decoder.Decoder, "fetch", fetching)
    prompts = [[1, 2], [3], [4, 4, 4]]
    answer = one.generate(prompts[:1], 9, graph=False).tokens[0][2:]
    log.clear()
    one.generate(prompts[:1], 9, graph=True)
    assert log == ["launch 1", "wait 0", "launch 1", "wait 1", "launch 1", "wait 2", "launch 1", "wait 3",
                   "launch 1", "wait 4", "launch 1", "wait 5", "launch 1", "wait 6", "launch 1", "wait 7",
                   "wait 8"]
    log.clear()
    end = next(i for i, token in enumerate(answer) if token not in answer[:i] and i)
    one.generate(prompts[:1], 9, {answer[end]}, graph=True)
    assert log[-1] == f"wait {end}" and log.count("launch 1") == min(8, end + 1)


def test_an_ended_row_keeps_its_place(one: Model) -> None:
    made = one.decoder(Sampling(), True)
    with torch.inference_mode():
        slots = made.begin([[1, 2, 3], [4]], 8, [])
        made.live[1] = False
        before = [t[:2].clone() for t in (made.ids, made.position)]
        made.advance(slots)
    assert (made.position[:2].tolist() == [4, 1] and made.ids[1] == before[0][1]
            and made.live[:2].tolist() == [True, False])


def test_a_cache_of_garbage_is_no_matter(one: Model) -> None:
    """What an earlier batch has left, NaN or not, is not seen."""
    wanted = one.generate([[1, 2, 3], [4]], 25, graph=True).tokens
    with torch.inference_mode():
        for leaf in one._caches[0]._flat.values():
            leaf.fill_(torch.nan)
    assert one.generate([[1, 2, 3], [4]], 25, graph=True).tokens == wanted


def test_a_larger_batch_takes_another_cache(one: Model) -> None:
    small, wanted = [[1, 2]], one.generate([[1, 2]], 9, graph=True).tokens
    one.generate([[1, 2]] * 40, 9, graph=True)
    assert (one.generate(small, 9, graph=True).tokens == wanted
            and one._caches[0].room({"cache.layers.k": (2, 64, 16, 3, 4)}))


RANKS = """
import json, sys
import torch
from shardlib import Mesh, init
from shardlib.api import shard_of
from shardlib.distributed.runtime import connect
from shardlib.models import decoder, row_groups, ways
from shardlib.models.decoding import Model, Sampling, weights_of, weight_types
from shardlib.models.layouts import named_layout
from shardlib.models.llama import LlamaConfig
from shardlib.params import fill, leaf_values

row_groups.WORTH_MOVING = row_groups.WORTH_CAPTURING = 1
config, cases = LlamaConfig(**json.loads(sys.argv[1])), json.loads(sys.argv[2])
made, found = [], set()
for text, layout in (("tp=2", "tp"), ("dp=2", "tp"), ("tp=2", "K=tp,V=tp"), ("tp=2", "F=tp,V=tp")):
    mesh = Mesh.parse(text)
    ways.BESIDE_BYTES = dict.fromkeys(("rows", "tokens"), {"cpu": -1 if made else 1 << 40})
    ways.SPLITS = {"cpu": "BT" if made else ""}
    with connect(mesh, "cpu") as runtime:
        layout = named_layout(layout, mesh)
        kinds = weight_types(config, layout, mesh)
        whole = dict(leaf_values(init(weights_of(config), config.sizes, dtype=torch.float64), ""))
        weights = fill(weights_of(config), "",
                       lambda p: shard_of(whole[p], kinds[p[1:]], mesh, runtime.coordinate).contiguous())
        model = Model(config, weights, layout, runtime, torch.float64).pack()
        for prompts, new, ends, sampling in cases:
            made.append(model.generate(prompts, new, set(ends), Sampling(*sampling), graph=True).tokens)
        found |= {(way.halved, way.over) for d in model._decoders.values() for way in d.ways.made.values()}
if runtime.rank == 0:
    print(json.dumps([made, sorted(found)]))
"""


def test_rows_on_two_ranks(one: Model, tmp_path: Path) -> None:
    """Rows that end on one rank and not on the other, and move there: the tokens of one process."""
    (tmp_path / "ranks.py").write_text(RANKS)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8], [9, 9], [10, 11], [12], [3, 1, 4]]
    cases = [(prompts, 20, [], (0.0, 1.0, 0)), (prompts, 20, [2, 5, 7], (1.5, 0.95, 7)),
             (prompts[:3], 20, [1], (1.5, 0.95, 3)), (prompts[:1], 4, [], (0.0, 1.0, 0))]
    wanted = [one.generate(p, new, set(ends), Sampling(*s), graph=False).tokens for p, new, ends, s in cases]
    lengths: Sequence[int] = [len(t) - len(p) for t, p in zip(wanted[1], prompts)]
    assert len(set(lengths)) > 3                                    # rows do end one after another
    config = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    finished = ranks(2, [tmp_path / "ranks.py", json.dumps(config), json.dumps(cases)])
    assert (finished.returncode, finished.stderr) == (0, "")
    made, found = json.loads(finished.stdout)
    assert made == wanted * 4
    assert found == [["", ""], ["rows", ""], ["rows", "B"], ["rows", "T"], ["tokens", ""], ["tokens", "T"]]
