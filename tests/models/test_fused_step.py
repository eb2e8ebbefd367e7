"""A decoding step by kernels, those of one device run by the interpreter: its logits and cache are those of
the bodies, and of plain attention over what the tokens were."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from rounded import rounded
from torch import Tensor

from shardlib import Layout, Mesh, init, lower
from shardlib.api import compile
from shardlib.compiler.fusion import Fusion, Product, Site
from shardlib.compiler.passes import DEFAULT
from shardlib.compiler.passes.fuse import fuse, fusion_report
from shardlib.models.causal import Cache, KeyValue
from shardlib.models.decoding import PASSES, weights_of
from shardlib.models.llama import (
    LlamaConfig,
    next_logits,
    next_token,
    prompt_logits,
    prompt_token,
)
from shardlib.ops import fusions
from shardlib.ops.fusions import (
    by_choice,
    by_communicator,
    by_few_rows,
    by_norm,
    by_one_kernel,
    by_pointwise,
    by_rope,
)
from shardlib.params import leaf_values
from shardlib.triton_kernels.cached_attention import cached_attention_reference
from shardlib.triton_kernels.rope_into_cache import rope_into_cache_reference

CONFIG = LlamaConfig(vocab_size=48, d_model=32, num_layers=2, num_kv_heads=2, queries_per_kv=2, head_dim=16,
                     d_ff=32, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=False, max_context=16)
ROWS, SLOTS, STEPS = 3, 8, 4
KINDS = "q, k, v and the cache are not of one dtype of 16 or 32 bits"


@pytest.fixture
def on_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, ...]]:
    """The passes of `generate`, their kernels asked as on a GPU."""
    def site(asked: Site) -> Any:
        return by_one_kernel(replace(asked, device="cuda"))

    def norm(asked: Site) -> Any:
        return by_norm(replace(asked, device="cuda"))

    def pointwise(asked: Site) -> Any:
        return by_pointwise(replace(asked, device="cuda"))

    def sums(asked: Site) -> Any:
        return by_communicator(replace(asked, device="cuda"))

    def rope(asked: Site) -> Any:
        return by_rope(replace(asked, device="cuda"))

    def choice(asked: Site) -> Any:
        return by_choice(replace(asked, device="cuda"))

    def product(asked: Product) -> Any:
        return by_few_rows(replace(asked, device="cuda"))
    monkeypatch.setattr(fusions, "counts_of", lambda device: None)
    monkeypatch.setattr(fusions, "attends_cached", lambda *operands: True)
    monkeypatch.setattr(fusions, "has_room", lambda device: True)
    as_on_a_gpu = {by_one_kernel: site, by_norm: norm, by_communicator: sums,
                   by_pointwise: pointwise, by_rope: rope, by_choice: choice}
    table = [Fusion(f.function, kernel=as_on_a_gpu.get(f.kernel, f.kernel)) for f in fusions.FUSIONS]
    with rounded():
        yield (*DEFAULT, "rotate_scan", *fuse(table, product))


def decode(passes: Any, dtype: torch.dtype, tokens: Tensor, start: Tensor,
           axis: str) -> tuple[list[Tensor], Any, Any]:
    """Logits of each step, the cache after them, and the compiled step."""
    torch.manual_seed(0)
    weights = init(weights_of(CONFIG), CONFIG.sizes, dtype=dtype)
    mesh, layout = (Mesh(tp=1), Layout(K="tp", F="tp", V="tp")) if axis else (Mesh(), Layout())
    step = compile(next_logits, layout, mesh=mesh, donate=("cache",), passes=passes, sizes=dict(S=SLOTS),
                   config=CONFIG)
    shape = (CONFIG.num_layers, ROWS, SLOTS, CONFIG.num_kv_heads, CONFIG.head_dim)
    cache = Cache(layers=KeyValue(k=torch.randn(shape).to(dtype), v=torch.randn(shape).to(dtype)))
    step.lower(None, weights_of(CONFIG))
    packed = step.prepare("w", dict(leaf_values(weights, "w")), weights_of(CONFIG))
    seen, logits = step.prepare("cache", cache), []
    with torch.inference_mode():
        for i, ids in enumerate(tokens.unbind(1)):
            made, seen = step(ids[:, None], packed, seen, start + i, torch.zeros_like(start))
            logits.append(made.float())
    return logits, seen, step


@pytest.mark.parametrize("dtype, error, axis", [
    (torch.float32, 2e-6, ""), (torch.float16, 2e-3, ""), (torch.bfloat16, 1.5e-2, ""),
    (torch.float16, 2e-3, "tp")])
def test_kernels_give_the_logits_of_the_bodies(on_one: Any, dtype: torch.dtype, error: float,
                                               axis: str) -> None:
    """Over an axis of one rank, too, whose sums are its own."""
    tokens = torch.randint(CONFIG.vocab_size, (ROWS, STEPS))
    start = torch.tensor([0, 2, SLOTS - STEPS])
    plain, kept, _ = decode(DEFAULT, dtype, tokens, start, axis)
    found, cache, step = decode(on_one, dtype, tokens, start, axis)
    answers = {a.partition(" at ")[0].partition(":")[0]: a.rpartition(": ")[2] for a in step.kernels.answers}
    norms = "all_reduce_add_rms_norm" if axis else "add_rms_norm"
    assert answers["cached_attention"] == answers[norms] == "by a kernel"
    matmuls = {a for name, a in answers.items() if name.startswith("matmul")}
    assert matmuls == ({"by a kernel"} if dtype != torch.float32 else
                       {"no kernel multiplies float32 on cuda"})
    for a, b in zip(plain, found):
        assert (a - b).abs().max() <= error * a.abs().max()
    for a, b in zip(kept.flat, cache.flat):
        for one, other in zip(a, b):
            assert (one.float() - other.float()).abs().max() <= error * one.float().abs().max()
    (code,) = step.sources.values()
    assert code.count("look(") == 1 and "scatter_" not in code and ".clone()" not in code


@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)])
def test_the_beginning_of_prompts_by_kernels(on_one: Any, dtype: torch.dtype, error: float) -> None:
    """Logits and caches near those of the bodies; slots that no token has are as they were."""
    made, ids, last = [], torch.randint(CONFIG.vocab_size, (ROWS, SLOTS - 1)), torch.tensor([0, 3, SLOTS - 2])
    for passes in (DEFAULT, on_one):
        torch.manual_seed(0)
        weights = init(weights_of(CONFIG), CONFIG.sizes, dtype=dtype)
        step = compile(prompt_logits, Layout(), mesh=Mesh(), donate=("cache",), passes=passes,
                       sizes=dict(S=SLOTS), config=CONFIG)
        shape = (CONFIG.num_layers, ROWS, SLOTS, CONFIG.num_kv_heads, CONFIG.head_dim)
        cache = Cache(layers=KeyValue(k=torch.ones(shape).to(dtype), v=torch.ones(shape).to(dtype)))
        with torch.inference_mode():
            logits, cache = step(ids, weights, cache, torch.zeros_like(last), last)
        made.append((logits.float(), cache.layers.k, cache.layers.v))
    (plain, *kept), (found, *others) = made
    assert (plain - found).abs().max() <= error * plain.abs().max()
    for a, b in zip(kept, others):
        assert (a - b).float().abs().max() <= error * a.float().abs().max() and (b[:, :, -1] == 1).all()
    answers = {a.partition(" at ")[0].partition(":")[0]: a.rpartition(": ")[2] for a in step.kernels.answers}
    assert answers["rope_into_cache"] == "by a kernel"


def test_the_beginning_of_prompts_is_fused() -> None:
    """Besides attention and matmuls."""
    for mesh, layout in ((Mesh(), Layout()), (Mesh(tp=2), Layout(K="tp", F="tp", V="tp"))):
        program = lower(prompt_token, layout, None, weights_of(CONFIG), mesh=mesh, passes=PASSES,
                        config=CONFIG)
        body = next(b for b in program.bodies() if b.name == "prompt_block")
        assert {s.op.name for s in body.steps} == {"fused", "einsum", "rename", "attention"}
        names = [s.bodies[0].name for s in body.steps if s.op.name == "fused"]
        assert names.count("rope_into_cache") == 1 and len(names) == 4


@pytest.mark.parametrize("changed, said", [
    (dict(device="cpu"), "no kernel turns on cpu"), (dict(h=15), "8 heads of 15"),
    (dict(h=4096), "8 heads of 4096"), (dict(cache=torch.float32), KINDS), (dict(angles=torch.bfloat16),
                                                                             "the angles are bfloat16"),
    ({}, "taken")])
def test_what_turns(changed: dict[str, Any], said: str) -> None:
    given = dict(device="cuda", h=128, angles=torch.float32, cache=torch.bfloat16) | changed
    b, t, k, g, h, s = 2, 5, 2, 4, given["h"], 8
    shapes = ((b, t, k, g, h), (b, t, k, h), (b, t, k, h), (b, t, h), (b, s, k, h), (b, s, k, h), (b,))
    dtypes = (*[torch.bfloat16] * 3, given["angles"], given["cache"], given["cache"], torch.int64)
    operands = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in zip(shapes, dtypes)]
    found = by_rope(Site(fusions.rope_into_cache, given["device"], operands, {}))
    assert (found if isinstance(found, str) else "taken") == said


def test_what_lies_otherwise_is_turned_by_torch() -> None:
    """Heads that lie apart, and what wants a derivative."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 2, 2, 8), torch.randn(2, 2, 3, 8).transpose(1, 2), torch.randn(2, 3, 2, 8)
    angles, start = torch.randn(2, 3, 8), torch.tensor([0, 1])
    keys, values = torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    turn = by_rope(Site(fusions.rope_into_cache, "cuda", (q, k, v, angles, keys, values, start), {}))
    want = rope_into_cache_reference(q, k, v, angles, keys, values, start)
    assert all(map(torch.equal, turn(q, k, v, angles, keys, values, start), want))
    turn(q.requires_grad_(), k.contiguous(), v, angles, keys, values, start)[0].sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("device, shape, dtype, said", [
    ("cpu", (3, 8), torch.float32, "no kernel chooses on cpu"),
    ("cuda", (3, 0), torch.float32, "no kernel chooses among 0 float32"),
    ("cuda", (3, 8), torch.float64, "no kernel chooses among 8 float64"),
    ("cuda", (2, 3, 8), torch.bfloat16, "taken")])
