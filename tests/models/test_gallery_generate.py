"""`generate` of the gallery: greedy tokens of small random models are those of transformers, in float64,
under layouts, past windows, and from prompts of unequal lengths."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gallery_models import MODELS, constants
from launching import ranks
from simulated import generate

from shardlib import Layout, Mesh
from shardlib.distributed.runtime import connect
from shardlib.models import row_groups, ways
from shardlib.models.decoding import Model, Sampling
from shardlib.models.families import config_of
from shardlib.models.files.checkpoint import Checkpoint, CheckpointError
from shardlib.models.files.model_files import open_checkpoint
from shardlib.models.gallery import PAGES, load

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS, NEW = [[1, 2, 3, 4, 5], [6, 7], [3]], 4
CAUSAL = sorted(page.name for page in PAGES.values() if page.lm)
TENSORS = Mesh(x=2), Layout(K="x", F="x", V="x", E="x")
TIME = Mesh(x=2, y=2), Layout(B="x", S="y", T="y")              # a cache of which each rank has some slots


def saved(name: str, folder: Path, seed: int = 3) -> Any:
    """transformers' model, in float64, its weights in a folder."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    for p in (*model.parameters(), *constants(model)):
        torch.nn.init.normal_(p, std=0.4)
    model.save_pretrained(folder)
    return model.double()


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """Without a cache, so that each token is by all before it."""
    ids = torch.tensor([prompt])
    for _ in range(NEW):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0].tolist()


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model, page = saved(name, tmp_path), PAGES[name]
    wanted, checkpoint = [greedy(model, prompt) for prompt in PROMPTS], open_checkpoint(tmp_path)
    config, w = config_of(checkpoint), load(page, checkpoint, Layout(), Mesh(), {}, torch.float64)
    both = name in ("deepseek_v3", "gemma2")
    for mesh, layout in (TENSORS, TIME) if both else (TENSORS, TIME)[len(name) % 2:][:1]:
        layout = Layout({dim: axes for dim, axes in layout.entries.items() if dim in {*config.sizes, *"BST"}})
        assert generate(w, config, layout, mesh, PROMPTS, NEW) == wanted, layout


@pytest.mark.parametrize("layout, chunk", [("K=x,G=y,V=x", 2), ("B=x,T=y", 2), ("N=x,O=y,H=y", 3)])
def test_a_state_is_told_where_rows_end(layout: str, chunk: int, mamba2: tuple) -> None:
    """Of prompts in chunks, which have padding behind the ends of rows, or nothing else."""
    config, w, wanted = mamba2
    assert generate(w, config, Layout.parse(layout), Mesh(x=2, y=2), PROMPTS, NEW, chunk=chunk) == wanted


@pytest.mark.parametrize("graph", (False, True))
def test_a_state_goes_with_its_row(graph: bool, mamba2: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """In buckets of rows, in chunks and halves of tokens, into smaller buckets as other rows end; the next
    batch finds nothing of it."""
    config, w, _ = mamba2
    prompts = [[n * n % 13 for n in range(length)] for length in (37, 33, 17, 16, 3)]
    ends, drawn = {2, 5, 9}, Sampling(2.0, seed=3)
    wanted = generate(w, config, Layout(), Mesh(), prompts, 9, ends, drawn)
    assert len({len(tokens) - len(prompt) for tokens, prompt in zip(wanted, prompts)}) > 3
    monkeypatch.setattr(PAGES["mamba2"].lm, "chunk", 4)
    for name in ("WORTH_MOVING", "WORTH_CAPTURING"):
        monkeypatch.setattr(row_groups, name, 1)
    monkeypatch.setattr(ways, "BESIDE_BYTES", {"rows": {}, "tokens": {"cpu": -1}})
    with connect(Mesh(), "cpu") as runtime:
        model = Model(config, w, Layout(), runtime, torch.float64)
        assert model.decoder(drawn, graph).prompts(5, 37, 9).sizes["T"] == 2        # of each half
        for _ in range(2):
            assert model.generate(prompts, 9, ends, drawn, graph=graph).tokens == wanted


@pytest.fixture(scope="module")
def mamba2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, list[list[int]]]:
    """Config, weights, and what it makes of the prompts."""
    folder = tmp_path_factory.mktemp("mamba2")
    model, page, checkpoint = saved("mamba2", folder, 2), PAGES["mamba2"], open_checkpoint(folder)
    return (config_of(checkpoint), load(page, checkpoint, Layout(), Mesh(), {}, torch.float64),
            [greedy(model, prompt) for prompt in PROMPTS])


RANKS = """
import json, sys
import torch
from shardlib import Layout, Mesh
from shardlib.distributed.runtime import connect
from shardlib.models.decoding import Model, Sampling
from shardlib.models.files.checkpoint import Checkpoint, CheckpointError
from shardlib.models.files.model_files import open_checkpoint

folders, prompts, new = json.loads(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
with connect(Mesh(tp=2), "cpu") as runtime:
    models = [Model.load(open_checkpoint(f), Layout.parse("K=tp,F=tp,V=tp"), runtime, torch.float64)
              for f in folders]
    made = [[model.generate(prompts, new).tokens, model.pack().generate(prompts, new).tokens]
            for model in models]
    if runtime.rank == 0:
        print(json.dumps(made))
"""


def test_two_ranks_generate(tmp_path: Path) -> None:
    """Over gloo, plain and packed: caches of latents, of pairs of layers."""
    names, wanted = ("deepseek_v3", "gemma2"), []
    for name in names:
        model = saved(name, tmp_path / name)
        wanted.append([[greedy(model, prompt) for prompt in PROMPTS]] * 2)
    (tmp_path / "ranks.py").write_text(RANKS)
    folders = json.dumps([str(tmp_path / name) for name in names])
    finished = ranks(2, [tmp_path / "ranks.py", folders, json.dumps(PROMPTS), str(NEW)])
    assert (finished.returncode, finished.stderr) == (0, "")
    assert json.loads(finished.stdout) == wanted


def test_a_model_that_does_not_generate_says_so() -> None:
    for name in ("bert", "vit", "nosuch"):
        with pytest.raises(CheckpointError) as error:
            config_of(Checkpoint("huggingface", {}, {}, {"model_type": name}))
        assert str(error.value) == (
            f"config.json: model_type is '{name}', which does not generate here; it is one of llama, "
            "mixtral, gpt2, mistral, qwen2, qwen3, olmo2, phi3, gemma2, mamba2, qwen3_moe, olmoe, "
            "deepseek_v3")
