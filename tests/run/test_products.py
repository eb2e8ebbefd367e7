"""Kernels of matmuls: who takes x @ w where w lies by columns, and the fused step behind it along.

The kernels here are made up: they multiply as torch does, and say that they were called.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shardlib import EXPLICIT, Mesh, Params, compile, einsum, param, scan, sharded, stacked
from shardlib.compiler.fusion import Fusion, Product
from shardlib.compiler.passes import DEFAULT
from shardlib.compiler.passes.fuse import fuse
from shardlib.functions import silu, tanh
from shardlib.ops.few_rows import FEW
from shardlib.ops.fusions import FUSIONS, by_few_rows, gate_up
from shardlib.run.compiled import Compiled

B, D, F, V, L = 3, 4, 6, 5, 2


class Layer(Params):
    gate: Tensor = param("D F")
    up: Tensor = param("D F")
    down: Tensor = param("F D")


class Net(Params):
    layers: Layer = stacked("L", Layer)
    head: Tensor = param("V D")


@sharded("B D, * -> B D")
def layer(x, w: Layer):
    gate, up = einsum("B D, D F -> B F", x, w.gate), einsum("B D, D F -> B F", x, w.up)
    return x + einsum("B F, F D -> B D", silu(gate) * up, w.down)


@sharded("B D, * -> B V")
def net(x, w: Net):
    return einsum("B D, V D -> B V", scan(layer, x, w.layers), w.head)


@sharded("B D, * -> B D")
def looks_again(x, w: Layer):
    """The gate is used twice: it has to be there."""
    gate, up = einsum("B D, D F -> B F", x, w.gate), einsum("B D, D F -> B F", x, w.up)
    return x + einsum("B F, F D -> B D", silu(gate) * up + tanh(gate), w.down)


@sharded("B D, * -> B D")
def turned(x, w: Layer):
    """The one that is gated stands second: what is made side by side comes in the other order."""
    gate, up = einsum("B D, D F -> B F", x, w.gate), einsum("B D, D F -> B F", x, w.up)
    return x + einsum("B F, F D -> B D", silu(up) * gate, w.down)


def weights(dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    r = [torch.randn(shape).to(dtype) for shape in ((L, D, F), (L, D, F), (L, F, D), (V, D))]
    return Net(layers=Layer(gate=r[0], up=r[1], down=r[2]), head=r[3])


class Ran:
    """`f`, its weights packed: the result, what the kernel was asked and called with, code and answers."""

    def __init__(self, f: Any = net, dtype: torch.dtype = torch.bfloat16,
                 refuse: Callable[[Product], bool] = lambda asked: False, off: float = 0.0) -> None:
        self.asked: list[Product] = []
        self.calls: list[tuple[int, int, int, bool]] = []

        def product(asked: Product) -> Callable | str:
            self.asked.append(asked)
            gated = asked.then is gate_up

            def multiply(x: Tensor, w: Tensor) -> Tensor:
                assert w.mT.is_contiguous() and w.shape == (asked.lines, asked.columns)
                assert x.shape == (asked.rows, asked.lines)
                self.calls.append((asked.rows, asked.lines, asked.columns, gated))
                made = x @ w + off
                return torch.nn.functional.silu(made[:, :F]) * made[:, F:] if gated else made
            return "refused" if refuse(asked) else multiply
        step: Compiled = compile(f, mesh=Mesh(), passes=(*DEFAULT, *fuse(FUSIONS, product)))
        w = weights(dtype) if f is net else Scanned.of(weights(dtype), f)
        x = torch.randn(B, D).to(dtype)
        step.lower(x, w)
        self.given = step(x, step.prepare("w", w))
        self.plain = compile(f, mesh=Mesh())(x, w)
        (self.code,), self.answers = step.sources.values(), step.kernels.answers


class Scanned(Params):
    layers: Layer = stacked("L", Layer)

    @classmethod
    def of(cls, w: Net, f: Any) -> Scanned:
        return cls(layers=w.layers)


def over(f: Any) -> Any:
    """`f` as the body of a scan, whose weights are packed."""
    @sharded("B D, * -> B D")
    def run(x, w: Scanned):
        return scan(f, x, w.layers)
    return run


def test_a_kernel_takes_all_matmuls_and_the_gate_along() -> None:
    made = Ran()
    assert made.calls == [(B, D, 2 * F, True), (B, F, D, False)] * L + [(B, D, V, False)]
    assert torch.equal(made.given, made.plain)
    assert made.answers == [f"matmul of {B} x {D} x {2 * F}, gate_up: by a kernel",
                            f"matmul of {B} x {F} x {D}: by a kernel",
                            f"matmul of {B} x {D} x {V}: by a kernel"]
    assert "silu" not in made.code and "matmul" not in made.code and "linear" not in made.code


def test_it_is_the_kernel_whose_results_are_used() -> None:
    assert not torch.equal(Ran(off=1.0).given, Ran().plain)


def test_where_nothing_takes_the_gate_along_it_comes_after() -> None:
    made = Ran(refuse=lambda asked: asked.then is not None)
    assert made.calls == [(B, D, 2 * F, False), (B, F, D, False)] * L + [(B, D, V, False)]
    assert torch.equal(made.given, made.plain)
    assert made.answers[0] == f"matmul of {B} x {D} x {2 * F}, gate_up: refused"


@pytest.mark.parametrize("f", [looks_again, turned])
def test_a_gate_that_is_used_otherwise_is_not_taken_along(f: Any) -> None:
    made = Ran(over(f))
    assert [gated for *_, gated in made.calls] == [False] * (2 * L)
    assert torch.equal(made.given, made.plain)


def test_nothing_takes_what_lies_by_rows() -> None:
    """Weights of more than 16 bits are packed by rows; the head lies by columns in any dtype."""
    made = Ran(dtype=torch.float32)
    assert made.calls == [(B, D, V, False)] and torch.equal(made.given, made.plain)


def test_where_all_is_refused_the_library_multiplies() -> None:
    made = Ran(refuse=lambda asked: True)
    assert made.calls == [] and torch.equal(made.given, made.plain)
    assert "torch.matmul" in made.code and "F.linear" in made.code


def test_the_environment_may_ask_for_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDLIB_REFERENCE", "1")
    made = Ran()
    assert made.asked == [] and torch.equal(made.given, made.plain)


@sharded("F, F -> F", layout=EXPLICIT)
def other(gate, up):
    return tanh(gate) * up


other.__name__ = "gate_up"


def test_a_step_that_means_something_else_is_not_taken_along() -> None:
    """It has the name of a function of the table, and another body."""
    @sharded("B D, * -> B D")
    def squashed(x, w: Layer):
        gate, up = einsum("B D, D F -> B F", x, w.gate), einsum("B D, D F -> B F", x, w.up)
        return x + einsum("B F, F D -> B D", tanh(gate) * up, w.down)
    asked: list[Product] = []
    passes = (*DEFAULT, *fuse((Fusion(other),)),
              *fuse(FUSIONS, lambda product: asked.append(product) or "refused"))
    w = Scanned.of(weights(torch.bfloat16), None)
    step = compile(over(squashed), mesh=Mesh(), passes=passes)
    x = torch.randn(B, D).bfloat16()
    step.lower(x, w)
    step(x, step.prepare("w", w))
    assert [product.then for product in asked] == [None, None]


def says(**changed: Any) -> str:
    asked = {"device": "cuda", "rows": 1, "lines": 64, "columns": 32, "dtype": "bfloat16", **changed}
    found = by_few_rows(Product(**asked))
    return found if isinstance(found, str) else "taken"


def test_what_kernels_of_few_rows_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardlib.ops.fusions.has_room", lambda device: True)
    assert says() == says(dtype="float16", then=gate_up, rows=FEW) == "taken"
    assert says(device="cpu") == "no kernel multiplies bfloat16 on cpu"
    assert says(dtype="float32") == "no kernel multiplies float32 on cuda"
    assert says(rows=FEW + 1) == says(rows=0) == f"kernels of few rows take 1 to {FEW}"
    assert says(then=other) == "no matmul takes gate_up along"
    monkeypatch.setattr("shardlib.ops.fusions.has_room", lambda device: False)
    assert says() == "a block of this GPU has less shared memory than the kernels take"


@pytest.mark.parametrize("then, columns", [(None, 12), (gate_up, 12)])
def test_they_multiply_rows(then: Any, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter."""
    monkeypatch.setattr("shardlib.ops.fusions.counts_of", lambda device: None)
    monkeypatch.setattr("shardlib.ops.fusions.has_room", lambda device: True)
    x, w = torch.randn(2, 64).half(), torch.randn(columns, 64).half().mT
    kernel = by_few_rows(Product("cuda", 2, 64, columns, "float16", then))
    made, wide = kernel(x, w), x.double() @ w.double()
    if then is not None:
        wide = torch.nn.functional.silu(wide[..., :columns // 2]) * wide[..., columns // 2:]
    assert made.shape == wide.shape and made.dtype == torch.float16
    assert (made.double() - wide).abs().max() <= 2 ** -10 * wide.abs().max()