def test_what_chooses(device: str, shape: tuple[int, ...], dtype: torch.dtype, said: str) -> None:
    site = Site(fusions.row_argmax, device, (torch.empty(shape, dtype=dtype, device="meta"),), {})
    found = by_choice(site)
    assert (found if isinstance(found, str) else "taken") == said
    if said == "taken":                     # over one rank the choice is the rank's own
        assert callable(by_communicator(replace(site, function=fusions.split_argmax, ranks=1)))


def test_the_step_of_a_llama_is_all_fused() -> None:
    """Between matmuls nothing is left but fused steps, in a layer."""
    for mesh, layout in ((Mesh(), Layout()), (Mesh(dp=2), Layout(B="dp")),
                         (Mesh(tp=2), Layout(K="tp", F="tp", V="tp")),
                         (Mesh(tk=2, tg=2), Layout(K="tk", G="tg", F=("tk", "tg"), V=("tk", "tg")))):
        program = lower(next_token, layout, None, weights_of(CONFIG), mesh=mesh, passes=PASSES, config=CONFIG)
        body = next(b for b in program.bodies() if b.name == "cached_block")
        assert {s.op.name for s in body.steps} <= {"fused", "einsum"}, fusion_report(program)
        assert sum(s.op.name == "fused" for s in body.steps) == 4
        chosen = [s.bodies[0].name for s in program.steps if s.op.name == "fused"][-1]
        assert (chosen == "split_argmax") == bool(layout.entries.get("V")), chosen


