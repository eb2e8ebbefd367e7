"""Weights: each rank reads its shards, and no more bytes than they need.

A table says of each leaf of a model's parameters what the checkpoint calls it, and with which dims it is
stored there.

>>> Weight("layers.up", "L D F", "model.layers.{L}.mlp.up_proj.weight", "F D").tensor_name([7])
'model.layers.7.mlp.up_proj.weight'
>>> Weight("wide.up", "L D F", "model.layers.{2L+1}.mlp.up_proj.weight", "F D").tensor_name([3])
'model.layers.7.mlp.up_proj.weight'

`load_weights` holds the whole table against the checkpoint before it reads or allocates anything. Tensors are
read in parts of 4 MB at most (of fp32), so that the peak of memory is the shards and little else. Refused
with a `CheckpointError`: a weight that is missing, of another shape, or stored in a type that is not
implemented; with a `SpecError`: a type that is not one of that leaf.
"""
from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from shardlib.errors import SpecError
from shardlib.mesh import Mesh
from shardlib.models.files.checkpoint import Checkpoint, CheckpointError, TensorEntry
from shardlib.models.files.ranges import HALF, PAIR, Box, Span, boxes, byte_range, spans_of, stored_sizes
from shardlib.spec import Spec, parse

PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
EACH = re.compile(r"\{(\d*)([A-Za-z_]\w*)(\+\d+)?\}")
PART = 1 << 20      # elements read at a time: 4 MB in fp32


@dataclass(frozen=True)
class Weight:
    """A leaf at `path`, of type `spec`; `name` in the checkpoint, with the dims `stored`.

    A dim in braces is one of which each position is stored as a tensor of its own; of "{2L+1}" that is each
    second one, from 1 on.
    beside: where several leaves lie one behind the other in a tensor's first dim, the groups of all of them,
    such as "K G H, K H, K H"; `part` says which is this one's.
    at: a name of `stored` that is no dim of the leaf, which has one position of it:
    (name, position, how many there are).
    """
    path: str
    spec: str
    name: str
    stored: str
    beside: str = ""
    part: int = 0
    at: tuple[str, int, int] | None = None

    @property
    def stacked(self) -> tuple[str, ...]:
        """The dims in braces, in our order."""
        told = [n for _, n, _ in EACH.findall(self.name)]
        return tuple(n for n in parse(self.spec).names if n in told)

    def rows(self, sizes: Mapping[str, int]) -> tuple[int, int] | None:
        """How many rows of the first dim lie before this leaf's, and how many the tensor has;
        None where it has no other."""
        if not self.beside:
            return None
        counts = [prod(sizes[n] for n in group.split()) for group in self.beside.split(",")]
        return sum(counts[:self.part]), sum(counts)

    def tensor_name(self, position: Sequence[int]) -> str:
        """The tensor at `position` of the dims in braces."""
        at = dict(zip(self.stacked, position))
        return EACH.sub(lambda m: str(int(m[1] or 1) * at[m[2]] + int(m[3] or 0)), self.name)


