"""Cross entropy by kernels: of rows and of pieces of them, forward and backward, beside torch and float64."""
from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import numpy
import pytest
import torch
import triton
from accuracy import near
from hypothesis import given, settings
from hypothesis import strategies as st
from rounded import rounded
from torch import Tensor

from shardlib import Layout, Mesh, sharded, simulate, value_and_grad
from shardlib.functions import sum
from shardlib.ops import cross_entropy
from shardlib.triton_kernels.cross_entropy import (
    Labels,
    label_sums,
    label_sums_reference,
    label_sums_vjp,
    label_sums_vjp_reference,
    token_losses,
    token_losses_reference,
)

OLD = (tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
       and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4))
pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.skipif(OLD, reason="the interpreter of Triton 3.6 runs no loops with numpy 2.4")]
some = settings(max_examples=settings.default.max_examples // 5)
ODD = (-torch.inf, torch.inf, torch.nan)
OPS = import_module("shardlib.ops.cross_entropy")


@pytest.fixture(scope="module", autouse=True)
def to_nearest() -> Iterator[None]:
    with rounded():
        yield


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Tensor, Labels]:
    """Logits and labels of some columns of rows; labels to ignore, and such as no column has."""
    rows, columns, start = draw(st.integers(0, 4)), draw(st.integers(1, 5000)), draw(st.integers(0, 3))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    x = draw(st.sampled_from((0.1, 8.0, 90.0))) * torch.randn(rows, columns) + draw(st.sampled_from((0, 300)))
    last = start + columns - 1 + draw(st.integers(0, 2))
    index = torch.randint(-2, last + 3, (rows,))
    if rows and draw(st.booleans()):
        index[0], x[0, 0] = start, draw(st.sampled_from(ODD))
    if rows > 1 and draw(st.booleans()):
        x[1] = draw(st.sampled_from(ODD))
    ignored = draw(st.sampled_from((None, -100, int(index[-1]) if rows else 0, 2**40)))
    seen = draw(st.sampled_from((None, torch.zeros(2, dtype=torch.int64))))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    return x.to(dtype), Labels(index, start, last, ignored, None if seen is None else seen.clone())


def alike(got: Tensor, torchs: Tensor, exact: Tensor, n: int = 1, terms: Tensor | None = None) -> bool:
    """Row by row, `terms` what the n numbers of each come to; and what is no number is where torch has it."""
    assert got.dtype == torchs.dtype and got.shape == torchs.shape
    odd = ~torchs.isfinite()
    assert torch.equal(got[odd].nan_to_num(3, 2, 1), torchs[odd].nan_to_num(3, 2, 1))
    rows = zip(*(x.masked_fill(odd, 0) for x in (got, torchs, exact, exact if terms is None else terms)))
    return all(near(*of_row[:3], n + 1, of_row[3]) for of_row in rows)


@some
@given(drawn())
def test_rows(case: tuple[Tensor, Labels]) -> None:
    """What labels are asked for is noted, but for the one that stands for none."""
    x, labels = case[0], case[1]._replace(start=0)
    of_each = [*zip(token_losses(x, labels), token_losses_reference(x, labels),
                    token_losses_reference(x.double(), labels))]
    losses, tops, totals = of_each
    assert alike(*losses, x.shape[1], 1 + losses[2].abs().nan_to_num(0, 0, 0))
    assert torch.equal(*(y.nan_to_num(0, 0, 0) for y in tops[:2]))
    usual = totals[1].isfinite()
    assert alike(*(y[usual] for y in totals), x.shape[1], totals[2][usual])
    if labels.seen is not None:
        asked = [n for n in labels.index.tolist() if n != labels.ignored]
        assert labels.seen.tolist() == [min([0, *asked]), max([0, *asked])]


@some
@given(drawn(), st.booleans())
def test_pieces_of_rows(case: tuple[Tensor, Labels], first: bool) -> None:
    """And the derivative, which adds nothing where a row has no label."""
    x, labels = case
    top = x.amax(1).float() + 1
    total, label = zip(label_sums(x, labels, top, first), label_sums_reference(x, labels, top, first),
                       label_sums_reference(x.double(), labels, top.double(), first))
    assert alike(*total, x.shape[1], total[2].nan_to_num(0, 0, 0)) and alike(*label)
    g = torch.randn(2, len(x))
    by_hand = label_sums_vjp_reference(x, labels, top, *g)
    assert alike(label_sums_vjp(x, labels, top, *g), by_hand,
                 label_sums_vjp_reference(x.double(), labels, top.double(), *g.double()))


def test_what_stands_for_none_is_not_noted() -> None:
    labels = Labels(torch.tensor([4, -100, 9]), 0, 4, -100, torch.zeros(2, dtype=torch.int64))
    token_losses(torch.zeros(3, 5), labels)
    assert labels.seen.tolist() == [0, 9]


@sharded("B V T, T B -> ()")
def among(x, labels):
    return sum("B T -> ()", cross_entropy("B V T, T B -> B T", x, labels, ignore_index=-7))


@sharded("B T V, T B, B T -> ()")
def weighed(x, labels, weights):
    return sum("B T -> ()", weights * cross_entropy("B T V, T B -> B T", x, labels, ignore_index=-7))


@pytest.mark.parametrize(("mesh", "layout"), [(Mesh(), Layout()), (Mesh(tp=2), Layout(V="tp")),
                                              (Mesh(dp=2, tp=3), Layout(B="dp", V="tp"))], ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_ops_run_by_kernels_as_by_torch(mesh: Mesh, layout: Layout, dtype: torch.dtype,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Where V comes last; with labels that lie otherwise than the logits."""
    torch.manual_seed(0)
    x, labels, weights = torch.randn(2, 3, 40), torch.randint(40, (3, 2)), torch.randn(2, 3)
    labels[1, 1] = -7
    exact = simulate(value_and_grad(weighed, "x"), layout, x.to(dtype).double(), labels, weights.double(),
                     mesh=mesh)
    args, made, asked = (x.to(dtype), labels, weights), [], []
    made.append(simulate(value_and_grad(weighed, "x"), layout, *args, mesh=mesh))
    monkeypatch.setattr(OPS, "kernel_takes", lambda x, dim: asked.append(OPS.of_rows(x, dim)) or asked[-1])
    made.append(simulate(value_and_grad(weighed, "x"), layout, *args, mesh=mesh))
    assert asked == [True] * 2 * mesh.world_size
    for one, other, truth in zip(*made, exact):
        assert one.dtype == other.dtype and near(other, one, truth)
    assert not made[1][1][1, 1].any() and made[1][1][0].any()
    simulate(value_and_grad(among, "x"), layout, x.to(dtype).mT.contiguous(), labels, mesh=mesh)
    assert not any(asked[2 * mesh.world_size:]), "V does not come last"


def test_what_kernels_take() -> None:
    x = torch.randn(2, 3)
    assert OPS.of_rows(x, 1) and not OPS.kernel_takes(x, 1)
    assert not any(OPS.of_rows(y, 1) for y in (x.double(), x.mT, x[:0], x.clone().requires_grad_()))
