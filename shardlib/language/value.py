"""Values of a traced function, and the calls that are made on them.

>>> from shardlib.language.trace import Tracer
>>> from shardlib.spec import parse
>>> tracer = Tracer()
>>> with active(tracer):
...     tracer.new(parse("B D"), "x") + tracer.new(parse("D"), "b")
Value(B D)
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor

from shardlib.errors import SpecError
from shardlib.language.arithmetic import BINARY, with_number
from shardlib.language.calls import what
from shardlib.language.comparison import COMPARE, LOGICAL, NOT, SIGNS, against_number
from shardlib.language.unary import OPS as UNARY
from shardlib.language.unary import power
from shardlib.program import Op, Program
from shardlib.reference import check_operands
from shardlib.spec import Dim, Spec, parse_specs


class Calls(Protocol):
    """Whoever takes the calls of ops: one that records them, or one that executes them."""

    def call(self, op: Op, operands: Sequence[Any], text: str | None, ins: Sequence[Spec] | None,
             outs: Sequence[Spec] | None, attrs: dict[str, Any], body: Program | None = None,
             orelse: Program | None = None, called: str = "") -> Any: ...


ACTIVE: ContextVar[Calls | None] = ContextVar("tracer", default=None)


class NoMethod(SpecError, AttributeError):
    """What a traced value is asked for, and torch's tensors have."""


class Value:
    """A tensor in a traced function: dims by name, no data. Arithmetic on it records steps."""
    __slots__ = ("tracer", "id", "spec", "text", "local", "key")

    def __init__(self, tracer: Any, ident: int, spec: Spec) -> None:
        self.tracer, self.id, self.spec = tracer, ident, spec

    def __repr__(self) -> str:
        return f"Value({self.spec})"

    def __add__(self, other: Any) -> Value: return _arithmetic("add", self, other)
    def __radd__(self, other: Any) -> Value: return _arithmetic("add", other, self)
    def __sub__(self, other: Any) -> Value: return _arithmetic("sub", self, other)
    def __rsub__(self, other: Any) -> Value: return _arithmetic("sub", other, self)
    def __mul__(self, other: Any) -> Value: return _arithmetic("mul", self, other)
    def __rmul__(self, other: Any) -> Value: return _arithmetic("mul", other, self)
    def __truediv__(self, other: Any) -> Value: return _arithmetic("div", self, other)
    def __rtruediv__(self, other: Any) -> Value: return _arithmetic("div", other, self)
    def __neg__(self) -> Value: return _arithmetic("mul", self, -1)
    def __pos__(self) -> Value: return self

    def __bool__(self) -> bool:
        raise SpecError("if: a traced value has no truth; a branch on data would let ranks part ways; use "
                        "where(mask, a, b)")

    def __getattr__(self, name: str) -> Any:
        raise NoMethod(
            f"{name}: a traced value has dims by name and no methods; write it with the ops of shardlib")

    def __gt__(self, other: Any) -> Value: return compare("greater", self, other)
    def __lt__(self, other: Any) -> Value: return compare("less", self, other)
    def __ge__(self, other: Any) -> Value: return compare("greater_equal", self, other)
    def __le__(self, other: Any) -> Value: return compare("less_equal", self, other)
    def __and__(self, other: Any) -> Value: return _logical("logical_and", self, other)
    def __or__(self, other: Any) -> Value: return _logical("logical_or", self, other)
    def __invert__(self) -> Value: return apply(NOT, (self,))
    def __abs__(self) -> Value: return apply(UNARY["abs"], (self,))

    def __pow__(self, by: Any) -> Value:
        op, attrs = power(by)
        return apply(op, (self,), **attrs)

    def _equal(self, other: Any) -> bool:
        raise SpecError("==: a traced value has no numbers yet; equal(x, y) and not_equal(x, y) make masks")

    def _no_operator(self, *_: Any) -> Any:
        raise SpecError("a traced value has + - * / < <= > >= with values and numbers, ** with a number "
                        "and, as a mask, & | ~; write the rest with functions: where(mask, a, b)")

    __rpow__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __round__ = _no_operator
    __rand__ = __ror__ = __xor__ = __rxor__ = _no_operator

    __eq__ = __ne__ = _equal
    __hash__ = object.__hash__

    def __matmul__(self, other: Any) -> Value:
        raise SpecError(
            'matmul: "@" does not say which dims it contracts; write einsum("B T D, D F -> B T F", x, w)')

    __rmatmul__ = __matmul__

    def _no_number(self, *_: Any) -> Any:
        raise SpecError(
            "a traced value has dims by name and no numbers yet; it is not indexed, iterated over, or read")

    __getitem__ = __iter__ = __len__ = __float__ = __int__ = __index__ = __array__ = _no_number

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> Any:
        raise SpecError(f"torch.{getattr(function, '__name__', function)}: it is called on a traced value; "
                        "the ops of shardlib know what a split and an owed sum are, those of torch do not")


