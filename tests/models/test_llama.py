"""Llamas on any mesh: what transformers saved is loaded shard by shard,
the logits are those of plain torch in fp64."""
from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from typing import Any

import llama_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import configs, placements, run, tree

from shardlib import Layout, Mesh, simulate
from shardlib.api import shard_of
from shardlib.models.causal import Cache
from shardlib.models.decoding import weight_types, weights_of
from shardlib.models.files.model_files import open_checkpoint
from shardlib.models.llama import LlamaConfig, logits_of, loss, next_logits
from shardlib.models.llama_config import config_of
from shardlib.models.llama_weights import load
from shardlib.ops import few_rows
from shardlib.params import init

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@settings(max_examples=settings.default.max_examples // 4)
@given(configs(), placements(), st.sampled_from(DTYPES), st.integers(0, 1 << 20))
def test_what_transformers_saved_is_loaded_shard_by_shard(config: LlamaConfig, placement: tuple[Mesh, Layout],
                                                          dtype: torch.dtype, seed: int) -> None:
    weights, (mesh, layout) = reference.random_weights(config, seed), placement
    with tempfile.TemporaryDirectory() as folder:
        reference.to_transformers(weights, config).save_pretrained(folder)
        checkpoint = open_checkpoint(folder)
        assert config_of(checkpoint) == config
        types = weight_types(config, layout, mesh)
        for c in mesh.coordinates():
            loaded = load(checkpoint, types, mesh, c, dtype)
            assert loaded.keys() == weights.keys()
            for path, found in loaded.items():
                want = shard_of(weights[path].to(dtype), types[path], mesh, c)
                torch.testing.assert_close(found, want, rtol=0, atol=0)


class Trial:
    """A drawn model; a batch; and what is true of it."""

    def __init__(self, config: LlamaConfig, placement: tuple[Mesh, Layout], dtype: torch.dtype, rows: int,
                 time: int, seed: int) -> None:
        (self.mesh, self.layout), self.dtype = placement, dtype
        # the errors of a token or two, of 8 bits each, say little
        rows, time = (4, 6) if dtype == torch.bfloat16 else (rows, time)
        weights = reference.random_weights(config, seed)
        self.ids = torch.randint(0, config.vocab_size, (rows, time),
                                 generator=torch.Generator().manual_seed(seed))
        types = weight_types(config, self.layout, self.mesh)
        self.config, self.weights = config, tree(weights, config)
        self.shards = [
            {f"w.{path}": shard_of(t.to(dtype), types[path], self.mesh, c) for path, t in weights.items()}
            for c in self.mesh.coordinates()]
        rounded = {path: t.to(dtype).double() for path, t in weights.items()}
        self.truth = reference.logits(rounded, self.ids, config)
        self.theirs = cache(partial(reference.logits_of_torch, rounded, self.ids, config))
        self.sizes = dict(config.sizes, B=rows, T=time, S=time)

    def check(self, found: torch.Tensor, at: Any = slice(None)) -> None:
        """The error of `found`, logits at the positions `at`, is at most twice torch's own,
        there or over all positions."""
        def errors(dtype: torch.dtype, orders: int) -> list[float]:
            return [reference.error(theirs[i], self.truth[i]) for theirs in self.theirs(dtype, orders)
                    for i in (at, slice(None))]
        assert found.dtype == self.dtype
        assert reference.is_as_good(reference.error(found, self.truth[at]), errors, self.dtype)

    def run(self, f: Any, shards: Any = (), sizes: Any = (), **args: Any) -> Any:
        return run(f, self.layout, self.mesh, args, {**self.sizes, **dict(sizes)}, shards or self.shards,
                   config=self.config)


def trials(rows: int = 4, time: int = 6) -> st.SearchStrategy[Trial]:
    return st.builds(Trial, configs(), placements(), st.sampled_from(DTYPES), st.integers(1, rows),
                     st.integers(1, time), st.integers(0, 1 << 20))


@given(trials())
def test_logits(trial: Trial) -> None:
    ran = trial.run(logits_of, ids=trial.ids, w=trial.weights,
                    start=torch.zeros(len(trial.ids), dtype=torch.int64))
    trial.check(ran.results[0])


@given(trials(time=9), st.data())
def test_prefill_and_decode(trial: Trial, data: st.DataObject) -> None:
    """Prompts of unequal lengths, padded on the right, then parts of equal lengths:
    the logits after the last token of each."""
    rows, time = trial.ids.shape
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, time), min_size=rows, max_size=rows)))
    sizes, whole = {"S": time + data.draw(st.integers(0, 2))}, torch.cat((trial.ids, trial.ids.flip(1)), 1)
    start, width, shards = torch.zeros(rows, dtype=torch.int64), int(lengths.max()), trial.shards
    cache = init(Cache, {**trial.sizes, **sizes}, dtype=trial.dtype, path="cache")
    found, at = [], []
    while True:
        ids = whole.gather(1, start[:, None] + torch.arange(width))
        ran = trial.run(next_logits, shards, {**sizes, "T": width}, ids=ids, w=trial.weights, cache=cache,
                        start=start, last=lengths - 1 - start)
        found.append(ran.results[0])
        at.append(lengths - 1)
        if not int(time - lengths.max()):
            break
        width = data.draw(st.integers(1, int(time - lengths.max())))
        start, lengths = lengths, lengths + width
        shards = [{**held, "cache.layers.k": k, "cache.layers.v": v}
                  for held, k, v in zip(trial.shards, *ran.held[1:])]
    trial.check(torch.stack(found, 1), (torch.arange(rows)[:, None], torch.stack(at, 1)))


