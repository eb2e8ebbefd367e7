"""cross_entropy against torch: values, gradients, rows to ignore, numbers of 16 bits,
and what a split vocabulary communicates."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardlib import Layout, Mesh, SpecError, lower, sharded, simulate, value_and_grad
from shardlib.dtypes import value_dtypes
from shardlib.functions import cast, greater, mean, sum
from shardlib.language.moves import COLLECTIVES
from shardlib.models.llama import LlamaConfig
from shardlib.models.llama import loss as llama_loss
from shardlib.ops import cross_entropy
from shardlib.oracle import same
from shardlib.params import init

pytestmark = pytest.mark.usefixtures("one_thread")
PLACES = [(Mesh(), Layout()), (Mesh(tp=2), Layout(V="tp")), (Mesh(tp=3), Layout(V="tp", T="tp")),
          (Mesh(dp=2, tp=2), Layout(B="dp", V="tp")), (Mesh(dp=2, tp=2), Layout(V=("tp", "dp"))),
          (Mesh(dp=2, tp=2), Layout(T="tp", V="dp"))]
IGNORED = -100


@sharded("B T V, B T -> B T")
def losses(x, labels, *, ignore_index=None):
    return cross_entropy("B T V, B T -> B T", x, labels, ignore_index=ignore_index)


@sharded("B T V, B T, B T -> ()")
def weighed(x, labels, weights, *, ignore_index=None):
    return sum("B T -> ()",
               cross_entropy("B T V, B T -> B T", x, labels, ignore_index=ignore_index) * weights)


@sharded("B T V, B T -> ()")
def mean_of_the_others(x, labels):
    each = cross_entropy("B T V, B T -> B T", x, labels, ignore_index=IGNORED)
    count = sum("B T -> ()", cast(greater(labels, -1), "float32"))
    return sum("B T -> ()", each) / count


def by_torch(x: Tensor, labels: Tensor, ignored: int | None = None) -> Tensor:
    """Loss of each row. torch takes no ignore_index for none."""
    out = F.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="none",
                          ignore_index=-2**62 if ignored is None else ignored)
    return out.view(labels.shape)


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int | None]:
    """Logits, labels, weights, ignore_index; at times labels to ignore,
    which may be labels of the vocabulary."""
    b, t, v = (draw(st.integers(1, n)) for n in (3, 4, 7))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    labels = torch.randint(v, (b, t), generator=g)
    if (ignored := draw(st.sampled_from((None, IGNORED, 0, v - 1)))) is not None:
        labels[torch.rand(b, t, generator=g) < 0.5] = ignored
    x = draw(st.sampled_from((0.1, 3.0, 300.0))) * torch.randn(b, t, v, generator=g, dtype=torch.float64)
    return x, labels, torch.randn(b, t, generator=g, dtype=torch.float64), ignored


@given(drawn(), st.sampled_from(PLACES))
def test_values_and_gradients_are_those_of_torch(case: tuple, place: tuple[Mesh, Layout]) -> None:
    x, labels, weights, ignored = case
    want = by_torch(x.requires_grad_(), labels, ignored)
    (want * weights).sum().backward()
    got = simulate(losses, place[1], x.detach(), labels, mesh=place[0], ignore_index=ignored)
    _, gradient = simulate(value_and_grad(weighed, "x"), place[1], x.detach(), labels, weights, mesh=place[0],
                           ignore_index=ignored)
    assert same(got, want.detach(), 1e-12) and same(gradient, x.grad, 1e-12)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_rows_to_ignore_count_for_nothing_whatever_they_hold(place: tuple[Mesh, Layout]) -> None:
    x, labels = (torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
                 torch.tensor([[1, IGNORED, 4], [IGNORED, 0, 2]]))
    kept = labels != IGNORED
    x[~kept] = torch.nan
    value, gradient = simulate(value_and_grad(mean_of_the_others, "x"), place[1], x, labels, mesh=place[0])
    rows = x[kept].requires_grad_()
    F.cross_entropy(rows, labels[kept]).backward()
    assert same(value, F.cross_entropy(rows, labels[kept]).detach(), 1e-12)
    assert same(gradient[kept], rows.grad, 1e-12) and not gradient[~kept].any()


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_infinities_and_nan_are_those_of_torch(place: tuple[Mesh, Layout]) -> None:
    """A label without probability costs infinity; a row with NaN or +inf has no loss."""
    x = torch.zeros(1, 4, 5, dtype=torch.float64)
    x[0, 0, 2], x[0, 1, 1], x[0, 2, 3], x[0, 3] = -torch.inf, torch.nan, torch.inf, -torch.inf
    labels = torch.full((1, 4), 2)
    assert same(simulate(losses, place[1], x, labels, mesh=place[0]), by_torch(x, labels), 1e-12)


# -- 16 bits -------------------------------------------------------------------------------------------------

def gradient_by_torch(x: Tensor, labels: Tensor) -> Tensor:
    by_torch(x.requires_grad_(), labels).sum().backward()
    return x.grad


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).square().mean().sqrt())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_of_logits_of_16_bits_each_loss_has_the_error_of_torch_in_float32(dtype: torch.dtype,
                                                                          place: tuple[Mesh, Layout]) -> None:
    """And the gradient is rounded once: it is off by at most half a step of its dtype."""
    g = torch.Generator().manual_seed(1)
    x, labels = 6 * torch.randn(4, 8, 50, generator=g), torch.randint(50, (4, 8), generator=g)
    # confident: the loss is far below the step of 16 bits at the logits
    x.scatter_(2, labels[..., None], 14.0)
    x = x.to(dtype)
    truth = by_torch(x.double(), labels)
    got = simulate(losses, place[1], x, labels, mesh=place[0])
    assert got.dtype == torch.float32 and error(got, truth) <= 2 * error(by_torch(x.float(), labels), truth)
    _, gradient = simulate(value_and_grad(weighed, "x"), place[1], x, labels, torch.ones(4, 8), mesh=place[0])
    exact, in_float32 = (gradient_by_torch(x.to(kind), labels) for kind in (torch.float64, torch.float32))
    assert gradient.dtype == dtype
    if dtype == torch.float32:
        assert error(gradient, exact) <= 2 * error(in_float32, exact)
    else:
        step = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
        assert float(((gradient.double() - exact).abs() / step).max()) <= 0.51


def test_one_label_of_a_thousand() -> None:
    x = torch.zeros(1, 1, 1000, dtype=torch.bfloat16)
    x[0, 0, 0], x[0, 0, 500] = 20, 17
    label, truth = torch.zeros(1, 1, dtype=torch.int64), 0.04858931104664727
    for mesh, layout in PLACES:
        got = simulate(losses, layout, x, label, mesh=mesh)
        assert abs(float(got - truth)) <= 2 * abs(float(by_torch(x.float(), label) - truth))


CONFIG = LlamaConfig(vocab_size=37, d_model=16, num_layers=2, num_kv_heads=2, queries_per_kv=2, head_dim=4,
                     d_ff=24, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=True, max_context=64)


@pytest.mark.parametrize("place", PLACES[:2], ids=str)
def test_the_loss_of_a_llama_in_bfloat16_is_the_mean_of_float32_losses(place: tuple[Mesh, Layout]) -> None:
    """As torch has it from `logits.float()`: nothing is rounded to 16 bits behind the logits."""
    from shardlib.models.decoding import weights_of
    from shardlib.models.llama import logits_of
    g = torch.Generator().manual_seed(0)
    weights = init(weights_of(CONFIG), CONFIG.sizes, dtype=torch.bfloat16)
    ids, labels, start = (torch.randint(37, (3, 8), generator=g), torch.randint(37, (3, 8), generator=g),
                          torch.zeros(3, dtype=torch.int64))
    got = simulate(llama_loss, place[1], ids, labels, weights, start, mesh=place[0], config=CONFIG)
    logits = simulate(logits_of, place[1], ids, weights, start, mesh=place[0], config=CONFIG)
    truth = by_torch(logits.double(), labels).mean()
    assert logits.dtype == torch.bfloat16 and got.dtype == torch.float32
    assert abs(float(got - truth)) <= 2 * max(abs(float(by_torch(logits.float(), labels).mean() - truth)),
                                              torch.finfo(torch.float32).eps * float(truth))


# -- what it costs, and what is refused ----------------------------------------------------------------------

def test_over_a_split_vocabulary_three_small_reductions_and_nothing_of_the_size_of_the_logits() -> None:
    program = lower(value_and_grad(losses_of_a_head, "x"), Layout(B="dp", V="tp"), mesh=Mesh(dp=2, tp=2))
    moved = [(s.op.name, s.text) for s in program.steps if s.op in COLLECTIVES]
    dtypes = value_dtypes(program, {"x": "bfloat16"}, "bfloat16")
    assert moved == [("all_reduce", "B/dp T max:tp -> B/dp T"), ("all_reduce", "B/dp T +tp -> B/dp T"),
                     ("all_reduce", "B/dp T +tp -> B/dp T"), ("all_reduce", "+dp -> ()")]
    large = [s.op.name for s in program.steps if any("V" in out.names for out in s.outs)]
    assert large == ["label_sums_vjp"]
    assert ([dtypes[s.outputs[0]] for s in program.steps if s.op in COLLECTIVES]
            == ["bfloat16", "float32", "float32", "float32"])


@sharded("B T V, B T -> ()")
def losses_of_a_head(x, labels):
    return mean("B T -> ()", cross_entropy("B T V, B T -> B T", x, labels))


@pytest.mark.parametrize("text", ("B T V, B T -> B", "B T V, B V -> B T", "B T V, B T -> T B", "B T V -> B T",
                                  "B T V, B T, B -> B T"))
def test_other_specs_are_refused(text: str) -> None:
    with pytest.raises(SpecError) as found:
        cross_entropy(text, None, None)
    assert str(found.value) == (
        f'cross_entropy "{text}": the specs are those of "B T V, B T -> B T": '
        "the losses lack one dim of the logits, and have those of the labels")
