"""Draws the steps of a declarative program, from all ops that one calls: `Writer`, a function for each kind.

Only where text names an axis may a step not type, which is left out: what names none types under every
layout.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import event
from hypothesis import strategies as st

from shardlib import functions, ops
from shardlib.dtypes import step_dtypes
from shardlib.errors import SpecError
from shardlib.language.cond import COND
from shardlib.language.moves import RESHARD
from shardlib.language.scan import SCAN
from shardlib.mesh import Mesh
from shardlib.ops.cases import CASES, OPS, SOFTMAX, distinct, mask, positive
from shardlib.oracle import Case, Draw, normal, types
from shardlib.program import Op, Program, Result, Step, Struct
from shardlib.spec import Dim, Factor, Spec, parse

BATCH = ("B", "T", "D", "F", "K")
SIZES = (0, 1, 2, 3, 5, 7)
FLOATS = ("any", "bounded", "positive")


@dataclass(frozen=True)
class Value:
    """holds: "any" float, "bounded" (by about 5), "positive" (bounded away from 0), "mask", "ids", "start";
    of an argument also what draws it.

    order: of magnitude, at most.
    """
    name: str
    spec: Spec
    holds: str | Draw = "bounded"
    order: int = 1


class NotHere(Exception):
    """The drawn op has no operands in this program."""


class Writer:
    """Draws the steps of a program, and its arguments as they are needed.

    `fits` says whether the program still types.
    """

    def __init__(self, draw: Callable, sizes: dict[str, int], mesh: Mesh, fits: Callable[[Program], bool],
                 prefix: str = "") -> None:
        self.draw, self.sizes, self.mesh, self.fits, self.prefix = draw, sizes, mesh, fits, prefix
        self.args: dict[str, Spec] = {}
        self.weights: dict[str, Spec] = {}
        self.holds: dict[str, str | Draw] = {}
        self.steps: list[Step] = []
        self.values: list[Value] = []
        self.texts: dict[str, Spec] = {}            # as written, with its /1
        self.count = itertools.count()

    # -- choices ---------------------------------------------------------------------------------------------

    def one_of(self, choices: Sequence) -> Any:
        if not choices:
            raise NotHere
        return self.draw(st.sampled_from(list(choices)))

    def maybe(self) -> bool:
        return self.draw(st.booleans())

    def some(self, choices: Sequence) -> list:
        return [c for c in choices if self.maybe()]

    def new(self, spec: Spec | str, holds: str | Draw = "bounded", weight: bool = False) -> Value:
        """An argument, or a field of the pytree `w`."""
        spec, fields = parse(spec) if isinstance(spec, str) else spec, self.weights if weight else self.args
        name = f"{self.prefix}{'w.p' if weight else 'x'}{next(self.count)}"
        fields[name] = spec
        self.holds[name] = holds
        value = Value(name, spec, holds)
        self.values.append(value)
        return value

    def float_(self, *holds: str, order: int = 6, dims: int = 0) -> Value:
        """A float value, made or new."""
        found = [v for v in self.values if v.holds in (holds or FLOATS)
                 and v.order <= order and len(v.spec.dims) >= dims]
        if found and self.draw(st.integers(0, 4)):
            return self.one_of(found)
        labels = self.draw(st.permutations(BATCH))[:self.draw(st.integers(max(dims, 1), 3))]
        return self.new(" ".join(labels), holds[0] if holds else "bounded")

    def with_dims(self, spec: Spec | str, *holds: str) -> Value:
        """A value of just these dims."""
        spec = parse(spec) if isinstance(spec, str) else spec
        found = [v for v in self.values if v.spec == spec and v.holds in (holds or FLOATS)]
        return (self.one_of(found) if found and self.maybe()
                else self.new(spec, holds[0] if holds else "bounded", holds != ("mask",) and self.maybe()))

    def narrower(self, than: Spec, *holds: str) -> Value:
        """A value with some of the dims of `than`, in order."""
        return self.with_dims(Spec(tuple(self.some(than.dims)) or than.dims[-1:]), *holds)

    def pinned(self, spec: Spec) -> Spec:
        """At times the same dims, one of them whole on purpose."""
        plain = [i for i, d in enumerate(spec.dims) if len(d.factors) == 1]
        if not plain or self.draw(st.integers(0, 7)):
            return spec
        at = self.one_of(plain)
        return spec.with_dims(d._replace(factors=(d.factors[0]._replace(whole=True),)) if i == at else d
                              for i, d in enumerate(spec.dims))

    # -- steps -----------------------------------------------------------------------------------------------

    def add(self, name: str | Op, inputs: Sequence[Value], out: Spec | str | None = None, holds: str = "any",
            order: int = 1, **attrs: Any) -> Value:
        """One step, if the program still types with it. An op without text says its result itself."""
        op = OPS[name] if isinstance(name, str) else name
        ins = tuple(v.spec for v in inputs)
        if op.takes_text:
            out = parse(out) if isinstance(out, str) else out
            ins, outs = tuple(map(self.pinned, ins)), (self.pinned(out),)
        else:
            outs = op.infer(ins, attrs)
        return self.record(Step(op, ins, outs, tuple(v.name for v in inputs),
                                (f"{self.prefix}v{next(self.count)}",), tuple(sorted(attrs.items()))), holds,
                           order)

    def record(self, step: Step, holds: str, order: int) -> Value:
        return self.results(step, holds, order)[0]

    def results(self, step: Step, holds: str = "any", order: int = 1) -> list[Value]:
        self.steps.append(step)
        if not self.fits(self.program("f", step.outputs)):
            self.steps.pop()
            event(f"left out: {step.op.name}")
            said = [s for made in (*self.steps, step) for s in (*made.ins, *made.outs)]
            assert any(s.split_axes for s in said), (
                f"{step.op.name} is refused, and no text names an axis\n{self.program('f', ())}\n{step.text}")
            raise NotHere
        self.texts.update(zip(step.outputs, step.outs))
        made = [Value(n, s.whole(), holds, order) for n, s in zip(step.outputs, step.outs)]
        self.values += made
        return made

    def program(self, name: str, results: Sequence[str]) -> Program:
        kinds = {**self.args, **self.weights,
                 **{n: s for step in self.steps for n, s in zip(step.outputs, step.outs)}}
        args = list(self.args.items())
        if self.weights:
            args.append((f"{self.prefix}w",
                         Struct("Weights", tuple((n.split(".")[1], s) for n, s in self.weights.items()))))
        return Program(name, tuple(args), tuple(self.steps),
                       tuple(Result(kinds[r].whole(), (r,)) for r in results))


# -- one function for each kind of step ----------------------------------------------------------------------

def pointwise(w: Writer) -> None:
    x = w.float_()
    allowed = ["silu", "gelu", "relu", "tanh", "sigmoid", "scale", "shift", "cast", "stop_gradient",
               "softplus", "log_sigmoid", "erf", "cos", "clamp"]
    allowed += ["square"] if x.order <= 2 else []
    allowed += {"bounded": ["exp"], "positive": ["log", "rsqrt", "reciprocal"]}.get(x.holds, [])
    name = w.one_of(allowed)
    attrs = {"scale": dict(by=-1.5), "shift": dict(by=w.one_of((0, 0.5)) if name == "shift" else 0),
             "cast": dict(dtype="float64"), "clamp": dict(min=-0.321)}.get(name, {})
    holds = ("positive" if name == "exp" or name == "sigmoid" and x.holds == "bounded"
             else "bounded" if name in ("tanh", "sigmoid", "erf", "cos") else "any")
    w.add(name, [x], holds=holds, order=2 * x.order if name == "square" else 2 if holds != "any" else x.order,
          **attrs)


def binary(w: Writer) -> None:
    name, x = w.one_of(("add", "sub", "mul", "div")), w.float_(order=3)
    y = w.narrower(x.spec, *(("positive",) if name == "div" else ()))
    if y.order > 3:
        raise NotHere
    w.add(name, [y, x] if name != "div" and w.maybe() else [x, y], order=x.order + y.order)


def compare(w: Writer) -> None:
    w.add(w.one_of(("greater", "less")), [w.float_()], holds="mask", than=0.123)


def where(w: Writer) -> None:
    x = w.float_()
    w.add("where", [w.narrower(x.spec, "mask"), x, w.narrower(x.spec)], order=6)


def einsum(w: Writer) -> None:
    operands = [w.float_(order=2) for _ in range(w.one_of((1, 2, 2, 2, 3)))]
    dims = list(dict.fromkeys(d for v in operands for d in v.spec.dims))
    if len({n for d in dims for n in (f.name for f in d.factors)}) < sum(len(d.factors) for d in dims):
        raise NotHere                # a name alone, and in a group
    kept = w.some(w.draw(st.permutations(dims)))[:4]
    w.add("einsum", operands, Spec(tuple(kept)), order=2 + sum(v.order for v in operands))


def reduction(w: Writer) -> None:
    """Extremes of what is given alone: what is made may be near-equal, and which one is taken is chance."""
    name = w.one_of(("sum", "mean", "max", "min", "var", "logsumexp"))
    x = w.float_(dims=1, order=2 if name == "var" else 6)
    if name in ("max", "min") and x.name not in w.holds:
        raise NotHere
    gone = [w.one_of(x.spec.dims)] if name == "logsumexp" else w.some(x.spec.dims) or x.spec.dims[:1]
    if name != "sum" and any(w.sizes[f.name] == 0 for d in gone for f in d.factors):
        raise NotHere                # infinities and NaN: what follows is not linear in them
    w.add(name, [x], Spec(tuple(d for d in x.spec.dims if d not in gone)), order=2 * x.order + 1,
          **({"correction": 0} if name == "var" else {}))


def two_reductions(w: Writer) -> None:
    """What passes look for: two that are the same but for their operand, and added up."""
    name, x = w.one_of(("sum", "max", "min", "mean")), w.float_(dims=1, order=2)
    y, kept = w.with_dims(x.spec), Spec(tuple(w.some(x.spec.dims[1:])))
    if name != "sum" and any(w.sizes[n] == 0 for n in x.spec.names) or y.order > 2:
        raise NotHere
    if name in ("max", "min") and not {x.name, y.name} <= {*w.holds}:
        raise NotHere
    w.add(w.one_of(("add", "sub")), [w.add(name, [v], kept) for v in (x, y)], order=4)


def argmax(w: Writer) -> None:
    x = w.one_of([v for v in w.values if v.name in w.args and v.holds == "bounded"])
    gone = w.one_of([d for d in x.spec.dims if all(w.sizes[f.name] for f in d.factors)])
    w.add("argmax", [x], Spec(tuple(d for d in x.spec.dims if d != gone)), holds="ids")


def softmax(w: Writer) -> None:
    x = w.float_(dims=1)
    w.add("softmax", [x], holds="bounded",
          along=w.one_of([d.label for d in x.spec.dims if len(d.factors) == 1]))


def rearrange(w: Writer) -> None:
    x = w.float_()
    dims: list[Dim] = []
    for dim in w.draw(st.permutations(x.spec.dims)):
        if dims and len(dim.factors) == 1 == len(dims[-1].factors) and w.maybe():
            dims[-1] = Dim((*dims[-1].factors, *dim.factors))
        elif len(dim.factors) > 1 and w.maybe():
            dims += [Dim((f,)) for f in dim.factors]
        else:
            dims.append(dim)
    w.add("rearrange", [x], Spec(tuple(dims)), x.holds, x.order)


def rename(w: Writer) -> None:
    x = w.float_(dims=1)
    old = w.one_of([d for d in x.spec.dims if len(d.factors) == 1])
    new = w.one_of([n for n in ("P", "Q", "R")
                    if n not in x.spec.names and w.sizes.get(n, w.sizes[old.label]) == w.sizes[old.label]])
    w.sizes[new] = w.sizes[old.label]
    w.add("rename", [x], Spec(tuple(Dim((Factor(new),)) if d == old else d for d in x.spec.dims)), x.holds,
          x.order)


def cut(w: Writer) -> None:
    """More of a dim, or less of it."""
    x, (before, after) = w.float_(dims=1), [w.one_of((0, 1, 2)) for _ in range(2)]
    old = w.one_of([d for d in x.spec.dims if len(d.factors) == 1])
    name, by = w.one_of((("pad", 1), ("slice", -1)))
    size = w.sizes[old.label] + by * (before + after)
    new = w.one_of([n for n in ("P", "Q", "R")
                    if n not in x.spec.names and w.sizes.get(n, size) == size and size >= 0])
    w.sizes[new] = size
    w.add(name, [x], Spec(tuple(Dim((Factor(new),)) if d == old else d for d in x.spec.dims)),
          "bounded" if x.holds == "positive" else x.holds, x.order, after=after,
          **{"before" if name == "pad" else "start": before})


def of_size(w: Writer, x: Value, size: int) -> Dim:
    """A dim of this size that x lacks."""
    new = w.one_of([n for n in ("P", "Q", "R") if n not in x.spec.names and w.sizes.get(n, size) == size])
    w.sizes[new] = size
    return Dim((Factor(new),))


def windows(w: Writer) -> None:
    """As many as there were, or with a stride, along a dim of another name."""
    x, (before, after, dilation) = w.float_(dims=1, order=3), [w.one_of((0, 1, 2)) for _ in range(3)]
    at = w.one_of([i for i, d in enumerate(x.spec.dims) if len(d.factors) == 1 and w.sizes[d.label]])
    old, stride = x.spec.dims[at], w.one_of((0, 1, 2))
    size = w.one_of((1, 2, 3)) if stride else 1 + (before + after) // max(dilation, 1)
    seen = w.sizes[old.label] + before + after - max(dilation, 1) * (size - 1)
    if seen < 1 or not stride and seen != w.sizes[old.label]:
        raise NotHere
    now = of_size(w, x, (seen - 1) // stride + 1) if stride else old
    new = of_size(w, replace(x, spec=Spec((*x.spec.dims, now) if stride else x.spec.dims)), size)
    w.add("windows", [x], Spec((*x.spec.dims[:at], now, new, *x.spec.dims[at + 1:])), order=x.order,
          before=before, after=after, dilation=max(dilation, 1), stride=max(stride, 1))


def topk(w: Writer) -> None:
    """Of what is given: equal ones may be told apart by how they were rounded."""
    x = w.one_of([v for v in w.values if v.name in w.args and v.holds == "bounded"])
    old = w.one_of([d for d in x.spec.dims if len(d.factors) == 1])
    made = of_size(w, x, w.one_of(range(min(4, w.sizes[old.label] + 1))))
    spec, count = Spec(tuple(made if d == old else d for d in x.spec.dims)), w.sizes[made.label]
    w.record(Step(OPS["topk"], (w.pinned(x.spec),), (spec, spec), (x.name,),
                  tuple(f"{w.prefix}v{next(w.count)}" for _ in range(2)), (("k", count),)), "bounded", 1)
    w.values.pop()                                      # its places are no numbers to go on with


def spread(w: Writer) -> None:
    x = w.float_()
    more = [Dim((Factor(n),)) for n in w.some(BATCH) if n not in x.spec.names][:1]
    w.add("spread", [x], Spec((*more, *x.spec.dims)), x.holds, x.order,
          **({"mean": True} if w.maybe() else {}))


def norm(w: Writer) -> None:
    x = w.one_of([v for v in (w.float_(dims=1),) if len(v.spec.dims[-1].factors) == 1])
    name = w.one_of(("rms_norm", "layer_norm"))
    bias = [w.with_dims(Spec(x.spec.dims[-1:]))] if name == "layer_norm" and w.maybe() else []
    w.add(name, [x, w.with_dims(Spec(x.spec.dims[-1:])), *bias], order=4, eps=1e-6)


def fusible(w: Writer) -> None:
    """What fusions look for: an addition and a norm, or a gate."""
    x = w.one_of([v for v in (w.float_(dims=1, order=3),) if len(v.spec.dims[-1].factors) == 1])
    y = w.with_dims(x.spec)
    if y.order > 3:
        raise NotHere
    if w.maybe():
        y, x = w.add("silu", [y], order=y.order), x
        w.add("mul", [x, y] if w.maybe() else [y, x], order=x.order + y.order)
        return
    total = w.add("add", [x, y], order=4)
    w.add("rms_norm", [total, w.with_dims(Spec(x.spec.dims[-1:]))], order=4, eps=w.one_of((1e-6, 0.5)))


def rope(w: Writer) -> None:
    """A made table has float32's angles, which are off by some 1e-7: no other step takes it, lest it grow."""
    w.add("rope_table", [w.new("B", "start")], "B T H", holds="table", theta=10.0,
          scaling=w.one_of((None, (4.0, 1.0, 2.0, 9))), dtype="float64")
    w.add("rope", [w.with_dims("B T K H", "bounded"), w.with_dims("B T H")], "B T K H")