CONFIG = LlamaConfig(8, 8, 1, 1, 1, 2, 3, 1e-5, 1e4, None, False, 64)


def test_activations_may_be_split_over_d_model() -> None:
    """Which is slow: FSDP splits D over the axis that splits the batch. Norms join a number a row."""
    w, ids = init(weights_of(CONFIG), CONFIG.sizes), torch.arange(6).view(2, 3)
    split, whole = (simulate(logits_of, layout, ids, w, torch.zeros(2, dtype=torch.int64), mesh=Mesh(dp=2),
                             config=CONFIG) for layout in (Layout(D="dp"), Layout()))
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mesh, layout", [(Mesh(), Layout()), (Mesh(tp=2), Layout(K="tp", F="tp", V="tp"))],
                         ids=str)
def test_the_loss_in_bfloat16_is_at_most_as_wrong_as_that_of_torch_from_float32_logits(
        mesh: Mesh, layout: Layout) -> None:
    """Over several models; torch's are transformers and plain torch, with sums in several orders."""
    config = replace(CONFIG, vocab_size=37, d_model=16, num_layers=2, num_kv_heads=2, queries_per_kv=2,
                     head_dim=4, d_ff=7, tied=True)
    ours, theirs = [], []
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        weights = {path: t.bfloat16() for path, t in reference.random_weights(config, seed).items()}
        ids, labels = (torch.randint(37, (4, 6), generator=g) for _ in range(2))
        truth = reference.loss({path: t.double() for path, t in weights.items()}, ids, labels, config)
        logits = reference.logits_of_torch(weights, ids, config, torch.bfloat16)
        theirs.append(torch.stack([torch.nn.functional.cross_entropy(
            each.float().flatten(0, 1), labels.flatten()) for each in logits]) - truth)
        ours.append(simulate(loss, layout, ids, labels, tree(weights, config),
                             torch.zeros(4, dtype=torch.int64), mesh=mesh, config=config) - truth)
    assert torch.stack(ours).square().mean().sqrt() <= torch.stack(theirs).square().mean(0).sqrt().max()


@pytest.mark.parametrize("mesh, layout, seen", [
    (Mesh(), Layout(), [[1, 37]]), (Mesh(tp=2), Layout(K="tp", F="tp", V="tp", T="tp"), [[1, 37], [1, 37]]),
    (Mesh(cp=2), Layout(T="cp"), [[1, 37], [3, 39]])], ids=str)
def test_a_step_whose_attention_is_by_lengths_makes_no_mask(mesh: Mesh, layout: Layout, seen: list[list[int]],
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the kernel in the interpreter, once a layer on each rank; the logits are the same, up to
    rounding. Where T is split, each rank's queries begin where its piece does."""
    config = replace(CONFIG, vocab_size=37, d_model=16, num_layers=2, num_kv_heads=2, queries_per_kv=2,
                     head_dim=4, d_ff=7, tied=True)
    weights = tree(reference.random_weights(config, 0), config)
    sizes, g = dict(config.sizes, B=2, T=3, S=40), torch.Generator().manual_seed(0)
    ids, start, last = torch.randint(37, (2, 3), generator=g), torch.tensor([0, 36]), torch.tensor([2, 1])
    held = init(Cache, sizes, dtype=torch.float32, path="cache")
    for leaf in (held.layers.k, held.layers.v):
        leaf.copy_(torch.randn(leaf.shape, generator=g))

    def step() -> torch.Tensor:
        return simulate(next_logits, layout, ids, weights, held, start, last, mesh=mesh, config=config)[0]
    plain, module, lengths = step(), import_module("shardlib.ops.attend"), []
    monkeypatch.setattr(few_rows, "has_room", lambda device: True)
    monkeypatch.setattr(module, "counts_of", lambda device: None)
    monkeypatch.setattr("shardlib.ops.seen.Seen.bias", None)
    monkeypatch.setattr(module, "attend_lengths",
                        lambda *of: (lengths.append(of[3].tolist()), few_rows.attend_lengths(*of))[1])
    with torch.no_grad():
        torch.testing.assert_close(step(), plain, rtol=1e-4, atol=1e-4)
    assert sorted(lengths) == sorted(seen * config.num_layers)
