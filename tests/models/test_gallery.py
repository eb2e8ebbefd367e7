"""The gallery: logits and gradients of small random models are those of transformers, under every layout.

On one rank in float64. Where transformers has float32 all the same (rotary tables, as we do; a softmax, a
scan), twice the error that it makes in float32 is allowed. Under the layouts the numbers are those of one
rank, to rounding.
"""
from __future__ import annotations

import copy
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gallery_models import MODELS, constants

from shardlib import Layout, Mesh, sharded, simulate, value_and_grad
from shardlib.functions import sum
from shardlib.models.files.checkpoint import Checkpoint, CheckpointError, TensorEntry
from shardlib.models.files.model_files import open_checkpoint
from shardlib.models.files.weights import Weight, load_weights
from shardlib.models.gallery import EXPERTS, LAYOUTS, PAGES, Page, config_of, load
from shardlib.params import leaf_values
from shardlib.spec import parse

pytestmark = pytest.mark.usefixtures("one_thread")

class Trial(NamedTuple):
    """A model as a page, what goes in, and what transformers gives in float64 and float32: logits, gradients.

    The loss is the sum of the logits, each weighed by `by`: its derivative by that are the logits.
    """
    page: Page
    config: Any
    w: Any
    given: list[torch.Tensor]
    by: torch.Tensor
    truth: list[torch.Tensor]
    rounded: list[torch.Tensor]


def trial(name: str, folder: Path) -> Trial:
    torch.manual_seed(0)
    model, page = MODELS[name]().eval(), PAGES[name]
    if name != "mamba2":
        model.set_attn_implementation("eager")
    for p in (*model.parameters(), *constants(model)):
        torch.nn.init.normal_(p, std=0.4)
    given = [torch.randn(3, 3, 6, 6) if name == "vit" else torch.randint(13, (3, 5))]
    given += [torch.randint(13, (3, 7))] * (name == "t5")
    words = ("input_ids", "decoder_input_ids") if name == "t5" else (model.main_input_name,)
    by = torch.randn(model(**dict(zip(words, given))).logits.shape, dtype=torch.float64)

    def held(model: Any) -> Any:
        model.save_pretrained(folder)
        return load(page, open_checkpoint(folder), Layout(), Mesh(), {}, torch.float64)

    def said(dtype: torch.dtype) -> list[torch.Tensor]:
        """The gradients go the way of the weights into our names and dims."""
        mine = copy.deepcopy(model).to(dtype)
        taken = [x.to(dtype) if x.is_floating_point() else x for x in given]
        logits = mine(**dict(zip(words, taken))).logits
        (logits * by.to(dtype)).sum().backward()
        for p in mine.parameters():
            p.data = torch.zeros_like(p) if p.grad is None else p.grad
        for p in constants(mine):
            p.zero_()
        return [logits.detach().double(), *(x for _, x in leaf_values(held(mine), ""))]
    truth, rounded = said(torch.float64), said(torch.float32)
    config, w = config_of(page, open_checkpoint(folder)), held(model)
    given = [x.double() if x.is_floating_point() else x for x in given]
    return Trial(page, config, w, given, by, truth, rounded)


def ran(trial: Trial, mesh: Mesh, layout: Layout) -> list[torch.Tensor]:
    """Logits and gradients, by one program."""
    page, given = trial.page, trial.given

    def weighed(by, logits):
        return sum(f"{page.gives} -> ()", by * logits)
    loss = sharded(f"{page.takes}, {page.gives}, * -> ()")(
        (lambda x, by, w, *, config: weighed(by, page.logits(x, w, config=config))) if len(given) == 1
        else lambda x, y, by, w, *, config: weighed(by, page.logits(x, y, w, config=config)))
    _, logits, grads = simulate(value_and_grad(loss, wrt=("by", "w")), layout, *given, trial.by, trial.w,
                                mesh=mesh, config=trial.config)
    return [logits, *(x for _, x in leaf_values(grads, ""))]


def error(found: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The largest, relative to the largest of its tensor, but to no less than 1e-3 of the largest of all."""
    least = 1e-3 * max(float(t.abs().max()) for t in truth)
    return max(float((a - t).abs().max() / t.abs().max().clamp(min=least))
               for a, t in zip(found, truth, strict=True))


def test_every_page_is_tried_and_none_names_an_axis() -> None:
    assert MODELS.keys() == PAGES.keys() and len(LAYOUTS) >= 8
    for page in PAGES.values():
        text = Path(sys.modules[page.params.__module__].__file__).read_text()
        assert not re.search(r"[A-Z]/(?!1)|EXPLICIT|Layout|Mesh", text)


def test_the_table_of_the_gallery_is_made_from_it() -> None:
    path = Path(__file__).parents[2] / "docs" / "make_gallery.py"
    spec = importlib.util.spec_from_file_location("make_gallery", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "python docs/make_gallery.py"


def test_leaves_that_share_a_tensor() -> None:
    """Where q, k and v do not fill it, the message says what should lie there."""
    entry = TensorEntry("qkv", "m", 0, (7, 3), "F32", 1, 4)
    checkpoint = Checkpoint("huggingface", {"m": 84}, {"qkv": entry}, {})
    rows = [Weight("k", "D K H", "qkv", "(K H) D", beside="K G H, K H, K H", part=1)]
    with pytest.raises(CheckpointError) as error:
        sizes = dict(D=3, K=1, G=2, H=2)
        load_weights(checkpoint, rows, sizes, {"k": parse("D K H")}, Mesh(), {}, torch.float64)
    assert str(error.value) == ('weight k: tensor qkv should be "(K H) D" beside K G H, K H, K H with K=1 '
                                'H=2 D=3, so (8, 3); it is (7, 3)')


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    it = trial(name, tmp_path)
    one = ran(it, Mesh(), Layout())
    allowed = 1e-12 if name in ("gpt2", "bert") else 2 * error(it.rounded, it.truth)
    assert error(one, it.truth) <= allowed < 1e-4
    for what, (mesh, layout) in {**LAYOUTS, **(EXPERTS if "E" in it.config.sizes else {})}.items():
        assert error(ran(it, mesh, layout), one) < 1e-12, what
