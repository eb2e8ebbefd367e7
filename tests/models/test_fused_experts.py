"""A decoding step of Mixtral by kernels, those of experts run by the interpreter: its logits are those of the
bodies; what the kernels take, and what they leave to torch."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rounded import rounded

from shardlib import Layout, Mesh, lower
from shardlib.api import compile
from shardlib.compiler.fusion import Fusion, Site
from shardlib.compiler.passes import DEFAULT
from shardlib.compiler.passes.fuse import fuse, fusion_report
from shardlib.models.causal import Cache, KeyValue
from shardlib.models.decoding import PASSES, weights_of
from shardlib.models.mixtral import MixtralConfig, next_logits, next_token
from shardlib.models.random_weights import random_weights
from shardlib.ops import expert_ffn
from shardlib.ops.expert_ffn import FORMS, by_few_tokens
from shardlib.ops.fusions import FUSIONS
from shardlib.triton_kernels.expert_ffn import expert_ffn_reference

CONFIG = MixtralConfig(vocab_size=48, d_model=32, num_layers=2, num_kv_heads=2, queries_per_kv=2, head_dim=16,
                       d_ff=48, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=False, max_context=16,
                       num_experts=5, top_k=2)
ROWS, SLOTS = 3, 8


@pytest.mark.parametrize("entries, form", [
    ({}, "expert_ffn"), ({"E": "x"}, "expert_ffn_by_experts"), ({"F": "x"}, "expert_ffn_by_width"),
    ({"E": "x", "F": "y"}, "expert_ffn_by_both"), ({"E": ("x", "y"), "K": "x"}, "expert_ffn_by_experts")])
def test_the_experts_of_a_mixtral_are_one_step(entries: dict[str, Any], form: str) -> None:
    """Experts are one step, under every split of them and of their width."""
    program = lower(next_token, Layout(entries), None, weights_of(CONFIG), mesh=Mesh(x=2, y=2), passes=PASSES,
                    config=CONFIG)
    body = next(b for b in program.bodies() if b.name == "cached_block")
    names = [s.bodies[0].name for s in body.steps if s.op.name == "fused"]
    assert names.count(form) == names.count("cached_attention") == 1, fusion_report(program)
    assert not {s.op.name for s in body.steps} & {"dispatch", "grouped_einsum", "combine"}


@pytest.fixture
def on_one(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """The passes of `generate`, the kernel of experts asked as on a GPU."""
    monkeypatch.setattr(expert_ffn, "counts_of", lambda device: torch.zeros(64, dtype=torch.int32))
    monkeypatch.setattr(expert_ffn, "has_room", lambda device: True)
    table = [Fusion(f.function, kernel=lambda site: by_few_tokens(replace(site, device="cuda")))
             if f.function in FORMS else Fusion(f.function) for f in FUSIONS]
    return (*DEFAULT, "rotate_scan", *fuse(table))


def logits(passes: Any, dtype: torch.dtype) -> tuple[torch.Tensor, Any]:
    """After a token at each of three places, and the compiled step."""
    step = compile(next_logits, Layout(E="x", F="y"), mesh=Mesh(x=1, y=1), donate=("cache",), passes=passes,
                   sizes=dict(S=SLOTS), config=CONFIG)
    torch.manual_seed(0)
    shape = (CONFIG.num_layers, ROWS, SLOTS, CONFIG.num_kv_heads, CONFIG.head_dim)
    cache = Cache(layers=KeyValue(k=torch.randn(shape).to(dtype), v=torch.randn(shape).to(dtype)))
    step.lower(None, weights_of(CONFIG))
    types = {path[2:]: kind for path, kind in step.program.arg_leaves() if path.startswith("w.")}
    drawn = random_weights(CONFIG, types, Mesh(x=1, y=1), dict(x=0, y=0), dtype, torch.device("cpu"))
    packed = step.prepare("w", {f"w.{path}": w for path, w in drawn.items()}, weights_of(CONFIG))
    with torch.inference_mode():
        made, _ = step(torch.tensor([[1], [20], [40]]), packed, step.prepare("cache", cache),
                       torch.tensor([0, 2, 7]), torch.zeros(ROWS, dtype=torch.int64))
    return made.float(), step


@pytest.mark.parametrize("dtype, error", [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_kernels_give_the_logits_of_the_bodies(on_one: Any, dtype: torch.dtype, error: float) -> None:
    """And nobody looks at experts that `route` has chosen."""
    with rounded():
        plain, _ = logits(DEFAULT, dtype)
        found, step = logits(on_one, dtype)
    answers = [a for a in step.kernels.answers if a.startswith("expert_ffn")]
    assert [a.rpartition(": ")[2] for a in answers] == ["by a kernel"] and "_by_both at" in answers[0]
    assert (plain - found).abs().max() <= error * plain.abs().max()
    (code,) = step.sources.values()
    assert ".look(" not in code and "each_once" not in code


def site(**changed: Any) -> Site:
    given = dict(device="cuda", t=4, e=2, dtype=torch.bfloat16, weights=torch.float32, up=None) | changed
    t, e, j, d, f = given["t"], given["e"], 2, 32, 24
    shapes = ((1, t, d), (1, t, j), (1, t, j), (e, d, f), (e, d, f), (e, f, d))
    dtypes = (given["dtype"], torch.int64, given["weights"], given["dtype"], given["up"] or given["dtype"],
              given["dtype"])
    operands = [torch.empty(shape, dtype=kind, device="meta") for shape, kind in zip(shapes, dtypes)]
    return Site(FORMS[1], given["device"], operands, {}, begins=[(0,) * 3] * 3 + [(3, 0, 0)] * 3)


@pytest.mark.parametrize("changed, said", [
    (dict(device="cpu"), "no kernel has experts on cpu"),
    (dict(t=129), "129 tokens, and the kernels take 1 to 128"),
    (dict(e=0), "no experts here, or none that a kernel takes"),
    (dict(dtype=torch.float32), "tokens and experts are not of one dtype of 16 bits"),
    (dict(up=torch.float16), "tokens and experts are not of one dtype of 16 bits"),
    (dict(weights=torch.float64), "the weights are float64"), ({}, "taken")])
def test_what_the_kernels_take(changed: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_ffn, "has_room", lambda device: True)
    found = by_few_tokens(site(**changed))
    assert (found if isinstance(found, str) else "taken") == said


def test_what_has_a_derivative_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this rank's experts, which begin with the third."""
    monkeypatch.setattr(expert_ffn, "has_room", lambda device: False)
    assert by_few_tokens(site()) == "a block of this GPU has less shared memory than the kernels take"
    monkeypatch.setattr(expert_ffn, "has_room", lambda device: True)
    monkeypatch.setattr(expert_ffn, "counts_of", lambda device: torch.zeros(64, dtype=torch.int32))
    run = by_few_tokens(site(dtype=torch.float16))
    x, w = torch.randn(1, 4, 32).half(), torch.rand(1, 4, 2)
    chosen = torch.tensor([[[0, 3], [4, 3], [1, 2], [2, 4]]])
    gate, up, down = (torch.randn(2, *s).half() / 5 for s in ((32, 24), (32, 24), (24, 32)))
    want = expert_ffn_reference(x[0], chosen[0], w[0], gate, up, down, 3)
    assert run(x.requires_grad_(), chosen, w, gate, up, down).requires_grad
    made = run(x.detach(), chosen, w, gate, up, down)
    torch.testing.assert_close(made, want[None], rtol=4e-3, atol=4e-3)
    assert (made[0, 2] == 0).all() and (want[2] == 0).all()
