"""Random weights of published shapes: the shapes, replicas that are equal,
and the commands that measure with them."""
from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from shardlib import Mesh
from shardlib.models import bench_generate, generate
from shardlib.models.decoding import weight_types
from shardlib.models.layouts import named_layout
from shardlib.models.random_weights import SHAPES, random_weights, shape_of

TINY = dataclasses.replace(SHAPES["llama3-1b"], vocab_size=256, d_model=32, num_layers=2, head_dim=4, d_ff=24)


@pytest.mark.parametrize("name, billions",
                         [("llama3-1b", 1.236), ("llama3-8b", 8.030), ("llama3-70b", 70.554),
                          ("mixtral-8x7b", 46.703)])
def test_they_have_as_many_parameters_as_published(name: str, billions: float) -> None:
    types = weight_types(SHAPES[name], named_layout("tp", Mesh()), Mesh())
    count = sum(torch.Size(Mesh().local_shape(kind, SHAPES[name].sizes, {})).numel()
                for kind in types.values())
    assert round(count / 1e9, 3) == billions


@pytest.mark.parametrize("name, heads, scaled, tied, context, theta", [
    ("llama3-1b", (8, 32, 64), (32.0, 1.0, 4.0, 8192), True, 131072, 5e5),
    ("llama3-8b", (8, 32, 128), None, False, 8192, 5e5), ("llama3-70b", (8, 64, 128), None, False, 8192, 5e5),
    ("mixtral-8x7b", (8, 32, 128), None, False, 32768, 1e6)])
def test_what_else_is_published_of_them(name: str, heads: tuple[int, int, int], scaled: tuple | None,
                                        tied: bool, context: int, theta: float) -> None:
    """Heads of keys, of queries, and their size: how many parameters there are says nothing of these."""
    config = shape_of(f"random:{name}")
    assert (config.num_kv_heads, config.num_kv_heads * config.queries_per_kv, config.head_dim) == heads
    assert (config.scaling, config.tied, config.max_context, config.theta, config.eps) == (
        scaled, tied, context, theta, 1e-5)
    assert shape_of(name) is config


def test_replicas_are_equal_and_pieces_are_not() -> None:
    mesh = Mesh(dp=2, tp=2)
    types = weight_types(TINY, named_layout("tp", mesh), mesh)
    ranks = [random_weights(TINY, types, mesh, c, torch.float32, torch.device("cpu"))
             for c in mesh.coordinates()]
    for path, kind in types.items():
        assert torch.equal(ranks[0][path], ranks[2][path]) and torch.equal(ranks[1][path], ranks[3][path])
        assert torch.equal(ranks[0][path], ranks[1][path]) == ("tp" not in str(kind))
    assert all(torch.equal(ranks[0][path], torch.ones_like(ranks[0][path]))
               for path in ("norm", "layers.norm1", "layers.norm2"))
    assert (0.8 < ranks[0]["layers.down"].std() * TINY.d_ff ** 0.5 < 1.2
            and 0.8 < ranks[0]["layers.wq"].std() * TINY.d_model ** 0.5 < 1.2)


def test_experts_are_drawn_as_large_as_what_each_adds_up() -> None:
    config = dataclasses.replace(SHAPES["mixtral-8x7b"], vocab_size=64, d_model=64, num_layers=2, head_dim=4,
                                 d_ff=24)
    types = weight_types(config, named_layout("tp", Mesh()), Mesh())
    made = random_weights(config, types, Mesh(), {}, torch.float32, torch.device("cpu"))
    for name, summed in (("router", 64), ("gate", 64), ("up", 64), ("down", 24), ("wo", 128), ("wk", 64)):
        assert 0.9 < made[f"layers.{name}"].std() * summed ** 0.5 < 1.1, name


def test_another_seed_draws_other_weights() -> None:
    types = weight_types(TINY, named_layout("tp", Mesh()), Mesh())
    one, again, other = (random_weights(TINY, types, Mesh(), {}, torch.float32, torch.device("cpu"), seed)
                         for seed in (0, 0, 1))
    assert all(torch.equal(one[path], again[path]) for path in types)
    assert ({path for path in types if torch.equal(one[path], other[path])}
            == {"norm", "layers.norm1", "layers.norm2"})


def test_the_commands(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    assert bench_generate.main(["--weights", "random:tiny", "--batch", "1,3", "--prompt-tokens", "4",
                                "--new-tokens", "5", "--json"]) == 0
    made = json.loads(capfd.readouterr().out)
    assert ([b["rows"] for b in made["batches"]] == [1, 3]
            and all(v > 0 for b in made["batches"] for v in b.values()))
    assert made["batches"][1]["floor_ms"] > made["batches"][0]["floor_ms"]
    assert (generate.main(["--weights", "random:tiny", "--prompt", "ab", "--max-new-tokens", "3", "--json"])
            == 0)
    made = json.loads(capfd.readouterr().out)
    assert made["tokens"][:2] == [97, 98] and len(made["tokens"]) == 5
    for command in (bench_generate.main, generate.main):
        given = ["--weights", "random:llama4", *(["--prompt", "ab"] if command is generate.main else [])]
        assert command([*given, "--quiet"] if command is generate.main else given) == 1
        assert (capfd.readouterr()
                == ("", "error: no shape llama4; there are llama3-1b, llama3-8b, llama3-70b, mixtral-8x7b, "
                    "tiny\n"))
