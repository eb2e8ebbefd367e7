"""Mixtral on any mesh against transformers and plain torch: logits, loss, gradients, tokens, and weights read
from folders, each rank its own experts' bytes."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mixtral_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import ranks
from safetensors.torch import save_file
from simulated import generate, run
from torch import Tensor

from shardlib import Layout, Mesh, SpecError, lower, simulate, value_and_grad
from shardlib.api import shard_of
from shardlib.distributed.runtime import connect
from shardlib.models.decoding import PASSES, Model, Sampling, weight_types
from shardlib.models.families import config_of, load
from shardlib.models.files import weights as files
from shardlib.models.files.checkpoint import CheckpointError
from shardlib.models.files.model_files import open_checkpoint
from shardlib.models.mixtral import MixtralConfig, logits_of, loss, next_token
from shardlib.models.mixtral_config import config_from_hf
from shardlib.params import leaf_values
from shardlib.schedules.generators import one_f_one_b

pytestmark = pytest.mark.usefixtures("one_thread")

PLACEMENTS = (
    ("", ""), ("ep=2", "E=ep"), ("ep=3", "E=ep"), ("ep=4", "E=ep,B=ep"), ("tp=2", "K=tp,F=tp,V=tp"),
    ("tp=2", "E=tp,K=tp,V=tp"), ("tp=3", "E=tp,K=tp,V=tp,T=tp"), ("dp=2", "B=dp,E=dp"),
    ("dp=2,tp=2", "B=dp,E=dp/tp,K=tp,V=tp"), ("dp=2,tp=2", "B=dp,E=dp,K=tp,F=tp,V=tp,T=tp"),
    ("ep=2,tp=2", "E=ep,K=tp,F=tp,V=tp"), ("dp=2", "B=dp,E=dp,D=dp"), ("cp=2,ep=2", "T=cp,E=ep/cp"))
placements = st.sampled_from(PLACEMENTS)


class Trial:
    """A drawn model and batch."""

    def __init__(self, config: MixtralConfig, rows: int, time: int, seed: int) -> None:
        self.config, g = config, torch.Generator().manual_seed(seed)
        self.weights = reference.random_weights(config, seed)
        self.ids, self.labels = torch.randint(0, config.vocab_size, (2, rows, time), generator=g)
        self.start = torch.zeros(rows, dtype=torch.int64)
        self.sizes = dict(config.sizes, B=rows, T=time, S=time)

    def run(self, f: Any, placement: tuple[str, str], dtype: torch.dtype, **args: Tensor) -> list[Tensor]:
        mesh, layout = Mesh.parse(placement[0]), Layout.parse(placement[1])
        w = reference.tree({path: t.to(dtype) for path, t in self.weights.items()}, self.config)
        return run(f, layout, mesh, {"ids": self.ids, **args, "w": w, "start": self.start}, self.sizes,
                   config=self.config).results


trials = st.builds(Trial, reference.configs(), st.integers(1, 4), st.integers(1, 5), st.integers(0, 1 << 20))


@settings(max_examples=settings.default.max_examples // 5)
@given(trials, placements)
def test_logits(trial: Trial, placement: tuple[str, str]) -> None:
    """In fp64 those of plain torch; in fp32 as near to these as those of transformers."""
    truth = reference.logits(trial.weights, trial.ids, trial.config)
    exact = trial.run(logits_of, placement, torch.float64)[0]
    torch.testing.assert_close(exact, truth, rtol=1e-9, atol=1e-9)
    single = {path: t.float() for path, t in trial.weights.items()}
    truth = reference.logits({path: t.double() for path, t in single.items()}, trial.ids, trial.config)
    with torch.no_grad():
        theirs = reference.to_transformers(single, trial.config)(trial.ids).logits
    mine = trial.run(logits_of, placement, torch.float32)[0]
    errors = [max((x.double() - truth).abs().max().item(), 1e-6 * truth.abs().max().item())
              for x in (mine, theirs, reference.logits(single, trial.ids, trial.config))]
    assert errors[0] <= 2 * max(errors[1:])


@settings(max_examples=settings.default.max_examples // 8)
@given(trials, placements)
def test_loss_and_gradients(trial: Trial, placement: tuple[str, str]) -> None:
    given = {path: t.clone().requires_grad_() for path, t in trial.weights.items()}
    truth = reference.loss(given, trial.ids, trial.labels, trial.config)
    wanted = torch.autograd.grad(truth, list(given.values()))
    found = trial.run(value_and_grad(loss), placement, torch.float64, labels=trial.labels)
    for a, b in zip(found, [truth.detach(), *wanted], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("placement", (("", ""), ("dp=2,tp=2", "B=dp,E=dp/tp,K=tp,F=tp,V=tp,T=tp")))
def test_what_the_loss_adds_for_balance_is_what_transformers_adds(placement: tuple[str, str]) -> None:
    """Over all tokens of all layers, with its gradient; theirs is in float32."""
    plain, balanced = Trial(CONFIG, 3, 5, 1), Trial(replace(CONFIG, balance=1.0), 3, 5, 1)
    theirs = reference.to_transformers(balanced.weights, balanced.config)
    aux = theirs(plain.ids).aux_loss
    wanted = torch.autograd.grad(aux, theirs.model.layers[0].mlp.gate.weight)[0].T
    more, less = (trial.run(value_and_grad(loss), placement, torch.float64, labels=plain.labels)
                  for trial in (balanced, plain))
    at = 1 + list(plain.weights).index("layers.router")
    found = [more[0] - less[0], more[at][0] - less[at][0]]
    torch.testing.assert_close(found, [aux.detach().double(), wanted], rtol=1e-5, atol=1e-6)


CONFIG = MixtralConfig(vocab_size=19, d_model=12, num_layers=2, num_kv_heads=2, queries_per_kv=2, head_dim=4,
                       d_ff=10, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=False, max_context=64,
                       num_experts=5, top_k=2, window=2)


def test_a_line_of_layout_is_all_there_is() -> None:
    """How often tokens and weights are sent: by TP, by EP, by both, and by EP over data parallel ranks."""
    def sent(layout: Layout, mesh: Mesh) -> list[str]:
        program = str(lower(logits_of, layout, mesh=mesh, config=CONFIG))
        text = program.split("def block")[1].split("@sharded")[0]
        return [line.split("= ")[1].split("(")[0] for line in text.splitlines() if any(
            f"= {name}(" in line for name in ("all_gather", "all_reduce", "reduce_scatter", "all_to_all"))]
    assert sent(Layout(F="tp"), Mesh(tp=2)) == ["all_reduce"]
    assert sent(Layout(E="ep"), Mesh(ep=2)) == ["all_reduce"]
    assert sent(Layout(E="ep", F="tp"), Mesh(ep=2, tp=2)) == ["all_reduce"]
    assert sent(Layout(B="dp", E=("dp", "tp")), Mesh(dp=2, tp=2)) == [
        "all_gather", "all_gather", "all_gather", "reduce_scatter", "all_reduce"]


@pytest.mark.parametrize("placement", (("pp=2", "L=pp"), ("pp=2,ep=2", "L=pp,B=ep,E=ep")))
def test_stages_give_what_one_rank_gives(placement: tuple[str, str]) -> None:
    """Three layers on two stages: the loss, with what its routers add, all gradients, logits, and tokens."""
    config = replace(CONFIG, num_layers=3, balance=0.5, z_loss=0.25)
    trial = Trial(config, 3, 5, 2)
    for f, args in ((value_and_grad(loss), dict(labels=trial.labels)), (logits_of, {})):
        found, wanted = (trial.run(f, at, torch.float64, **args) for at in (placement, ("", "")))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    w = reference.tree(trial.weights, config)
    mesh, layout = Mesh.parse(placement[0]), Layout.parse(placement[1])
    assert generate(w, config, layout, mesh, PROMPTS, 4) == generate(w, config, Layout(), Mesh(), PROMPTS, 4)


def test_microbatches_of_stages_with_experts_over_ranks() -> None:
    """1F1B: the loss and all gradients are one rank's. A loss that needs the mean of all microbatches inside
    of the layers' gradients is refused."""
    config, schedule = replace(CONFIG, num_layers=3), one_f_one_b(2, 2)
    trial = Trial(config, 4, 5, 2)
    args = trial.ids, trial.labels, reference.tree(trial.weights, config), trial.start
    mesh, layout = Mesh(pp=2, ep=2), Layout.parse("L=pp,B=mb,E=ep")
    value, grads = simulate(value_and_grad(loss), layout, *args, mesh=mesh, schedule=schedule, config=config)
    wanted, truth = simulate(value_and_grad(loss), Layout(), *args, mesh=Mesh(), config=config)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=0)
    for (path, a), (_, b) in zip(leaf_values(grads, ""), leaf_values(truth, ""), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=path)
    with pytest.raises(SpecError, match="which all microbatches have to come to first"):
        simulate(value_and_grad(loss), layout, *args, mesh=mesh, schedule=schedule,
                 config=replace(config, balance=0.5))


