"""Parameters: frozen dataclasses whose fields say their specs.

>>> class Mlp(Params):
...     up: Tensor = param("D F")
...     down: Tensor = param("F D")
>>> class Net(Params):
...     layers: Mlp = stacked("L", Mlp)
...     norm: Tensor = param("D", initial="ones")
>>> [(path, str(spec)) for path, spec in struct(Net).leaves("w")]
[('w.layers.up', 'L D F'), ('w.layers.down', 'L F D'), ('w.norm', 'D')]

A field holds whatever a use needs: tensors, one rank's shards, specs. Unset fields are None, and absent.
`init` draws each element from (seed, path, global index) alone, so that a shard is a slice of the whole on
every mesh.
"""
from __future__ import annotations

import dataclasses
import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, ClassVar, dataclass_transform

import torch
from torch import Tensor

from shardlib.errors import SpecError
from shardlib.mesh import Mesh, check_sizes
from shardlib.spec import Dim, Spec, heading, nameable, parse
from shardlib.tree import Struct

INITIAL = ("normal", "ones", "zeros")


def param(spec: str, *, initial: str = "normal", scale: float | None = None, init: str | None = None,
          default: None = None) -> Any:
    """A field holding a tensor with dims `spec`; `init` fills it with `initial`: "normal", "ones" or "zeros".

    `scale`: standard deviation of "normal"; by default 1/sqrt(first dim's size), of a group all of it, 1 for
    a scalar.
    `default=None` changes nothing here: by it a checker of types knows that the field may be left out.

    >>> from shardlib import init
    >>> class Weights(Params):
    ...     norm: Tensor = param("D", initial="ones")
    ...     table: Tensor = param("V D", scale=0.02)
    >>> made = init(Weights, dict(D=4, V=1000))
    >>> made.norm, round(made.table.std().item(), 2)
    (tensor([1., 1., 1., 1.]), 0.02)
    """
    if init is not None:
        warnings.warn(f'param({spec!r}): init= is now initial=; a checker of types takes init for a word of '
                      'dataclasses', DeprecationWarning, stacklevel=2)
        initial = init
    if initial not in INITIAL:
        raise SpecError(f"param({spec!r}): initial is {initial!r}; it is one of {', '.join(INITIAL)}")
    kind = parse(spec)
    if kind.ellipsis:
        raise SpecError(f'param("{kind}"): "..." stands for dims of an operand; a parameter names its own')
    return field(default=None, metadata={"spec": kind, "initial": initial, "scale": scale})


def stacked(dim: str, of: type[Params]) -> Any:
    """A field holding many `of`, stacked along a leading `dim`: what `scan` runs over.

    >>> from shardlib import scan, sharded
    >>> class Layer(Params):
    ...     gain: Tensor = param("D")
    >>> class Net(Params):
    ...     layers: Layer = stacked("L", Layer)
    >>> @sharded("D, * -> D")
    ... def layer(x, w: Layer):
    ...     return x * w.gain
    >>> net = sharded("D, * -> D")(lambda x, w: scan(layer, x, w.layers))
    >>> net(torch.ones(2), Net(layers=Layer(gain=torch.tensor([[2.0, 3.0], [5.0, 7.0]]))))
    tensor([10., 21.])
    """
    kind = parse(dim)
    if len(kind.dims) != 1 or len(kind.names) != 1 or kind.owed or kind.ellipsis:
        raise SpecError(
            f'stacked("{kind}"): the dim along which they are stacked is one name, as in stacked("L", Block)')
    if not (isinstance(of, type) and issubclass(of, Params)):
        raise SpecError(f'stacked("{kind}"): what is stacked is a class of Params, not {of!r}')
    return field(default=None, metadata={"stack": kind.dims[0], "of": of})


def nested(of: type[Params]) -> Any:
    """A field holding one `of`: a pytree in a pytree.

    >>> from shardlib import sharded
    >>> class Affine(Params):
    ...     gain: Tensor = param("D")
    ...     bias: Tensor = param("D")
    >>> class Two(Params):
    ...     first: Affine = nested(Affine)
    ...     second: Affine = nested(Affine)
    >>> both = sharded("D, * -> D")(lambda x, w: x * w.first.gain + w.second.bias)
    >>> one = Affine(gain=torch.tensor([2.0]), bias=torch.tensor([3.0]))
    >>> both(torch.ones(1), Two(first=one, second=one))
    tensor([5.])
    """
    if not (isinstance(of, type) and issubclass(of, Params)):
        raise SpecError(f"nested: what is nested is a class of Params, not {of!r}")
    return field(default=None, metadata={"of": of})