# what an op takes: a Value. A field of Params is one in a trace; its class says Tensor
Operand = Value | Tensor


def _arithmetic(name: str, a: Any, b: Any) -> Value:
    if isinstance(a, Value) and isinstance(b, Value):
        return apply(BINARY[name], (a, b))
    value, number = (a, b) if isinstance(a, Value) else (b, a)
    for op, attrs in with_number(name, number, left=value is b):
        value = apply(op, (value,), **attrs)
    return value


def compare(name: str, x: Any, other: Any) -> Value:
    """The mask of where x is `name`, as in "greater", than another value, or than a number."""
    if isinstance(other, Value) or not isinstance(x, Value):
        return apply(COMPARE, (x, other), sign=SIGNS[name])
    op, attrs = against_number(name, other)
    return apply(op, (x,), **attrs)


def _logical(name: str, x: Value, other: Any) -> Value:
    if not isinstance(other, Value):
        raise SpecError(f"{name}: the other mask is {what(other)}, not a tensor of the traced function")
    return apply(LOGICAL[name], (x, other))


def tracing() -> bool:
    """Whether a @sharded function is being traced, or run op by op."""
    return ACTIVE.get() is not None


@contextmanager
def active(tracer: Calls) -> Iterator[None]:
    """Ops called inside go to `tracer`."""
    token = ACTIVE.set(tracer)
    try:
        yield
    finally:
        ACTIVE.reset(token)


def apply(op: Op, operands: Sequence[Any], text: str | None = None, *, ins: Sequence[Spec] | None = None,
          outs: Sequence[Spec] | None = None, body: Program | None = None, orelse: Program | None = None,
          called: str = "", **attrs: Any) -> Any:
    """One call of `op`: by its spec string `text`, or with specs inferred from its operands. Its results."""
    tracer = ACTIVE.get()
    if tracer is None:
        raise SpecError(f"{op.name} was called outside of a @sharded function; put the computation into one, "
                        "and call that")
    return tracer.call(op, operands, text, ins, outs, attrs, body, orelse, called)


def specs_of(op: Op, operands: Sequence[Value], text: str | None, ins: Sequence[Spec] | None,
             outs: Sequence[Spec] | None, attrs: dict[str, Any],
             names: Sequence[str]) -> tuple[tuple[Spec, ...], tuple[Spec, ...]]:
    """Of a call's operands and results: those of its text, those given,
    or whole operands and what the op infers from them. SpecError for more or fewer than it takes."""
    check_operands(op, len(operands))
    if text is not None:
        return bind(op.name, text, operands, names)
    if ins is not None and outs is not None:
        return tuple(ins), tuple(outs)
    whole = tuple(v.spec.whole() for v in operands)
    return whole, op.inferred(whole, attrs)


def bind(op: str, text: str, operands: Sequence[Value],
         names: Sequence[str]) -> tuple[tuple[Spec, ...], tuple[Spec, ...]]:
    """Operand and result specs of `text`, its dims checked against the operands',
    "..." replaced by the dims it stands for."""
    whole = text if operands or "->" in text else f"-> {text}"      # constants say their result alone
    ins, outs = parse_specs(whole, f'{op} "{text}": "*" belongs in the signature of a @sharded function')
    if len(ins) != len(operands):
        raise SpecError(
            f'{op} "{text}": the text has {len(ins)} operand specs, {len(operands)} operands were given')
    dots: tuple[Dim, ...] | None = None
    for spec, value in zip(ins, operands):
        if spec.ellipsis:
            here = value.spec.whole().dims[:len(value.spec.dims) - len(spec.dims)]
            if dots is not None and here != dots:
                raise SpecError(f'{op} "{text}": "..." stands for {Spec(dots)} in one operand, for '
                                f'{Spec(here)} in another')
            dots = here
    if dots is None and any(s.ellipsis for s in outs):
        raise SpecError(
            f'{op} "{text}": "..." in the result stands for dims of an operand, and no operand has it')

    def open_(spec: Spec) -> Spec:
        return Spec((*(dots or ()), *spec.dims), spec.owed) if spec.ellipsis else spec
    ins, outs = tuple(map(open_, ins)), tuple(map(open_, outs))
    for i, (spec, value) in enumerate(zip(ins, operands)):
        check_dims(f'{op} "{text}": {names[i] or f"operand {i + 1}"}', spec, value)
    return ins, outs


def check_dims(who: str, spec: Spec, value: Any) -> None:
    """SpecError unless `value` has the dims of `spec`, in order."""
    if not isinstance(value, Value):
        raise SpecError(f"{who} is {what(value)}, not a tensor of the traced function")
    if spec.labels != value.spec.labels:
        raise SpecError(f"{who} has dims {Spec(value.spec.whole().dims)}, not {Spec(spec.whole().dims)}")
