"""A call of attention taken apart: what its operands are, and what its keywords say.

Behind q, k and v come, in this order, those that there are:

| operand | dims | |
|---|---|---|
| start | B | where the queries stand: query t of row b at start[b] + t |
| mask | of B K G T S, S at least | true where a key is seen |
| lengths | B | keys below lengths[b] are seen |
| bias | of B K G T S, S at least | is added to the scores |
| sinks | of K G | a score of each head that takes part and has no value |

A fourth operand that nothing is said of is a start, if it has one dim, else a mask.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardlib.errors import SpecError
from shardlib.language.local_code import LocalCode
from shardlib.ops.attend_lse import Scores
from shardlib.ops.ring import Ring, ring
from shardlib.ops.seen import Seen
from shardlib.program import Step, number
from shardlib.reference import Dims
from shardlib.spec import Spec

BESIDE = ("start", "mask", "lengths", "bias", "sinks")
_TAKES = dict(start="index", mask="mask", lengths="index", bias="float", sinks="float")
_MEANT = ('the specs are those of "B T K G H, B S K H, B S K H -> B T K G H", with a fourth, "B" of a start '
          'or "B T S" of a mask, where one is given')


def _beside(value: object) -> bool:
    return value is None or isinstance(value, str) and value.split() == [n for n in BESIDE
                                                                         if n in value.split()] != []


def floats(attrs: Mapping[str, Any]) -> list[int]:
    """Which operands are floats."""
    said = (attrs.get("beside") or "").split()
    return [0, 1, 2, *(3 + i for i, name in enumerate(said) if _TAKES[name] == "float")]


def _positive(value: Any) -> bool:
    return value is None or number(value) and value > 0


def told(spec: Spec) -> str:
    """What the fourth operand is, where nothing is said of it."""
    return "start" if len(spec.dims) == 1 else "mask"


@dataclass(frozen=True)
class Form:
    """One call. beside: what the operands behind v are."""
    q: Spec
    k: Spec
    v: Spec
    beside: tuple[str, ...]
    specs: tuple[Spec, ...]
    options: Mapping[str, Any]

    KEYWORDS: ClassVar[Mapping[str, Any]] = {
        "ahead": lambda v: v is None or number(v) and isinstance(v, int) and v >= 0,
        "beside": _beside, "causal": lambda v: v in (None, False, True), "softcap": _positive,
        "window": lambda v: v is None or isinstance(v, int) and _positive(v),
        "scale": lambda v: v is None or number(v)}

    @classmethod
    def of(cls, step: Step, kept: int = 0) -> Form:
        """That of a step; `kept`: operands that come last and are none of the call. SpecError where it is no
        call."""
        return _form(step.ins[:len(step.ins) - kept], step.attrs, () if kept else step.outs[:1])

    @classmethod
    def checked(cls, ins: Sequence[Spec], options: Mapping[str, Any], outs: Sequence[Spec] = (),
                who: str = "attention") -> Form:
        q, k, v, *specs = ins
        meant = f"{who}: {_MEANT}"
        if [len(s.dims) for s in (q, k, v, *outs)] != [5, 4, 4, *(5 for _ in outs)]:
            raise SpecError(meant)
        said = (options.get("beside") or "").split()
        if not said and specs:
            said = [told(specs[0])]
        if len(said) != len(specs):
            raise SpecError(meant)
        form = cls(q, k, v, tuple(said), tuple(specs), options)
        for name, spec in zip(said, specs):
            form._check(name, spec, who)
        return form

    @property
    def labels(self) -> list[str]:
        """B, K, G, T, S."""
        row, time, head, group, _ = self.q.labels
        return [row, head, group, time, self.k.labels[1]]

    def _check(self, name: str, spec: Spec, who: str) -> None:
        (row, head, group, _, key), dims = self.labels, ' '.join(spec.labels) or '()'
        if name in ("start", "lengths"):
            if spec.labels != (row,):
                says = (f"a start says where the queries of each {row} stand" if name == "start" else
                        f"lengths say how many keys each {row} has")
                raise SpecError(f"{who}: {says}; its dim is {row}, not {dims}")
        elif name == "sinks":
            if not {*spec.labels} <= {head, group}:
                raise SpecError(f"{who}: sinks are scores of heads; their dims are {head} and {group}, "
                                f"not {dims}")
        elif not {key} <= {*spec.labels} <= {*self.labels}:
            raise SpecError(f"{who}: a {name} has {key}, and any of {', '.join(self.labels[:4])}, not {dims}")

    @property
    def causal(self) -> bool:
        said = self.options.get("causal")
        return "mask" not in self.beside if said is None else said

    @property
    def ahead(self) -> int:
        """So many places the queries stand further on."""
        return self.options.get("ahead") or 0

    @property
    def placed(self) -> bool:
        """Whether places alone say what is seen, so that fused kernels take the keys before the queries and
        those among them: the latter want values as long as keys."""
        return (not self.beside and self.options.get("softcap") is None
                and self.q.dims[-1].names == self.v.dims[-1].names)

    @property
    def takes(self) -> tuple[str, ...]:
        return ("float", "float", "float", *(_TAKES[n] for n in self.beside))

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes over which the keys are split."""
        return self.k.dims[1].axes

    @property
    def alike(self) -> tuple[tuple[str, str], ...]:
        """The dims of queries and keys that one axis may split: not where an operand may have both."""
        times = self.q.dims[1].names[0], self.k.dims[1].names[0]
        return () if {"mask", "bias"} & {*self.beside} else (times,)

    @property
    def ring(self) -> bool:
        """Whether queries and keys are split alike."""
        return bool(self.alike) and self.axes == self.q.dims[1].axes != ()

    def ring_of(self, queries: Sequence[tuple[int, int]], keys: Sequence[tuple[int, int]]) -> Ring:
        """Who computes what. queries, keys: (start, size) of what each member has."""
        said = self.causal, self.options.get("window"), "start" in self.beside, self.ahead
        return ring(tuple(queries), tuple(keys), *said)

    # -- code ------------------------------------------------------------------------------------------------

    def order(self, name: str) -> tuple[int, ...]:
        """Where the dims of an operand stand among (b, k, g, t, s)."""
        return tuple(self.labels.index(n) for n in self.specs[self.beside.index(name)].labels)

    def ordered(self, name: str, args: Sequence[str]) -> str:
        """An operand as (b, k, g, t, s), each 1 or all, of sinks (k, g); "" where there is none."""
        return args[3 + self.beside.index(name)] + self._opened(name) if name in self.beside else ""

    def _opened(self, name: str) -> str:
        order, places = self.order(name), (1, 2) if name == "sinks" else range(5)
        turned = tuple(order.index(i) for i in sorted(order))
        text = "" if turned == tuple(range(len(order))) else f".permute({', '.join(map(str, turned))})"
        index = ", ".join(":" if i in order else "None" for i in places)
        return text if len(order) == len(places) else f"{text}[{index}]"

    # -- meaning ---------------------------------------------------------------------------------------------

    def score(self, d: Dims, q: Tensor, k: Tensor, beside: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The scores by names of dims, and where a key is seen."""
        head, time, key = self.q.dims[4].names, self.q.dims[1].names, self.k.dims[1].names
        scale, cap = self.options.get("scale"), self.options.get("softcap")
        score = d.sum(q * k, *head) * (1 / math.sqrt(max(1, d.count(*head))) if scale is None else scale)
        score = score if cap is None else cap * torch.tanh(score / cap)
        # how far a key is behind
        before = d.index(*time) + self.ahead + beside.get("start", 0) - d.index(*key)
        seen = before >= 0 if self.causal else before == before
        if (window := self.options.get("window")) is not None:
            seen = seen & (before.abs() < window)
        if "lengths" in beside:
            seen = seen & (d.index(*key) < beside["lengths"])
        return score + beside.get("bias", 0), seen & beside.get("mask", torch.tensor(True))


@lru_cache(maxsize=1024)
def _form(ins: tuple[Spec, ...], attrs: tuple[tuple[str, Any], ...], outs: tuple[Spec, ...]) -> Form:
    return Form.checked(ins, dict(attrs), outs)


def seen_code(e: LocalCode, form: Form, args: Sequence[str]) -> str:
    """What the code calls the `Seen` of a call; made once for all rounds of a loop that have the same."""
    (offset, t), (first, s) = e.rows(form.q.dims[1]), e.rows(form.k.dims[1])
    static = f"{offset + form.ahead}, {t}, {first}, {s}, {form.causal}, {form.options.get('window')}"
    tensors = {name: ".long()" if name != "mask" else form._opened(name) for name in BESIDE[:3]
               if name in form.beside}
    at = {name: args[3 + form.beside.index(name)] for name in tensors}
    if len(tensors) == 1:
        ((name, end),) = tensors.items()
        return e.hoist(at[name], f"{e.use(Seen)}({static}, {name}={{x}}{end})")
    return f"{e.use(Seen)}({', '.join([static, *(f'{n}={at[n]}{end}' for n, end in tensors.items())])})"


def members_code(e: LocalCode, form: Form) -> str:
    """(start, size) of what each member has of the keys; of a ring who computes what, and which member this
    rank is."""
    queries, keys = form.q.dims[1], form.k.dims[1]
    if not form.ring:
        return f"{e.pieces(keys)}"
    who = f"{form.causal}, {form.options.get('window')}, {'start' in form.beside}"
    who += f", {form.ahead}" if form.ahead else ""
    return (f"{e.use(ring)}({e.pieces(queries)}, {e.pieces(keys)}, {who}), "
            f"{e.mesh.number(keys.axes, e.coordinate)}")


def scores_code(e: LocalCode, form: Form) -> str:
    scale = form.options.get("scale")
    scale = max(1, e.count(form.q.dims[4])) ** -0.5 if scale is None else float(scale)
    return f"{e.use(Scores)}({scale!r}, {form.options.get('softcap')!r})"
