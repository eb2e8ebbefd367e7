"""Experts in slots: what a model says does not depend on which, nor on their changing places."""
from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import mixtral_reference as reference
import pytest
import torch
from launching import ranks
from simulated import run

from shardlib import Layout, Mesh, SpecError
from shardlib.api import shard_of
from shardlib.distributed.runtime import connect
from shardlib.models.decoding import Model, weight_types
from shardlib.models.expert_placement import Placement, evenly
from shardlib.models.families import weights_of
from shardlib.models.mixtral import MixtralConfig, logits_of
from shardlib.models.placing import tables
from shardlib.params import fill

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = MixtralConfig(vocab_size=19, d_model=12, num_layers=2, num_kv_heads=2, queries_per_kv=2, head_dim=4,
                       d_ff=10, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=False, max_context=64,
                       num_experts=5, top_k=2, window=2)
PROMPTS, NEW = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10, 3, 1]], 6


def drawn(seed: int, of: int, slots: int) -> list[Placement]:
    """Any placement for each layer: each expert somewhere, the rest of the slots anyhow."""
    chance, made = random.Random(seed), []
    for _ in range(CONFIG.num_layers):
        held = [*range(CONFIG.num_experts), *(chance.randrange(CONFIG.num_experts)
                                              for _ in range(of * slots - CONFIG.num_experts))]
        chance.shuffle(held)
        made.append(Placement(tuple(tuple(held[r * slots:(r + 1) * slots]) for r in range(of))))
    return made


@pytest.mark.parametrize("mesh, layout, of", (("ep=3", "E=ep,B=ep", 3),
                                              ("dp=2,tp=2", "B=dp,E=dp/tp,K=tp", 4)))
def test_logits_are_those_without_slots(mesh: str, layout: str, of: int) -> None:
    """In float64: on the CPU the number of rows that a matrix is multiplied by changes the last bits. In
    kernels it does not: tests/triton_kernels/test_experts.py."""
    weights, config = reference.random_weights(CONFIG, 4), replace(CONFIG, num_slots=of * 6)
    ids = torch.randint(0, 19, (5, 4), generator=torch.Generator().manual_seed(1))
    placements = drawn(1, of, 6)
    held = [[e for rank in p.slots for e in rank] for p in placements]
    leaves = {path: torch.stack([x[layer][own] for layer, own in enumerate(held)])
              if path in ("layers.gate", "layers.up", "layers.down") else x for path, x in weights.items()}
    leaves["layers.slots"] = tables(placements, config.sizes["R"])
    found = run(logits_of, Layout.parse(layout), Mesh.parse(mesh),
                {"ids": ids, "w": reference.tree(leaves, config), "start": torch.zeros(5).long()},
                dict(config.sizes, B=5, T=4, S=4), config=config).results[0]
    torch.testing.assert_close(found, reference.logits(weights, ids, CONFIG), rtol=1e-11, atol=1e-11)


RANKS = """
import json, sys
import torch
from shardlib import Layout, Mesh
from shardlib.distributed.runtime import connect
from shardlib.models.decoding import Model
from shardlib.models.expert_placement import moves
sys.path[:0] = json.loads(sys.argv[1])
from test_placing import CONFIG, NEW, PROMPTS, drawn, model

with connect(Mesh(ep=2), "cpu") as runtime:
    one = model(Layout.parse("E=ep,B=ep"), runtime).place(drawn(1, 2, 4)).pack()
    turns, sent = iter(range(2, 9)), []
    group = runtime.group(("ep",))
    send = group.send
    group.send = lambda x, to: (sent.append(x.shape), send(x, to))
    wanted = sum(each.source[0] == runtime.rank != each.target[0]
                 for seed in range(2, 8) for was, now in zip(drawn(seed - 1, 2, 4), drawn(seed, 2, 4))
                 for each in moves(was, now))
    made = one.generate(PROMPTS, NEW, on_tokens=lambda new: one.place(drawn(next(turns), 2, 4))).tokens
    assert len(sent) == 3 * wanted > 0
    group.send = send
    if runtime.rank == 0:
        print(json.dumps(made))
"""


def model(layout: Layout, runtime: object) -> Model:
    types = weight_types(CONFIG, layout, runtime.mesh)
    weights = reference.random_weights(CONFIG, 3, torch.float32)
    shards = {path: shard_of(x, types[path], runtime.mesh, runtime.coordinate) for path, x in weights.items()}
    tree = fill(weights_of(CONFIG), "", lambda path: shards[path[1:]])
    return Model(CONFIG, tree, layout, runtime, torch.float32)


def test_experts_that_change_places_between_steps_change_no_token(tmp_path: Path) -> None:
    """After each token all experts are anywhere else; of what stays nothing is sent."""
    with connect(Mesh(), "cpu") as runtime:
        one = model(Layout(), runtime)
        wanted = one.generate(PROMPTS, NEW).tokens
        assert one.place([evenly(5, 1)] * 2).generate(PROMPTS, NEW).tokens == wanted
    (tmp_path / "ranks.py").write_text(RANKS)
    here = Path(__file__).parent
    done = ranks(2, [tmp_path / "ranks.py", json.dumps([str(here), str(here.parent / "helpers")])])
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == wanted


@pytest.mark.parametrize("placements, says", (
    ([evenly(5, 1)], "place: 1 placements, of 2 layers"),
    ([evenly(5, 2)] * 2, "place: each of the 1 ranks has as many slots as the others, in every layer"),
    ([Placement(((0, 1, 2, 3, 3),))] * 2, "place: layer 0 does not have each of 5 experts")))
def test_what_is_no_placement_of_a_model_says(placements: list[Placement], says: str) -> None:
    with connect(Mesh(), "cpu") as runtime:
        with pytest.raises(SpecError) as caught:
            model(Layout(), runtime).place(placements)
        assert str(caught.value) == says
        with pytest.raises(SpecError, match="place: there are 5 slots, and no other number any more"):
            model(Layout(), runtime).place([evenly(5, 1)] * 2).place([Placement(((0, 1, 2, 3, 4, 4),))] * 2)