@dataclass_transform(field_specifiers=(param, stacked, nested), frozen_default=True, eq_default=False)
class Params:
    """Base of parameter pytrees: a subclass becomes a frozen dataclass of fields that are a `param`, many
    pytrees `stacked`, or one `nested`.

    In a signature it is `*`. A field that is not set is None, and no argument of the program.

    >>> from shardlib import einsum, sharded
    >>> class Linear(Params):
    ...     w: Tensor = param("D F")
    ...     bias: Tensor = param("F", initial="zeros")
    >>> @sharded("B D, * -> B F")
    ... def linear(x, p: Linear):
    ...     y = einsum("B D, D F -> B F", x, p.w)
    ...     return y if p.bias is None else y + p.bias
    >>> linear(torch.ones(1, 2), Linear(w=torch.ones(2, 3), bias=torch.arange(3.0)))
    tensor([[2., 3., 4.]])
    >>> linear(torch.ones(1, 2), Linear(w=torch.ones(2, 3)))
    tensor([[2., 2., 2.]])
    """
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]       # of each subclass

    def __init_subclass__(cls) -> None:
        if not heading(cls.__name__):
            raise SpecError(f"Params: {cls.__name__!r} is no name for a class; use letters, digits and _, "
                            "and no __2 at the end")
        fields = cls.__dict__.get("__annotations__", {})
        for name in fields if isinstance(fields, dict) else ["__annotations__"]:
            # dataclasses write field names into code that they run
            if not nameable(name) or name.startswith("__"):
                raise SpecError(f"{cls.__name__}: {name!r} is no name for a field; use letters, digits and _")
        dataclass(frozen=True, eq=False)(cls)
        for f in dataclasses.fields(cls):
            if "spec" not in f.metadata and "of" not in f.metadata:
                raise SpecError(f"{cls.__name__}.{f.name}: a field of Params is a param(...), a stacked(...) "
                                "or a nested(...)")


def struct(cls: type[Params] | Params, prefix: tuple[Dim, ...] = (), stacked: str = "") -> Struct:
    """The specs of a Params class; of an instance: those of the fields that are set,
    and that hold a Spec as they say."""
    if isinstance(cls, type):
        return _known_struct(cls, None, prefix, stacked)
    return _struct(type(cls), cls, prefix, stacked)


def _struct(kind: type[Params], tree: Params | None, prefix: tuple[Dim, ...], stacked: str) -> Struct:
    out: list[tuple[str, Any]] = []
    for f in dataclasses.fields(kind):
        value = None if tree is None else getattr(tree, f.name)
        if tree is not None and value is None:
            continue
        if "of" in f.metadata:
            inner = f.metadata["of"] if value is None else value
            stack = f.metadata.get("stack")
            out.append((f.name, struct(inner, (*prefix, *([stack] if stack else ())),
                                       stack.label if stack else "")))
        elif isinstance(value, Spec):
            out.append((f.name, value))
        else:
            spec = f.metadata["spec"]
            out.append((f.name, Spec((*prefix, *spec.dims), spec.owed)))
    return Struct(kind.__name__, tuple(out), stacked)


_known_struct: Callable[..., Struct] = lru_cache(maxsize=1024)(_struct)     # a class always has the same


def fill(like: type[Params] | Params, path: str, leaf: Callable[[str], Any]) -> Any:
    """An instance with the structure of `like`, each leaf `leaf(path)`."""
    kind = like if isinstance(like, type) else type(like)
    values = {}
    for f in dataclasses.fields(kind):
        value = None if isinstance(like, type) else getattr(like, f.name)
        if not isinstance(like, type) and value is None:
            continue
        here = f"{path}.{f.name}"
        values[f.name] = (fill(f.metadata["of"] if value is None else value, here, leaf) if "of" in f.metadata
                          else leaf(here))
    return kind(**values)