def attention(w: Writer) -> None:
    q, k, v = (w.with_dims(s, "bounded") for s in ("B T K G H", "B S K H", "B S K V"))
    seen = [w.new("B", "start")] if w.maybe() else []
    if seen and w.maybe():
        seen = [w.add("causal_mask", seen, "B T S", "mask")]
    w.add("attention", [q, k, v, *seen], "B T K G V", "bounded")


def update_cache(w: Writer) -> None:
    w.add("update_cache", [w.with_dims("B S K H"), w.with_dims("B T K H"), w.new("B", "start")], "B S K H",
          order=6)


def embedding(w: Writer) -> None:
    w.add("embedding", [w.new("B T", "V"), w.with_dims("V D", "bounded")], "B T D", "bounded")


def take(w: Writer) -> None:
    x = w.float_(dims=1)
    gone = w.one_of([d for d in x.spec.dims if len(d.factors) == 1 and w.sizes[d.label]])
    rest = Spec(tuple(d for d in x.spec.dims if d != gone))
    w.add("take", [x, w.new(Spec(tuple(w.some(rest.dims))), gone.label)], rest, x.holds, x.order)


def reshard(w: Writer) -> None:
    x = w.float_()
    w.record(Step(RESHARD, (x.spec,), (w.one_of(types(x.spec, tuple(w.mesh.axes)[:2], ())),), (x.name,),
                  (f"v{next(w.count)}",)), x.holds, x.order)