def load_weights(checkpoint: Checkpoint, table: Sequence[Weight], sizes: Mapping[str, int],
                 types: Mapping[str, Spec], mesh: Mesh, coordinate: Mapping[str, int], dtype: torch.dtype,
                 device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """What `coordinate` holds of each leaf of `types`: contiguous tensors of `dtype`,
    dims in the order of the type."""
    weights = {weight.path: weight for weight in table}
    wanted = []
    for path, type in types.items():
        weight, type = _checked(weights, path, mesh.resolve(type))
        known = {**sizes, weight.at[0]: weight.at[2]} if weight.at else sizes
        wanted.append(_Leaf(weight, type, known, mesh, coordinate))
    for leaf in wanted:
        leaf.check(checkpoint)
    with _Files(checkpoint.files) as files:
        return {leaf.weight.path: leaf.load(checkpoint, files, dtype, device) for leaf in wanted}


def _checked(weights: Mapping[str, Weight], path: str, type: Spec) -> tuple[Weight, Spec]:
    if path not in weights:
        raise SpecError(f"weights: no leaf {path}; there are {', '.join(weights)}")
    plain = not type.owed and not type.ellipsis and all(d.factors and not d.ragged for d in type.dims)
    if not plain or sorted(type.names) != sorted(parse(weights[path].spec).names):
        raise SpecError(f'weights: "{type}" is no type of {path}, which has the dims "{weights[path].spec}"')
    return weights[path], type


@dataclass(frozen=True)
class _Leaf:
    """A leaf to be loaded, as one coordinate sees it."""
    weight: Weight
    type: Spec
    sizes: Mapping[str, int]
    mesh: Mesh
    coordinate: Mapping[str, int]

    @property
    def stored(self) -> Spec:
        return parse(self.weight.stored)

    @property
    def spans(self) -> dict[str, Span]:
        held = spans_of(self.type, self.sizes, self.mesh, self.coordinate)
        return {**held, self.weight.at[0]: Span(self.weight.at[1], 1)} if self.weight.at else held

    def positions(self) -> Iterable[tuple[int, ...]]:
        """Each position of the dims in braces that this coordinate holds."""
        spans = self.spans
        return product(*(range(spans[n].start, spans[n].start + spans[n].size) for n in self.weight.stacked))

    def check(self, checkpoint: Checkpoint) -> None:
        """CheckpointError unless every tensor is there, in the right shape and a known type."""
        sizes = dict(zip(self.stored.names, stored_sizes(self.stored, self.sizes)))
        shape = tuple(prod(sizes[f.name] for f in dim.factors) for dim in self.stored.dims)
        if rows := self.weight.rows(self.sizes):
            shape = (rows[1], *shape[1:])
        for name in map(self.weight.tensor_name, self.positions()):
            entry, where = checkpoint.tensors.get(name), f"weight {self.weight.path}"
            if entry is None:
                raise CheckpointError(f"{where}: the checkpoint has no tensor {name}")
            if entry.shape != shape:
                letters = " ".join(f"{n}={size}" for n, size in sizes.items())
                among = f" beside {self.weight.beside}" if rows else ""
                raise CheckpointError(f'{where}: tensor {name} should be "{self.stored}"{among} with '
                                      f'{letters}, so {shape}; it is {entry.shape}')
            if entry.dtype not in PLAIN and entry.dtype not in QUANTISED:
                raise CheckpointError(
                    f"{where}: tensor {name} is stored as {entry.dtype}, which is not implemented; "
                    f"known are {', '.join((*PLAIN, *QUANTISED))}")

    def load(self, checkpoint: Checkpoint, files: _Files, dtype: torch.dtype,
             device: torch.device | str) -> Tensor:
        """The shard, read from `files`."""
        spans = self.spans
        out = torch.empty(self.mesh.local_shape(self.type, self.sizes, self.coordinate), dtype=dtype,
                          device=device)
        named = out.view([spans[n].size for n in self.type.names])
        for position in self.positions():
            index = dict(zip(self.weight.stacked, position))
            target = named[tuple(index[n] - spans[n].start if n in index else slice(None)
                                 for n in self.type.names)]
            entry = self._own(checkpoint.tensors[self.weight.tensor_name(position)])
            for box in boxes(self.stored, spans, self.sizes):
                _read(entry, box, len(self.stored.dims[-1].factors), self._target(target, box), files)
        return out

    def _own(self, entry: TensorEntry) -> TensorEntry:
        """The rows of a stored tensor that are this leaf's."""
        if (rows := self.weight.rows(self.sizes)) is None:
            return entry
        before = rows[0] * (entry.num_bytes // max(rows[1], 1))
        return replace(entry, offset=entry.offset + before)

    def _target(self, out: Tensor, box: Box) -> Tensor:
        """The view of `out`, one tensor's share, that `box` fills; its dims are the names of the box."""
        spans, names = self.spans, [n for n in self.type.names if n not in self.weight.stacked]
        at = dict(zip(box.names, box.spans))
        if self.weight.at:
            out, names = out.unsqueeze(0), [self.weight.at[0], *names]
        for i, name in reversed(list(enumerate(names))):
            if name + HALF in at:
                half, pair = at[name + HALF], at[name + PAIR]
                start = half.start * (self.sizes[name] // 2) + pair.start - spans[name].start
                out = out.narrow(i, start, half.size * pair.size).unflatten(i, (half.size, pair.size))
                names[i:i + 1] = [name + HALF, name + PAIR]
        return out.permute([names.index(n) for n in box.names])


def _read(entry: TensorEntry, box: Box, row_names: int, out: Tensor, files: _Files) -> None:
    """Fill `out` with `box` of the stored tensor.

    Its last `row_names` names make up a row, which is of whole blocks.
    """
    size, first = prod(box.shape), box.first_in_run
    # runs that begin anywhere in a block
    in_row = range(len(box.names) - row_names, first) if entry.block > 1 else ()
    apart = next((i for i in in_row if box.spans[i].size > 1), None)
    if size == 0:
        return
    if apart is None and size <= PART:
        _copy(_values(entry, box, files), out)
        return
    i = apart if apart is not None else next(i for i, n in enumerate(box.shape) if n > 1)
    half = box.shape[i] // 2
    for start, count in ((0, half), (half, box.shape[i] - half)):
        _read(entry, box.with_span(i, start, count), row_names, out.narrow(i, start, count), files)


def _values(entry: TensorEntry, box: Box, files: _Files) -> Tensor:
    """The elements of `box`, whose runs all begin at the same place of a block."""
    runs = list(box.runs())
    ranges = [byte_range(entry, run) for run in runs]
    raw = torch.empty((len(runs), ranges[0].length), dtype=torch.uint8, device="cpu")
    files.read(entry.file, [r.offset for r in ranges], raw.numpy())
    before = runs[0].start % entry.block
    return _numbers(entry, raw)[:, before:before + runs[0].size].reshape(box.shape)


def _copy(values: Tensor, out: Tensor) -> None:
    """As out.copy_(values).

    A matrix that is only turned over goes through the one case that torch copies in tiles: twice as fast.
    """
    order = sorted(range(out.dim()), key=lambda i: -out.stride(i))
    first, shape = order[0], values.shape
    if first and order == [*range(first, out.dim()), *range(first)]:
        turned = values.reshape(prod(shape[:first]), -1).T.contiguous()
        values = turned.view(*shape[first:],
                             *shape[:first]).permute([order.index(i) for i in range(out.dim())])
    out.copy_(values)


def _numbers(entry: TensorEntry, raw: Tensor) -> Tensor:
    """The numbers that rows of bytes stand for."""
    if entry.dtype in PLAIN:
        return raw.view(PLAIN[entry.dtype])
    # a file may hold inf or nan: they go through as they are
    with np.errstate(over="ignore", invalid="ignore"):
        return torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType[entry.dtype]))


class _Files:
    """Files open for reading, each held against the size it had when its header was read."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes, self.open = sizes, {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self.open.values():
            os.close(fd)

    def read(self, file: str, offsets: Sequence[int], rows: np.ndarray) -> None:
        """Fill each row of bytes from its offset on."""
        fd = self._fd(file)
        for offset, row in zip(offsets, rows):
            view = memoryview(row)
            while view:
                count = os.preadv(fd, [view], offset)
                if not count:
                    raise _changed(file)
                view, offset = view[count:], offset + count

    def _fd(self, file: str) -> int:
        if file not in self.open:
            try:
                self.open[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(f"{file}: {error.strerror}") from None
            if os.fstat(self.open[file]).st_size != self.sizes.get(file):
                raise _changed(file)
        return self.open[file]


def _changed(file: str) -> CheckpointError:
    return CheckpointError(f"{file}: its size is not what it was when its header was read")
