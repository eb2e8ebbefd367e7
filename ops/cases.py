"""Calls of every op, for the tests of the typing rules and the table of them in the docs."""
from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from shardlib.compiler.parser import CORE
from shardlib.language.arithmetic import BINARY, SCALE, SHIFT
from shardlib.language.comparison import SIGNS
from shardlib.language.unary import UNARY
from shardlib.ops import TABLE
from shardlib.oracle import Case, Draw, normal
from shardlib.program import Op

OPS: dict[str, Op] = {**CORE, **BINARY, "scale": SCALE, "shift": SHIFT, **TABLE}
SOFTMAX: dict[str, Any] = dict(score="softmax", renormalise=True, scale=1.0, groups=1, top_groups=1)
SIGMOID: dict[str, Any] = dict(score="sigmoid", renormalise=True, scale=2.5, groups=3, top_groups=2)
# tolerances: some roundings to the dtype, those of owed pieces included
ROUNDED = {"float32": 1e-6, "bfloat16": 2e-2}


def between(low: float, high: float) -> Draw:
    """Uniform numbers."""
    def draw(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
             before: list[Tensor]) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=g, dtype=torch.float64)
    return draw


def positive(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
             before: list[Tensor]) -> Tensor:
    return between(0.5, 1.5)(shape, sizes, g, before)


def shares(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
           before: list[Tensor]) -> Tensor:
    """Positive numbers that sum to 1 along dim 1, as softmax gives."""
    x = positive(shape, sizes, g, before)
    return x / x.sum(1, keepdim=True)


def distinct(experts: str) -> Draw:
    """Other ones for each row: indices of the dim `experts`."""
    def draw(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
             before: list[Tensor]) -> Tensor:
        if sizes[experts] < shape[-1]:
            raise ValueError("more than there are")
        return torch.rand((*shape[:-1], sizes[experts]), generator=g).argsort(-1)[..., :shape[-1]]
    return draw


def some_are(value: int, of: Draw) -> Draw:
    """A third of what `of` draws is `value`."""
    def draw(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
             before: list[Tensor]) -> Tensor:
        made = of(shape, sizes, g, before)
        return made.masked_fill(torch.rand(shape, generator=g) < 1 / 3, value)
    return draw


def choices(experts: str, most: str) -> Draw:
    """For each pair of an expert and a token, by which of the token's choices it is there."""
    def draw(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
             before: list[Tensor]) -> Tensor:
        tokens, n = shape[0] // max(sizes[experts], 1), sizes[most]
        experts_of = distinct(experts)((tokens, n), sizes, g, before)
        return torch.full((tokens, sizes[experts]), n).scatter(1, experts_of, torch.arange(n).expand(
            tokens, n)).T.reshape(-1)
    return draw


def infinite(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
             before: list[Tensor]) -> Tensor:
    """Normal numbers, and infinities among them."""
    x = normal(shape, sizes, g, before)
    x.view(-1)[::2] = torch.inf
    return x


def single(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
           before: list[Tensor]) -> Tensor:
    return normal(shape, sizes, g, before).float()


def digit(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
          before: list[Tensor]) -> Tensor:
    """0, 1 or 2: equal ones among them."""
    return torch.randint(3, shape, generator=g).double()


def mask(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
         before: list[Tensor]) -> Tensor:
    """Random, the first of each row true."""
    out = torch.rand(shape, generator=g) < 0.5
    out[..., :1] = True
    return out


def but_one(value: bool) -> Draw:
    """A mask that is `value` everywhere, but for its last element."""
    def draw(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
             before: list[Tensor]) -> Tensor:
        out = torch.full(shape, value)
        out.view(-1)[-1:] = not value
        return out
    return draw


def index(below: str, room: str = "") -> Draw:
    """Integers below the size of a dim, or of a group of dims; less that of `room`, plus 1."""
    def draw(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
             before: list[Tensor]) -> Tensor:
        return torch.randint(prod(sizes[n] for n in below.split()) - (sizes[room] - 1 if room else 0), shape,
                             generator=g)
    return draw