def scan(w: Writer) -> None:
    carry = w.one_of([v for v in (w.float_(dims=1),) if "L" not in v.spec.names])
    stack = w.new(Spec((Dim((Factor("L"),)), *w.some(carry.spec.dims))))
    body = Writer(w.draw, w.sizes, w.mesh, lambda p: True, prefix="b")
    body.args = {"c": w.pinned(carry.spec), "s": w.pinned(Spec(stack.spec.dims[1:]))}
    body.values = [Value("c", carry.spec), Value("s", body.args["s"])]
    write(body, 2, [pointwise, binary, einsum, reduction, softmax, norm, call])
    last = [v for v in body.values if v.holds in FLOATS][-1]
    grown = body.add("einsum", [Value("c", carry.spec), body.add("tanh", [last])], carry.spec)
    out = body.add("tanh", [grown])
    constants = ([w.new(s, body.holds[n]) for n, s in [*body.args.items()][2:]]
                 + [w.new(s, body.holds[n]) for n, s in body.weights.items()])
    body.args.update({n.replace("w.p", "p"): s for n, s in body.weights.items()})
    body.steps = [replace(s, inputs=tuple(i.replace("w.p", "p") for i in s.inputs)) for s in body.steps]
    body.weights = {}
    keep = [last.name.replace("w.p", "p")] if w.maybe() else []
    program = body.program("body", [out.name, *keep])
    inputs = [carry, stack, *constants]
    outs = (carry.spec, *(Spec((stack.spec.dims[0], *s.dims)) for _, s in program.result_leaves()[1:]))
    w.record(Step(SCAN, tuple(w.texts.get(v.name, v.spec) for v in inputs), outs,
                  tuple(v.name for v in inputs), tuple(f"v{next(w.count)}" for _ in outs),
                  (("dim", "L"), ("stacked", 1)), program), "bounded", 1)