# -- from folders --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers saves: each matrix of each expert a tensor."""
    path = tmp_path_factory.mktemp("mixtral")
    model = reference.to_transformers(reference.random_weights(CONFIG, 3, torch.float32), CONFIG)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def fused(apart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All experts of a layer in one tensor, gate and up side by side."""
    path = tmp_path_factory.mktemp("fused")
    model = reference.to_transformers(reference.random_weights(CONFIG, 3, torch.float32), CONFIG)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path / "model.safetensors")
    (path / "config.json").write_text((apart / "config.json").read_text())
    return path


@pytest.mark.parametrize("folder", ("apart", "fused"))
@pytest.mark.parametrize("mesh, layout", (("", ""), ("ep=3", "E=ep"), ("dp=2,tp=2", "B=dp,E=dp/tp,K=tp"),
                                          ("ep=2,tp=3", "E=ep,K=tp,F=tp,V=tp")))
def test_each_rank_reads_its_own_experts(folder: str, mesh: str, layout: str, request: pytest.FixtureRequest,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, read = open_checkpoint(request.getfixturevalue(folder)), []
    assert config_of(checkpoint) == CONFIG
    before = files._Files.read
    monkeypatch.setattr(files._Files, "read", lambda self, file, offsets, out: (
        read.append(out.size), before(self, file, offsets, out))[1])
    weights, at = reference.random_weights(CONFIG, 3, torch.float32), Mesh.parse(mesh)
    types = weight_types(CONFIG, Layout.parse(layout), at)
    for c in at.coordinates():
        read.clear()
        loaded = load(checkpoint, types, at, c, torch.float32)
        for path, found in loaded.items():
            assert torch.equal(found, shard_of(weights[path], types[path], at, c)), path
        assert sum(read) == 4 * sum(t.numel() for t in loaded.values())


PROMPTS, NEW = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10, 3, 1]], 8
RANKS = """
import json, sys
from shardlib import Layout, Mesh
from shardlib.distributed.runtime import connect
from shardlib.models.decoding import Model
from shardlib.models.files.model_files import open_checkpoint

made = []
with connect(Mesh(dp=2), "cpu") as runtime:
    for layout in ("B=dp,E=dp", "E=dp,K=dp,V=dp", "F=dp,K=dp,V=dp"):
        model = Model.load(open_checkpoint(sys.argv[1]), Layout.parse(layout), runtime)
        prompts, new, eos = json.loads(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
        made.append([model.generate(prompts, new).tokens, model.generate(prompts, new, eos).tokens,
                     model.generate(prompts[:1], new).tokens])
    if runtime.rank == 0:
        print(json.dumps(made))
"""


def test_greedy_tokens_on_one_rank_and_on_two(apart: Path, tmp_path: Path) -> None:
    """Those of transformers, far beyond the window; plain and packed weights, experts over dp, over tp, and
    by tp; where rows end at different times, and where the second of two dp ranks has none."""
    theirs, wanted = reference.to_transformers(reference.random_weights(CONFIG, 3, torch.float32), CONFIG), []
    for prompt in PROMPTS:
        wanted.append(theirs.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False,
                                      pad_token_id=0)[0].tolist())
    with connect(Mesh(), "cpu") as runtime:
        model = Model.load(open_checkpoint(apart), Layout(), runtime)
        assert model.generate(PROMPTS, NEW).tokens == wanted
        drawn = model.generate(PROMPTS, NEW, sampling=Sampling(1.5, 0.9, 3)).tokens
        packed = model.pack()
        assert packed.generate(PROMPTS, NEW).tokens == wanted
        assert packed.generate(PROMPTS, NEW, sampling=Sampling(1.5, 0.9, 3)).tokens == drawn != wanted
    eos = [wanted[0][len(PROMPTS[0]) + 1]]
    ended = [made[:next((i + 1 for i in range(len(p), len(made)) if made[i] in eos), None)]
             for p, made in zip(PROMPTS, wanted)]
    assert len({len(made) - len(p) for p, made in zip(PROMPTS, ended)}) > 1
    (tmp_path / "ranks.py").write_text(RANKS)
    finished = ranks(2, [tmp_path / "ranks.py", apart, json.dumps(PROMPTS), str(NEW), json.dumps(eos)])
    assert (finished.returncode, finished.stderr) == (0, "")
    assert json.loads(finished.stdout) == [[wanted, ended, wanted[:1]]] * 3


# -- what is refused, in whole -------------------------------------------------------------------------------

HF = {"model_type": "mixtral", "vocab_size": 19, "hidden_size": 12, "intermediate_size": 10,
      "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 5,
      "num_experts_per_tok": 2, "max_position_embeddings": 64, "head_dim": 4}


@pytest.mark.parametrize("more, says", (
    ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6, of 5 experts"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which is not implemented; it may be 'silu'"),
))
def test_a_config_that_is_not_implemented_says(more: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        config_from_hf({**HF, **more})
    assert str(caught.value) == f"config.json: {says}"


def test_a_window_as_long_as_the_context_is_none() -> None:
    assert config_from_hf({**HF, "sliding_window": 64}) == config_from_hf(HF)
    assert config_from_hf({**HF, "sliding_window": 63}) == replace(config_from_hf(HF), window=63)


def test_the_loss_is_balanced_where_transformers_would() -> None:
    for said, balance in (({}, 0.0), ({"output_router_logits": True}, 1e-3),
                          ({"router_aux_loss_coef": 0.5}, 0.0),
                          ({"router_aux_loss_coef": 0.5, "output_router_logits": True}, 0.5),
                          ({"router_aux_loss_coef": 0.0, "output_router_logits": True}, 0.0)):
        assert config_from_hf({**HF, **said}).balance == balance


def test_no_kernel_takes_a_step_whose_window_it_would_not_see() -> None:
    def taken(config: MixtralConfig) -> bool:
        step = lower(next_token, Layout(), mesh=Mesh(), passes=PASSES, config=config)
        return "fused(cached_attention" in str(step)
    assert taken(replace(CONFIG, window=None)) and not taken(CONFIG)