def standing(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
             before: list[Tensor]) -> Tensor:
    """Where queries stand: before all keys, among them, behind them."""
    return torch.randint(-sizes["T"] - 1, sizes["S"] + 1, shape, generator=g)


def permuted(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
             before: list[Tensor]) -> Tensor:
    """All places along dim 1, in any order."""
    return torch.rand(shape, generator=g).argsort(1)


def chosen(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
           before: list[Tensor]) -> Tensor:
    """Some of the places of V, none twice."""
    return torch.rand((*shape[:-1], sizes["V"]), generator=g).argsort(-1)[..., :shape[-1]]


def labels(ignored: int | None) -> Draw:
    """Integers below the size of V; every other one stands for none, if that is something."""
    def draw(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
             before: list[Tensor]) -> Tensor:
        out = index("V")(shape, sizes, g, before)
        if ignored is not None:
            out.view(-1)[::2] = ignored
        return out
    return draw


def largest(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
            before: list[Tensor]) -> Tensor:
    """The maximum of the first operand along its last dim."""
    return before[0].amax(-1)


def tied(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
         before: list[Tensor]) -> Tensor:
    """How many of the first operand's last dim are the second."""
    return (before[0] == before[1][..., None]).sum(-1)


def _case(name: str, text: str, *draws: Draw, indices: tuple[int, ...] = (), constants: tuple[int, ...] = (),
          complete: bool = True, tolerance: float = Case.tolerance, **attrs: Any) -> Case:
    return Case(OPS[name], text, tuple(sorted(attrs.items())), draws, indices, constants, complete, tolerance)


# What a function takes, and what its derivative does: for some, the function's result.
_RANGES: dict[str, tuple[Draw, Draw]] = {
    "log": (positive, positive), "rsqrt": (positive, positive), "exp": (normal, positive),
    "sigmoid": (normal, between(0.1, 0.9)), "tanh": (normal, between(-0.9, 0.9)),
    "sqrt": (positive, positive), "log1p": (positive, positive), "expm1": (normal, positive)}


def _unary(name: str) -> list[Case]:
    operand, result = _RANGES.get(name, (normal, normal))
    return [_case(name, "B D -> B D", operand), _case(f"{name}_vjp", "B D, B D -> B D", result)]


_BOUNDS: tuple[dict[str, Any], ...] = (dict(min=-0.5, max=0.5), dict(min=0.25), dict(max=-0.25))
_Q, _K, _V, _MASK, _OUT = "B T K G H", "B S K H", "B S K V", "B T S", "B T K G V"
_LSE = "B T K G"
_MASKED, _PLACED = (normal, normal, normal, mask), (normal, normal, normal, standing)