def cond(w: Writer) -> None:
    x = w.float_()
    total = w.add("sum", [x], "()", order=6)
    chosen = w.add("greater", [total], holds="mask", than=0.123)
    bodies = []
    for name, op in (("yes", w.one_of(("silu", "relu"))), ("no", w.one_of(("tanh", "sigmoid")))):
        body = Writer(w.draw, w.sizes, w.mesh, lambda p: True, name)
        body.args = {"c": w.pinned(x.spec)}
        made = body.program(name, [body.add(op, [Value("c", x.spec)]).name])
        bodies.append(replace(made, results=(replace(made.results[0], tree=w.pinned(x.spec)),)))
    (made,) = bodies[0].result_leaves()
    w.record(Step(COND, (chosen.spec, w.texts.get(x.name, x.spec)), made[1:], (chosen.name, x.name),
                  (f"v{next(w.count)}",), body=bodies[0], orelse=bodies[1]), "any", x.order)


# -- of every op that one calls ------------------------------------------------------------------------------

HAVE_KINDS = ("einsum", "rename", "reshard", "rope_table", "update_cache")      # of their own
GIVEN = ("argmax", "argmin", "max", "min", "maximum", "minimum", "sort", "std", "sample", "route", "prod",
         "abs", "within_capacity")
"""Ops that jump, or bend, where what is made may be rounded to either side: they take what is given."""