@pytest.mark.parametrize("changed, said", [
    (dict(device="cpu"), "no kernel attends on cpu"),
    (dict(t=17), "more than 64 queries of a kv head"), (dict(h=258), "heads of 258 bfloat16"),
    (dict(h=15), "heads of 15 bfloat16"), (dict(t=2, h=130), "heads of 130 bfloat16"),
    (dict(dtype=torch.float64, h=16), KINDS), (dict(cache=torch.float32), KINDS),
    (dict(angles=torch.bfloat16), "the angles are bfloat16"), ({}, "taken")])
def test_what_the_kernel_takes(changed: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusions, "has_room", lambda device: True)
    given = dict(device="cuda", t=1, h=128, dtype=torch.bfloat16, angles=torch.float32) | changed
    b, t, k, g, h, s = 2, given["t"], 2, 4, given["h"], 8
    kept = given.get("cache", given["dtype"])
    shapes = ((b, t, k, g, h), (b, t, k, h), (b, t, k, h), (b, t, h), (b, s, k, h), (b, s, k, h), (b,))
    dtypes = (*[given["dtype"]] * 3, given["angles"], kept, kept, torch.int64)
    operands = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in zip(shapes, dtypes)]
    found = by_one_kernel(Site(fusions.cached_attention, given["device"], operands, {}))
    assert (found if isinstance(found, str) else "taken") == said


