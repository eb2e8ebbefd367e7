"""Llamas that transformers saved, loaded shard by shard, on any mesh: their logits are those of plain torch in fp64."""
from __future__ import annotations

import tempfile
from typing import Any

import llama_reference as reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from simulated import placements, run, tree

from shardlib import Layout, Mesh, SpecError, lower
from shardlib.models.decoding import weight_types
from shardlib.models.llama import Cache, LlamaConfig, RopeScaling, logits_of, next_logits
from shardlib.models.llama_config import config_of
from shardlib.models.llama_weights import load
from shardlib.models.model_files import open_checkpoint
from shardlib.params import init

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@st.composite
def configs(draw: st.DrawFn) -> LlamaConfig:
    """Small, with sizes that the ranks do not divide. transformers wants d_model to be a multiple of the query heads."""
    kv, queries = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return LlamaConfig(vocab_size=draw(st.integers(7, 29)), d_model=kv * queries * draw(st.integers(-(-8 // (kv * queries)), 12)),
                       num_layers=draw(st.integers(1, 3)), num_kv_heads=kv, queries_per_kv=queries, head_dim=2 * draw(st.integers(1, 4)),
                       d_ff=draw(st.integers(1, 23)), norm_eps=draw(st.sampled_from((1e-5, 1e-6))), rope_theta=draw(st.sampled_from((1e4, 5e5))),
                       rope_scaling=draw(st.sampled_from((None, RopeScaling(8.0, 1.0, 4.0, 16), RopeScaling(2.0, 0.5, 3.0, 32)))),
                       tied=draw(st.booleans()), max_context=64)


class Trial:
    """A drawn model, saved and loaded; a batch; and what is true of it."""

    def __init__(self, config: LlamaConfig, placement: tuple[Mesh, Layout], dtype: torch.dtype, rows: int, time: int, seed: int) -> None:
        (self.mesh, self.layout), self.dtype = placement, dtype
        weights = reference.random_weights(config, seed)
        self.ids = torch.randint(0, config.vocab_size, (rows, time), generator=torch.Generator().manual_seed(seed))
        with tempfile.TemporaryDirectory() as folder:
            reference.to_transformers(weights, config).save_pretrained(folder)
            checkpoint = open_checkpoint(folder)
            self.config = config_of(checkpoint)
            types = weight_types(config, self.layout, self.mesh)
            self.shards = [{f"w.{path}": t for path, t in load(checkpoint, types, self.mesh, c, dtype).items()} for c in self.mesh.coordinates()]
        assert self.config == config
        self.weights = tree(weights, config)
        rounded = {path: t.to(dtype).double() for path, t in weights.items()}
        self.truth = reference.logits(rounded, self.ids, config)
        self.allowed = 2 * reference.logits_error(rounded, self.ids, config, dtype, self.truth)
        self.sizes = dict(config.sizes, B=rows, T=time, S=time)

    def run(self, f: Any, shards: Any = (), sizes: Any = {}, **args: Any) -> Any:
        return run(f, self.layout, self.mesh, args, {**self.sizes, **sizes}, shards or self.shards, config=self.config)


def trials(rows: int = 4, time: int = 6) -> st.SearchStrategy[Trial]:
    return st.builds(Trial, configs(), placements(), st.sampled_from(DTYPES), st.integers(1, rows), st.integers(1, time), st.integers(0, 1 << 20))


@given(trials())
def test_logits(trial: Trial) -> None:
    ran = trial.run(logits_of, ids=trial.ids, w=trial.weights, start=torch.zeros(len(trial.ids), dtype=torch.int64))
    assert ran.results[0].dtype == trial.dtype
    assert reference.error(ran.results[0], trial.truth) <= trial.allowed