def callable_case(case: Case) -> bool:
    """Whether a program may have this call, at sizes that are drawn: in float64, of no ragged dim."""
    name, narrow = case.op.name, dict(case.attrs).get("dtype") in ("float32", "bfloat16")
    called = name in BY_OPERATORS or any(hasattr(m, name) for m in (functions, ops))
    ragged = any(d.ragged for s in (*case.ins, *case.outs) for d in s.dims)
    left_out = name in HAVE_KINDS or name.endswith("_vjp") or case.op.lengths or case.tolerance > 1e-9
    return called and not (left_out or narrow or ragged)


BY_OPERATORS = ("filled", "compare", "scale", "shift")
CALLS: dict[str, list[Case]] = {}
for _case in filter(callable_case, CASES):
    CALLS.setdefault(_case.op.name, []).append(_case)


def call(w: Writer) -> None:
    """Any op, as its cases call it, its operands being what there is, where they take any number."""
    case = w.one_of(CALLS[w.one_of([*CALLS])])
    if not all(w.sizes.get(n) for s in (*case.ins, *case.outs) for n in s.names):
        raise NotHere                # of nothing: `tests/test_rules_oracle.py` has that of each op by itself
    inputs, kinds = [], []
    for spec, draw in itertools.zip_longest(case.ins, case.draws, fillvalue=normal):
        holds = {normal: "bounded", positive: "positive", mask: "mask"}.get(draw, draw)
        try:
            drawn = draw([w.sizes[n] for n in spec.names], w.sizes, torch.Generator(), [])
        except (ValueError, RuntimeError):
            raise NotHere from None  # more than there are
        kinds.append(str(drawn.dtype)[6:])
        inputs.append(w.new(spec, holds) if holds is draw or case.op.name in GIVEN else
                      w.with_dims(spec, *(() if holds == "bounded" else (holds,))))
    if any(v.order > 3 for v in inputs):
        raise NotHere
    ins, outs = case.ins, case.outs
    if case.op.takes_text:
        ins, outs = tuple(map(w.pinned, ins)), tuple(map(w.pinned, outs))
    made = w.results(Step(case.op, ins, outs, tuple(v.name for v in inputs),
                          tuple(f"{w.prefix}v{next(w.count)}" for _ in outs), case.attrs))
    for v in made:
        w.values.remove(v)
    kinds = step_dtypes(w.steps[-1], kinds)
    w.values += [replace(v, holds="mask" if kind == "bool" else "any" if kind == "float64" else "ids",
                         order=1 + max((v.order for v in inputs), default=1))
                 for v, kind in zip(made, kinds)]