@pytest.mark.parametrize("device, shape, dtypes, said", [
    ("cpu", (3, 8), "bb", "no kernel gates on cpu"),
    ("cuda", (), "bb", "gate and up are no rows of one dtype of 16 or 32 bits"),
    ("cuda", (3, 8), "bf", "gate and up are no rows of one dtype of 16 or 32 bits"),
    ("cuda", (3, 8), "dd", "gate and up are no rows of one dtype of 16 or 32 bits"),
    ("cuda", (3, 8), "bb", "taken")])
def test_what_the_gate_takes(device: str, shape: tuple[int, ...], dtypes: str, said: str) -> None:
    kinds = {"b": torch.bfloat16, "f": torch.float32, "d": torch.float64}
    gate, up = (torch.empty(shape, dtype=kinds[d], device="meta") for d in dtypes)
    found = by_pointwise(Site(fusions.gate_up, device, (gate, up), {}))
    assert (found if isinstance(found, str) else "taken") == said


def test_a_gate_that_wants_a_derivative_has_one() -> None:
    """By torch; and of columns that lie apart, what torch gives."""
    multiply = by_pointwise(Site(fusions.gate_up, "cuda", torch.empty(2, 3, 4).unbind(), {}))
    gate, up = torch.randn(2, 3, 4).unbind()
    want = torch.nn.functional.silu(gate) * up
    assert multiply(gate.requires_grad_(), up).requires_grad
    torch.testing.assert_close(multiply(gate.detach().mT.contiguous().mT, up), want)


@pytest.mark.parametrize("changed, said", [
    (dict(device="cpu"), "no kernel norms on cpu"), (dict(width=0), "rows of 0"),
    (dict(width=(1 << 16) + 1), "rows of 65537"),
    (dict(weight=torch.float32), "y, the residual and w are not of one dtype of 16 or 32 bits"),
    ({}, "taken")])
def test_what_the_norm_takes(changed: dict[str, Any], said: str) -> None:
    given = dict(device="cuda", width=64, weight=torch.bfloat16) | changed
    y = torch.empty((3, given["width"]), dtype=torch.bfloat16, device="meta")
    w = torch.empty(given["width"], dtype=given["weight"], device="meta")
    found = by_norm(Site(fusions.add_rms_norm, given["device"], (y, y, w), {"eps": 1e-5}))
    assert (found if isinstance(found, str) else "taken") == said


def test_where_there_is_no_room_or_a_tensor_lies_otherwise_the_cache_is_written(
        on_one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is taken when code is written, and torch runs after all."""
    tokens, start = torch.randint(CONFIG.vocab_size, (ROWS, STEPS)), torch.tensor([0, 2, SLOTS - STEPS])
    plain, kept, _ = decode(DEFAULT, torch.float32, tokens, start, "")
    monkeypatch.setattr(fusions, "attends_cached", lambda *operands: False)
    found, cache, step = decode(on_one, torch.float32, tokens, start, "")
    assert any("cached_attention" in a and "by a kernel" in a for a in step.kernels.answers)
    for a, b in zip((*plain, *(x for leaf in kept.flat for x in leaf)),
                    (*found, *(x for leaf in cache.flat for x in leaf)), strict=True):
        assert (a - b).abs().max() <= 2e-6 * a.abs().max()


def test_what_lies_otherwise_or_has_a_derivative_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor on the CPU is no kernel's; that of norms would take it, and lose its gradient."""
    shapes = ((1, 1, 2, 2, 4), (1, 1, 2, 4), (1, 1, 2, 4), (1, 1, 4), (1, 3, 2, 4), (1, 3, 2, 4))
    operands = (*map(torch.randn, shapes), torch.tensor([1]))
    site = Site(fusions.cached_attention, "cuda", operands, {})
    monkeypatch.setattr(fusions, "has_room", lambda device: False)
    assert by_one_kernel(site) == "a block of this GPU has less shared memory than the kernel takes"
    monkeypatch.setattr(fusions, "has_room", lambda device: True)
    attend = by_one_kernel(site)
    for made, wanted in zip(attend(*operands), cached_attention_reference(*operands), strict=True):
        assert torch.equal(made, wanted)
    y, residual, w = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8), torch.ones(8)
    norm = by_norm(Site(fusions.add_rms_norm, "cuda", (y, residual, w), {"eps": 1e-5}))
    total, normed = norm(y, residual, w)
    (total.sum() + normed.square().sum()).backward()
    assert torch.allclose(total, y + residual) and y.grad is not None