def tree_map(f: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`f` of each leaf of a pytree, and of the leaf that each of `others` has in its place: a pytree of the
    same class. What is no pytree is one leaf. On tensors, and in `@sharded` functions.

    >>> class Weights(Params):
    ...     up: Tensor = param("D F")
    ...     down: Tensor = param("F D")
    >>> from shardlib import sharded
    >>> @sharded("*, *, () -> *")
    ... def sgd(w: Weights, g: Weights, rate):
    ...     return tree_map(lambda w, g: w - g * rate, w, g)
    >>> ones = Weights(up=torch.ones(1, 2), down=torch.ones(2, 1))
    >>> sgd(ones, tree_map(torch.neg, ones), torch.tensor(0.5)).up
    tensor([[1.5000, 1.5000]])
    """
    if wrong := next((o for o in others if _shape(o) != _shape(tree)), None):
        raise SpecError(f"tree_map: a {type(tree).__name__} beside a {type(wrong).__name__}; they have the "
                        "same fields, and the same ones set")
    if not isinstance(tree, Params):
        return f(tree, *others)
    return unflat(tree, (f(*leaves) for leaves in zip(*map(flat, (tree, *others)))))


def _shape(tree: Any) -> Any:
    return present(tree) if isinstance(tree, Params) else None


def leaf_values(tree: Params, path: str) -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf that is set, in the order of `struct(...).leaves`."""
    for name in _field_names(type(tree)):
        value = getattr(tree, name)
        if isinstance(value, Params):
            yield from leaf_values(value, f"{path}.{name}")
        elif value is not None:
            yield f"{path}.{name}", value


_field_names: Callable[[type], tuple[str, ...]] = cache(
    lambda kind: tuple(f.name for f in dataclasses.fields(kind)))


def flat(tree: Params) -> list[Any]:
    """The leaves that are set, in order."""
    out = []
    for name in _field_names(type(tree)):
        value = getattr(tree, name)
        if isinstance(value, Params):
            out += flat(value)
        elif value is not None:
            out.append(value)
    return out


def present(tree: Params) -> tuple[Any, ...]:
    """Which fields are set, here and further in: equal for two pytrees of one class exactly if
    they have the same leaves."""
    out: list[Any] = []
    for name in _field_names(type(tree)):
        value = getattr(tree, name)
        if value is not None:
            out.append((name, present(value)) if isinstance(value, Params) else name)
    return tuple(out)


def unflat(like: Params, leaves: Iterator[Any]) -> Any:
    """An instance with the structure of `like`, its leaves taken from `leaves`."""
    values = {}
    for name in _field_names(type(like)):
        value = getattr(like, name)
        if value is not None:
            values[name] = unflat(value, leaves) if isinstance(value, Params) else next(leaves)
    return type(like)(**values)


def named_leaves(name: str, arg: Any) -> list[tuple[str, Any]]:
    """(path, value) of every leaf of an argument, a tensor or a pytree."""
    return list(leaf_values(arg, name)) if isinstance(arg, Params) else [(name, arg)]


def flat_leaves(arg: Any) -> list[Any]:
    """The leaves of an argument, a tensor or a pytree."""
    return flat(arg) if isinstance(arg, Params) else [arg]


def rebuild(leaves: Iterable[Any], results: Sequence[Any]) -> Any:
    """Leaves put back into what `results` are like: a pytree, its class, or anything else for a tensor.

    One of them, or a tuple.
    """
    it = iter(leaves)
    made = tuple(unflat(r, it) if isinstance(r, Params) else fill(r, "", lambda _: next(it))
                 if isinstance(r, type) else next(it) for r in results)
    return made if len(made) > 1 else made[0]


def leaf_dtypes(leaves: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """path -> dtype, as programs write it: "bfloat16"."""
    return {path: str(v.dtype).removeprefix("torch.") for path, v in leaves}


def init(like: type[Params] | Params, sizes: Mapping[str, int], types: Mapping[str, Spec] | None = None, *,
         mesh: Mesh | None = None, coordinate: Mapping[str, int] | None = None, seed: int = 0,
         dtype: torch.dtype = torch.float32, path: str = "w", device: torch.device | str = "cpu") -> Any:
    """Parameters drawn at random: the shards that `coordinate` holds of leaves with `types`; by default all.

    An element is drawn by (seed, path, its index in the whole): a shard is a slice of the whole.

    >>> class Mlp(Params):
    ...     up: Tensor = param("D F")
    >>> sizes = dict(D=4, F=6)
    >>> piece = init(Mlp, sizes, {"w.up": parse("D F/tp")}, mesh=Mesh(tp=2), coordinate=dict(tp=1))
    >>> torch.equal(piece.up, init(Mlp, sizes).up[:, 3:])
    True
    """
    if not (isinstance(like, Params) or isinstance(like, type) and issubclass(like, Params)):
        raise SpecError(f"init: what it draws is a class of Params, or an instance, not {like!r}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SpecError(f"init: dtype is {dtype!r}; it is a floating-point dtype of torch")
    check_sizes(sizes)
    mesh, coordinate = mesh or Mesh(), coordinate or {}
    rows = {**_metadata(like, path)}
    if missing := [n for spec, _ in rows.values() for n in spec.names if n not in sizes]:
        raise SpecError(f"init: no size of {missing[0]}; sizes has {', '.join(sizes) or 'none'}: "
                        f"sizes=dict({missing[0]}=...)")

    def leaf(name: str) -> Tensor:
        spec, meta = rows[name]
        kind = (types or {}).get(name, spec.whole())
        shape = mesh.local_shape(kind, sizes, coordinate)
        if meta["initial"] != "normal":
            return torch.full(shape, float(meta["initial"] == "ones"), dtype=dtype, device=device)
        drawn = normal(kind, sizes, mesh, coordinate, zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1))
        fan = math.prod(mesh.local_shape(Spec(meta["spec"].dims[:1]).whole(), sizes, {}))
        return (drawn * (meta["scale"] if meta["scale"] is not None else 1 / math.sqrt(max(fan, 1)))).to(
            device, dtype)
    return fill(like, path, leaf)


def _metadata(like: type[Params] | Params, path: str) -> dict[str, tuple[Spec, Mapping]]:
    kind = like if isinstance(like, type) else type(like)
    specs = dict(struct(like).leaves(path))
    out = {}
    for f in dataclasses.fields(kind):
        here = f"{path}.{f.name}"
        if "of" in f.metadata:
            value = None if isinstance(like, type) else getattr(like, f.name)
            inner = _metadata(f.metadata["of"] if value is None else value, here)
            out.update({n: (specs.get(n, s), m) for n, (s, m) in inner.items()})
        elif here in specs:
            out[here] = (specs[here], f.metadata)
    return out


def normal(spec: Spec, sizes: Mapping[str, int], mesh: Mesh, coordinate: Mapping[str, int],
           seed: int) -> Tensor:
    """Standard normal numbers, float32, each a function of (seed, global index):
    a shard is a slice of the whole."""
    index = global_index(spec, sizes, mesh, coordinate)
    u1, u2 = uniform(index, 2 * seed), uniform(index, 2 * seed + 1)
    return (torch.sqrt(-2 * torch.log(u1)) * torch.cos(2 * math.pi * u2)).float()


def global_index(spec: Spec, sizes: Mapping[str, int], mesh: Mesh, coordinate: Mapping[str, int]) -> Tensor:
    """The row-major global index (int64) of every element that `coordinate` holds."""
    index = torch.zeros((), dtype=torch.int64, device="cpu")
    for dim in spec.dims:
        _, whole = mesh.rows(dim.split(()), sizes, {})
        start, size = mesh.rows(dim, sizes, coordinate)
        index = index[..., None] * whole + torch.arange(start, start + size, device="cpu")
    return index


def uniform(index: Tensor, seed: int) -> Tensor:
    """Uniform float64 numbers in (0, 1), by `mixed` of (seed, index)."""
    z = mixed((index + 1) * GOLDEN + _wrap(seed * 0xD1B54A32D192ED03))
    return (_shift(z, 11).double() + 0.5) / (1 << 53)


def mixed(z: Tensor) -> Tensor:
    """64 random bits of 64 bits (int64), by the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shift(z, shift)) * _wrap(factor)
    return z ^ _shift(z, 31)


def _wrap(n: int) -> int:
    n &= (1 << 64) - 1
    return n - (1 << 64) if n >> 63 else n


GOLDEN = _wrap(0x9E3779B97F4A7C15)      # the step of SplitMix64: 2^64 over the golden ratio


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)