def met(w: Writer) -> None:
    """Two values that meet by the names of their dims, whichever each of them lacks."""
    name, x, y = w.one_of(("add", "sub", "mul")), w.float_(order=3), w.float_(order=3)
    try:
        OPS[name].infer((x.spec, y.spec), {})
    except SpecError:
        raise NotHere from None      # of two orders, or none
    if name == "add" and w.maybe():
        w.add("compare", [x, w.new(y.spec)] if x.name in w.holds else [w.new(x.spec), w.new(y.spec)],
              holds="mask", sign=w.one_of((">", "<=", "==")))
    w.add(name, [x, y], order=x.order + y.order)


def pieces(w: Writer) -> None:
    """Side by side, or one behind the other, and apart again."""
    x = w.float_(dims=1)
    old = w.one_of([d for d in x.spec.dims if len(d.factors) == 1])
    other, at = w.with_dims(x.spec), x.spec.dims.index(old)
    if w.maybe():
        new = of_size(w, x, 2)
        both = w.add("stack", [x, other], Spec((*x.spec.dims[:at], new, *x.spec.dims[at:])),
                     order=max(x.order, other.order))
        apart = (x.spec, x.spec)
    else:
        new = of_size(w, x, 2 * w.sizes[old.label])
        long = Spec(tuple(new if d == old else d for d in x.spec.dims))
        both = w.add("concat", [x, other], long, order=max(x.order, other.order))
        part = of_size(w, replace(x, spec=Spec((*x.spec.dims, new))), w.sizes[old.label])
        apart = (x.spec, Spec(tuple(part if d == old else d for d in x.spec.dims)))
    if w.maybe():
        w.results(Step(OPS["unbind" if apart[0] == apart[1] else "split"], (both.spec,), apart, (both.name,),
                       tuple(f"{w.prefix}v{next(w.count)}" for _ in apart)), order=both.order)


