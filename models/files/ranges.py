"""Which bytes of a stored tensor a rank needs: a pure function of types.

>>> from shardlib.mesh import Mesh
>>> from shardlib.spec import parse
>>> entry = TensorEntry("up", file="m", offset=1000, shape=(6, 4), dtype="F32", block=1, block_bytes=4)
>>> for coordinate in ({"tp": 0}, {"tp": 1}):
...     print(read_ranges(entry, parse("F D"), parse("D F/tp"), {"D": 4, "F": 6}, Mesh(tp=2), coordinate))
[ByteRange(file='m', offset=1000, length=48)]
[ByteRange(file='m', offset=1048, length=48)]

A group such as (K G H) is cut by its factors. Where a file interleaves the halves of H, as GGUF does for
rotary dims, the stored spec says (K G H_pair H_half): element (pair, half) there is number half * H/2 + pair
of our H. Quantised rows are read in whole blocks: of a run of neighbours, at most one block more than its
elements would fill.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from typing import NamedTuple

from shardlib.mesh import Mesh
from shardlib.models.files.checkpoint import TensorEntry
from shardlib.spec import Spec

PAIR, HALF = "_pair", "_half"


class ByteRange(NamedTuple):
    """`length` bytes of `file`, from byte `offset` on."""
    file: str
    offset: int
    length: int


class Span(NamedTuple):
    """Positions `start` to `start + size` of a dim."""
    start: int
    size: int


class Box(NamedTuple):
    """A block of a stored tensor: a span of each of its names, and the names' full sizes."""
    names: tuple[str, ...]
    spans: tuple[Span, ...]
    sizes: tuple[int, ...]

    def with_span(self, i: int, start: int, size: int) -> Box:
        """The same box with `size` positions of its i-th span, from its `start`-th on."""
        span = Span(self.spans[i].start + start, size)
        return self._replace(spans=self.spans[:i] + (span,) + self.spans[i + 1:])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(span.size for span in self.spans)

    @property
    def first_in_run(self) -> int:
        """From this name on the box is one run of neighbours in the file;
        of the names before, each position is its own."""
        i = len(self.spans) - 1
        while i > 0 and self.spans[i] == (0, self.sizes[i]):
            i -= 1
        return i

    def runs(self) -> Iterator[Span]:
        """The runs of neighbouring elements, in order; all have the same size."""
        if 0 in self.shape:
            return
        first = self.first_in_run
        strides = [prod(self.sizes[i + 1:]) for i in range(len(self.sizes))]
        inner = self.spans[first].start * strides[first]
        size = self.spans[first].size * strides[first]
        for position in product(*(range(s.start, s.start + s.size) for s in self.spans[:first])):
            yield Span(inner + sum(p * stride for p, stride in zip(position, strides)), size)


def base(name: str) -> str:
    """Our name of a stored one: H of H_pair and H_half."""
    return name.removesuffix(PAIR).removesuffix(HALF)


def spans_of(type: Spec, sizes: Mapping[str, int], mesh: Mesh,
             coordinate: Mapping[str, int]) -> dict[str, Span]:
    """What `coordinate` holds of each name of `type`."""
    factors = [f for dim in type.dims for f in dim.factors]
    return {f.name: Span(*mesh.extent(sizes[f.name], f.axes, coordinate)) for f in factors}


def stored_sizes(stored: Spec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The size of each name of `stored`."""
    return tuple(2 if n.endswith(HALF) else sizes[base(n)] // 2 if n.endswith(PAIR) else sizes[n]
                 for n in stored.names)


def boxes(stored: Spec, spans: Mapping[str, Span], sizes: Mapping[str, int]) -> list[Box]:
    """The blocks of the stored tensor that together are `spans`:
    one, or two where a span cuts interleaved halves."""
    choices = [{}]
    for name in stored.names:
        if name.endswith(HALF):
            choices = [{**c, **halves} for c in choices
                       for halves in _halves(base(name), spans[base(name)], sizes[base(name)])]
        elif not name.endswith(PAIR):
            choices = [{**c, name: spans[name]} for c in choices]
    full = stored_sizes(stored, sizes)
    return [Box(stored.names, tuple(c[n] for n in stored.names), full) for c in choices]


def _halves(name: str, span: Span, size: int) -> list[dict[str, Span]]:
    """The pairs of each half that lie in `span`."""
    if span == (0, size):
        return [{name + HALF: Span(0, 2), name + PAIR: Span(0, size // 2)}]
    found = []
    for half in range(2):
        low = max(span.start, half * size // 2)
        high = min(span.start + span.size, (half + 1) * size // 2)
        found.append(
            {name + HALF: Span(half, 1), name + PAIR: Span(low - half * size // 2, max(0, high - low))})
    return [f for f in found if f[name + PAIR].size]


def byte_range(entry: TensorEntry, run: Span) -> ByteRange:
    """The whole blocks that hold `run`."""
    first, last = run.start // entry.block, -(-(run.start + run.size) // entry.block)
    return ByteRange(entry.file, entry.offset + first * entry.block_bytes, (last - first) * entry.block_bytes)


def read_ranges(entry: TensorEntry, stored: Spec, type: Spec, sizes: Mapping[str, int], mesh: Mesh,
                coordinate: Mapping[str, int]) -> list[ByteRange]:
    """What `coordinate` reads of the stored tensor for its shard of a leaf of `type`, in order,
    neighbours merged.

    Names of `type` that are not in `stored` (L, of which each layer is stored apart) are left aside.
    """
    found = boxes(stored, spans_of(type, sizes, mesh, coordinate), sizes)
    return merged(sorted(byte_range(entry, run) for box in found for run in box.runs()))


def merged(ranges: list[ByteRange]) -> list[ByteRange]:
    """Sorted ranges of one file, those that touch or overlap joined."""
    out: list[ByteRange] = []
    for file, offset, length in ranges:
        if out and offset <= out[-1].offset + out[-1].length:
            length = max(out[-1].length, offset + length - out[-1].offset)
            offset = out.pop().offset
        out.append(ByteRange(file, offset, length))
    return out
