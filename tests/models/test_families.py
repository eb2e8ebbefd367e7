"""What a family says of its weights: the leaves of a tree are their own paths, in its table and its types."""
from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from damaged import HF

from shardlib import Layout, Mesh
from shardlib.models.decoding import weight_types
from shardlib.models.families import FAMILIES, config_of, family_of, weights_of
from shardlib.models.files.checkpoint import Checkpoint, CheckpointError, TensorEntry
from shardlib.models.random_weights import SHAPES
from shardlib.params import leaf_values

LLAMA, MIXTRAL = SHAPES["llama3-8b"], SHAPES["mixtral-8x7b"]
ATTENDING = {"embed", "norm", *(f"layers.{name}" for name in ("norm1", "wq", "wk", "wv", "wo", "norm2"))}
DENSE = {f"layers.{name}" for name in ("gate", "up", "down")}


@pytest.mark.parametrize("config, paths", [
    (LLAMA, ATTENDING | DENSE | {"head"}), (dataclasses.replace(LLAMA, tied=True), ATTENDING | DENSE),
    (MIXTRAL, ATTENDING | DENSE | {"head", "layers.router"}),
    (dataclasses.replace(MIXTRAL, tied=True), ATTENDING | DENSE | {"layers.router"})],
    ids=["llama", "llama, tied", "mixtral", "mixtral, tied"])
def test_leaves_are_their_paths(config: Any, paths: set[str]) -> None:
    found = leaf_values(weights_of(config), "w")
    assert {path.removeprefix("w."): leaf for path, leaf in found} == {path: path for path in paths}
    assert {*weight_types(config, Layout(), Mesh())} == paths
    assert FAMILIES[config.family] is family_of(config) and family_of(config).name == config.family


@pytest.mark.parametrize("said", [None, "gpt5", "x" * 5000])
def test_a_model_that_is_none_of_them(said: str | None) -> None:
    with pytest.raises(CheckpointError) as caught:
        config_of(Checkpoint("huggingface", {}, {}, {"model_type": said} if said else {}))
    assert str(caught.value) == (f"config.json: model_type is {repr(said)[:80]}, which does not generate "
                                 f"here; it is one of {', '.join(FAMILIES)}")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_biases_are_refused(name: str) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    entry = TensorEntry(bias, "m", 0, (2048,), "F32", 1, 4)
    fields = {**HF, "model_type": name, "num_local_experts": 8, "num_experts_per_tok": 2}
    assert config_of(Checkpoint("huggingface", {}, {}, fields)).family == name
    with pytest.raises(CheckpointError) as caught:
        config_of(Checkpoint("huggingface", {}, {bias: entry}, fields))
    assert str(caught.value) == f"tensor {bias}: biases are not implemented"