def experts(w: Writer) -> None:
    """Rows to the experts that were chosen for them, and home."""
    if not all(w.sizes[n] for n in "TDFV") or w.sizes["V"] < w.sizes["J"]:
        raise NotHere
    x, up, weights = w.with_dims("T D"), w.with_dims("V D F"), []
    if x.order + up.order > 3:
        raise NotHere
    if w.maybe():
        chosen, weights = w.new("T J", distinct("V")), [w.with_dims("T J")] if w.maybe() else []
    else:
        spec, route = parse("T J"), tuple(sorted({**SOFTMAX, "top_k": w.sizes["J"]}.items()))
        weighs, chosen = (Value(f"{w.prefix}v{next(w.count)}", spec) for _ in range(2))
        weights = [weighs]
        w.steps.append(Step(OPS["route"], (parse("T V"),), (spec, spec), (w.new("T V").name,),
                            (weighs.name, chosen.name), route))
    rows, at, hidden, bent = (f"{w.prefix}v{next(w.count)}" for _ in range(4))
    ragged, one = (parse("(V T)~J D"), parse("(V T)~J")), parse("(V T)~J F")
    w.steps += [Step(OPS["dispatch"], (x.spec, chosen.spec), ragged, (x.name, chosen.name), (rows, at)),
                Step(OPS["grouped_einsum"], (*ragged, up.spec), (one,), (rows, at, up.name), (hidden,)),
                Step(OPS["tanh"], (one,), (one,), (hidden,), (bent,))]
    w.add("combine", [Value(bent, one), Value(at, ragged[1]), *weights], "T F", order=3)


KINDS = [pointwise, binary, compare, where, einsum, einsum, reduction, two_reductions, argmax, softmax,
         rearrange, rename, cut, windows, topk, spread, norm, fusible, rope, attention, update_cache,
         embedding, take, reshard, scan, cond, met, pieces, experts, *[call] * 8]


def write(w: Writer, count: int, kinds: Sequence[Callable[[Writer], None]]) -> None:
    for _ in range(count):
        if w.draw(st.integers(0, 7)) == 0:          # drawn for each step, so that shrinking can cut one out
            break
        try:
            w.one_of(kinds)(w)
        except NotHere:
            continue