CASES: tuple[Case, ...] = (
    *(_case("einsum", text) for text in (
        "B T D, B D F -> B T F", "B T D, D F -> B T F", "B T D, B T D -> B T", "B D -> D", "B T D, T -> B D",
        "B D, T -> B T", "B D -> D B", "B T -> ()", "B D, B D -> ()", "B T D, T D -> B",
        "B T, T D, D F -> B F", "B (K H), (K H) D -> B D", "B (K H), (K H) -> B (K H)")),
    *(_case(name, text, normal, positive) for name in BINARY
      for text in ("B T D, D -> B T D", "B T, B T -> B T", "T, B T -> B T", "B T, B -> B T",
                   "B T, T D -> B T D")),
    _case("scale", "B D -> B D", by=-2.5), _case("shift", "B D -> B D", by=1.5),
    _case("shift", "B D -> B D", by=0), _case("reciprocal", "B D -> B D", positive),
    *(case for name in UNARY for case in _unary(name)),
    _case("pow", "B D -> B D", positive, by=2.5), _case("pow", "B D -> B D", positive, by=-1),
    *(_case(name, f"{operands} -> B D", **bounds)
      for name, operands in (("clamp", "B D"), ("clamp_vjp", "B D, B D"))
      for bounds in _BOUNDS),
    _case("widen", "B D -> B D"),
    _case("cast", "B D -> B D", single, dtype="float64", tolerance=ROUNDED["float32"]),
    *(_case("cast", "B D -> B D", dtype=dtype, tolerance=tolerance) for dtype, tolerance in ROUNDED.items()),
    _case("cast_like", "B D, B D -> B D", single, tolerance=ROUNDED["float32"]),
    _case("cast_like", "B D, B D -> B D", normal, single, tolerance=ROUNDED["float32"]),
    _case("where", "B T, B T, B T -> B T", mask), _case("where", "T, B T, T -> B T", mask),
    *(_case("filled", "T, B T -> B T", mask, value=value) for value in (0.0, -2.5)),
    *(_case(name, "B D -> B D", digit, than=1) for name in SIGNS),
    *(_case("compare", text, digit, digit, sign=sign) for sign in SIGNS.values()
      for text in ("B T D, D -> B T D", "T, B T -> B T")),
    *(_case(name, "B T, T -> B T", mask, mask) for name in ("logical_and", "logical_or")),
    _case("logical_not", "B T -> B T", mask), _case("masked", "T, B T -> B T", mask),
    *(_case(name, text) for name in ("maximum", "minimum")
      for text in ("B T D, D -> B T D", "T, B T -> B T")),
    *(_case(name, "-> B T", dtype=dtype) for name, dtype in (("zeros", "float64"), ("ones", "int32"))),
    _case("full", "-> B T", dtype="float64", value=-2.5), _case("full", "-> B", dtype="bool", value=True),
    _case("arange", "-> T", dtype="int64"), _case("arange", "-> T", dtype="float32"),
    *(_case("tril", "-> B T", dtype=dtype, diagonal=diagonal)
      for dtype, diagonal in (("bool", 0), ("int64", -1), ("float64", 2))),
    *(_case("uniform", f"(), () -> {made}", index("S"), index("T"), seed=3, dtype=dtype)
      for made, dtype in (("B T", "float64"), ("B (K H)", "bfloat16"))),
    _case("normal", "(), () -> B T", index("S"), index("T"), seed=3, dtype="float64"),
    _case("dropout", "B T D, (), () -> B T D", normal, index("S"), index("T"), rate=0.4, seed=1),
    _case("dropout", "B D, (), () -> B D", normal, index("S"), index("T"), rate=1.0, seed=1),
    _case("stop_gradient", "B D -> B D"), _case("ones_like", "B D -> B D"), _case("zeros_like", "B D -> B D"),
    _case("sum", "B T D -> B"), _case("sum", "B (K H) -> B"), _case("sum", "B D -> B D"),
    _case("mean", "B T D -> B"), _case("mean", "B (K H) -> B"), _case("mean", "B D -> ()"),
    *(_case(name, text, correction=correction) for name in ("var", "std")
      for text, correction in (("B T D -> B", 1), ("B (K H) -> B", 0))),
    _case("var_about", "B T D, B -> B", constants=(1,), correction=1),
    _case("var_about", "B (K H), B -> B", constants=(1,), correction=0),
    _case("var_about_vjp", "B T D, B, B -> B T D", correction=1), _case("root", "B -> B", positive),
    _case("root_vjp", "B, B -> B", digit),
    *(_case(name, text, draw) for name in ("max", "min", "max_opposite")
      for text, draw in (("B T D -> B", normal), ("B D -> ()", digit), ("B (K H) -> B", digit))),
    *(_case(name, text, but_one(here)) for name, here in (("any", False), ("all", True))
      for text in ("B T D -> B", "B D -> ()")),
    _case("opposite", "B D -> B D", complete=False),        # of integers it is not linear
    _case("opposite", "B D -> B D", index("V"), constants=(0,)), _case("ties", "B V, B -> B", digit, largest),
    _case("extreme_vjp", "B V, B, B, B -> B V", digit, largest, tied),
    _case("spread", "B -> B T D"), _case("spread", "T -> B T", constants=(0,), mean=True),
    _case("spread", "B -> B (K H)"),
    _case("softmax", "B T D -> B T D", along="T"),
    _case("softmax_vjp", "B T D, B T D -> B T D", shares, along="T"), _case("logsumexp", "B V T -> B T"),
    _case("exp_minus", "B V, B, B -> B V"),
    _case("share", "B V, B, B -> B V", normal, normal, positive, constants=(1,)),
    _case("finite", "B -> B", infinite),
    _case("sum_exp", "B V, B -> B", constants=(1,)),
    _case("log_plus", "B T, B T -> B T", positive, constants=(1,)), _case("argmax", "B T V -> B T"),
    _case("argmax", "B (K H) -> B"), _case("rank_of", "B V, B -> B", normal, largest),
    _case("rank_of", "B (K H), B -> B", normal, largest), _case("from_rank", "B -> B", index("V")),
    _case("rearrange", "B T D -> D B T"), _case("rearrange", "B K H -> B (K H)"),
    _case("rearrange", "B D -> D 1 B"), _case("rearrange", "B 1 D -> B D"),
    _case("rearrange", "T (K H) -> K T H"), _case("rearrange", "B T (K H) -> (B T) K H"),
    _case("rename", "B T -> B S"), _case("rename", "B (T H) -> B S"), _case("rename", "S B -> (T H) B"),
    _case("rename", "B (T H) -> B (G D)"), _case("attention", f"{_Q}, {_K}, {_V} -> {_OUT}"),
    _case("attention", f"{_Q}, {_K}, {_V}, {_MASK} -> {_OUT}", *_MASKED, indices=(3,)),
    _case("attention", f"{_Q}, {_K}, {_V}, B -> {_OUT}", *_PLACED, indices=(3,)),
    _case("attention", f"{_Q}, {_K}, {_K} -> {_Q}", complete=False),
    _case("attention", f"{_Q}, {_K}, {_V}, K G T S -> {_OUT}", *_MASKED[:3], beside="bias", causal=False,
          softcap=0.7, scale=1.5),
    _case("attention", f"{_Q}, {_K}, {_V}, B, S T, B, G K -> {_OUT}", *_PLACED, mask, index("S"),
          indices=(3, 4, 5), complete=False, beside="start mask lengths sinks", window=3, causal=True,
          ahead=1),
    _case("attention_lse", f"{_Q}, {_K}, {_V} -> {_OUT}, {_LSE}", ahead=2),
    *(_case("attention_vjp", f"{_Q}, {_K}, {_V}, {text}{_OUT}, {_LSE}, {_OUT} -> {_Q}, {_K}, {_V}{more}",
            *draws, indices=(3,) if text and not more else (), complete=False, **attrs)
      for text, more, draws, attrs in (
          ("", "", (), {}), (f"{_MASK}, ", "", _MASKED, {}), ("B, ", "", _PLACED, dict(window=2, ahead=1)),
          ("K T S, ", ", K T S", (), dict(beside="bias", softcap=0.7, scale=1.5)))),
    _case("attention_sinks_vjp", f"K, {_OUT}, {_LSE}, {_OUT} -> K"),
    _case("update_cache", "B S K H, B T K H, B -> B S K H", normal, normal, index("S", "T")),
    _case("causal_mask", "B -> B T S", index("S")), _case("rms_norm", "B T D, D -> B T D", eps=1e-6),
    _case("rms_norm", "D, D -> D", eps=1e-6), _case("rms_norm_vjp", "B T D, D, B T D -> B T D, D", eps=1e-6),
    _case("rms_norm_vjp", "D, D, D -> D, D", eps=1e-6),
    _case("prod", "B T D -> B", positive), _case("prod", "B D -> B", digit), _case("prod", "B (K H) -> B"),
    _case("prod_vjp", "B T D, B -> B T D"), _case("prod_vjp", "B D, B -> B D", digit),
    _case("cumsum", "B T D -> B T D", along="T"), _case("cumsum", "B T -> B T", along="T", reverse=True),
    _case("sort", "B T D -> B T D, B T D", along="T"),
    _case("sort", "B T D -> B T D, B T D", digit, along="T", descending=True),
    _case("sort_vjp", "B T D, B T D -> B T D", permuted, along="T"),
    *(_case("concat", text) for text in ("B T D, B S D -> B V D", "B T, B T, B S -> B V")),
    *(_case("stack", text) for text in ("B D, B D -> B S D", "T, T, T -> S T")),
    *(_case("unbind", text) for text in ("B S D -> B D, B D", "T S -> T")),
    _case("flip", "B T D -> B T D", along="T"), _case("roll", "B T D -> B T D", along="T", by=2),
    _case("roll", "T -> T", along="T", by=-1),
    *(_case(name, text, before=before, after=after, stride=stride, dilation=dilation)
      for name, text, before, after, stride, dilation in (
          ("windows", "B T D -> B T G D", 1, 0, 1, 1), ("windows", "S -> S G", 1, 1, 1, 2),
          ("windows", "B D S -> B D H G", 1, 1, 2, 1), ("windows_vjp", "B T G D -> B T D", 1, 0, 1, 1),
          ("windows_vjp", "B D H G -> B D S", 1, 1, 2, 1))),
    *(_case("split", text) for text in ("B V D -> B T D, B S D", "V B -> T B, D B, K B")),
    _case("pad", "B T D -> B S D", before=1, after=2), _case("pad", "T -> S", before=0, after=1),
    _case("slice", "B T D -> B S D", start=1, stop=3), _case("slice", "T -> S", start=0, stop=3),
    _case("slice", "B T -> B S", start=1, after=1), _case("topk", "B V D -> B K D, B K D", k=3),
    _case("topk", "V -> K, K", digit, k=3), _case("topk_vjp", "B K, B K -> B V", chosen),
    _case("argmin", "B T V -> B T"), _case("argmin", "B (K H) -> B"),
    *(_case("layer_norm", text, eps=1e-5)
      for text in ("B T D, D -> B T D", "B T D, D, D -> B T D", "D, D, D -> D", "B (K H), (K H) -> B (K H)")),
    *(_case("group_norm", text, eps=1e-5, over=over) for text, over in (
        ("B G D, G D -> B G D", "D"), ("B G D, G D, G D -> B G D", "D"),
        ("B G D T, G D, G D -> B G D T", "D T"), ("B T D, T, T -> B T D", "T"))),
    *(_case("norm_vjp", text, eps=1e-5, over=over) for text, over in (
        ("B T D, D, B T D -> B T D, D", "D"), ("D, D, D, D -> D, D, D", "D"),
        ("B G D, G D, G D, B G D -> B G D, G D, G D", "D"), ("B D T, D, B D T -> B D T, D", "D T"))),
    *(_case("rope_table", "B -> B T H", index("S"), theta=10.0, scaling=scaling, tolerance=ROUNDED["float32"])
      for scaling in (None, (4.0, 1.0, 2.0, 9), ("linear", 4.0), ("dynamic", 2.0, 4),
                      ("yarn", 4.0, 9, 2.0, 0.5, 1.2))),
    *(_case(name, text, **attrs) for name in ("rope", "rope_vjp")
      for text, attrs in (("B T K H, B T H -> B T K H", {}), ("T H, T H -> T H", dict(interleaved=True)),
                          ("T H, T G -> T H", dict(part=2)))),
    _case("sample", "B V, B -> B", normal, index("S"), temperature=0.7, top_p=0.9, seed=3),
    _case("sample", "B V, B, B -> B", normal, index("S"), index("S"), temperature=0.7, top_p=0.9, seed=4),
    _case("one_hot", "B -> B V", index("V"), dtype="float64"),
    _case("one_hot", "B T -> B (K H) T", index("K H"), dtype="int16"),
    _case("embedding", "B T, V D -> B T D", index("V")),
    _case("embedding_vjp", "B T, B T D -> V D", index("V")),
    _case("take", "B T D, B -> B D", normal, index("T")), _case("take", "B V, B -> B", normal, index("V")),
    _case("take", "B (K H), B -> B", normal, index("K H")),
    *(_case("take", text, normal, index(of))
      for text, of in (("B S D, B T -> B T D", "S"), ("V D, B T -> B T D", "V"))),
    _case("scatter_add", "B T D, B T -> B S D", normal, index("S")),
    _case("scatter_add", "B D T, T -> B D V", normal, index("V")),
    _case("scatter_add", "B, B -> B (K H)", normal, index("K H")),
    _case("embedding", "B, (K H) D -> B D", index("K H")),
    _case("embedding_vjp", "B, B D -> (K H) D", index("K H")),
    _case("cross_entropy", "B T V, B T -> B T", normal, index("V")),
    _case("cross_entropy", "B T V, T B -> B T", normal, index("V")),
    _case("cross_entropy", "B V T, B T -> B T", normal, labels(-1), ignore_index=-1),
    _case("cross_entropy_sums", "B T V, B T -> B T, B T, B T", normal, index("V")),
    _case("cross_entropy_sums", "B V T, B T -> B T, B T, B T", normal, labels(-1), ignore_index=-1),
    _case("label_sums", "B V, B, B -> B, B", normal, index("V"), constants=(2,)),
    _case("label_sums", "B V T, B T, B T -> B T, B T", normal, labels(1), constants=(2,), ignore_index=1),
    _case("label_sums_vjp", "B V, B, B, B, B -> B V", normal, index("V")),
    _case("label_sums_vjp", "B V, B, B, B, B -> B V", normal, labels(1), ignore_index=1),
    *(_case("route", text, normal, normal, top_k=2, **more) for text, more in (
        ("B T V -> B T J, B T J", SOFTMAX), ("B V -> B J, B J", {**SOFTMAX, "renormalise": False}),
        ("B V, V -> B J, B J", {**SIGMOID, "groups": 1, "top_groups": 1}), ("B S -> B J, B J", SIGMOID))),
    _case("route_vjp", "B T V, B T J, B T J -> B T V", normal, distinct("V"), score="softmax",
          renormalise=True, scale=1.0),
    _case("route_vjp", "B V, B J, B J -> B V", normal, distinct("V"), score="sigmoid", renormalise=False,
          scale=2.5),
    _case("dispatch", "B T D, B T J -> (V B T)~J D, (V B T)~J", normal, distinct("V")),
    _case("dispatch", "T D, T J -> (V T)~J D, (V T)~J", normal, distinct("V")),
    _case("dispatch", "T D, T J -> (V T)~J D, (V T)~J", normal, some_are(-1, distinct("V")), ignore_index=-1),
    _case("within_capacity", "B T J -> B T J, V", some_are(-1, distinct("V")), capacity=1),
    _case("within_capacity", "T J -> T J, V", distinct("V"), capacity=2),
    _case("slots_of", "V F, B T J -> B T J", some_are(-1, index("F")), some_are(-1, index("V"))),
    *(_case(name, f"(V T)~J D, (V T)~J, {more}", normal, choices("V", "J")) for name, more in (
        ("grouped_einsum", "V D F -> (V T)~J F"), ("grouped_einsum", "D F V -> (V T)~J F"),
        ("grouped_einsum_vjp", "(V T)~J F -> V D F"), ("grouped_einsum_vjp", "(V T)~J F -> F V D"),
        ("combine", "T J -> T D"), ("combine_weights_vjp", "T D -> T J"))),
    _case("combine", "(V B T)~J D, (V B T)~J -> B T D", normal, choices("V", "J")),
    _case("combine", "(V B T)~J D, (V B T)~J, B T J -> B T D", normal, choices("V", "J")),
    _case("combine_vjp", "T D, (V T)~J, T J -> (V T)~J D", normal, choices("V", "J")),
    _case("combine_vjp", "T D, (V T)~J -> (V T)~J D", normal, choices("V", "J")),
)
