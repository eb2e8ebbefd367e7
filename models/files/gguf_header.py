"""The header of a GGUF file: what it says of its model, and its tensors.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

>>> from shardlib.models.files.model_files import find_model
>>> header = read_gguf_header(find_model("smollm2"))
>>> header.metadata["llama.block_count"], header.tensors["blk.0.ffn_down.weight"].shape
(30, (576, 1536))

GGUF lists dims innermost first; a `TensorEntry` lists them outermost first, as everybody else. The reader of
the gguf package is not used: it believes the counts in the file, and a damaged one takes all memory. Here
every count is held against the bytes that are left. A tensor of a type that is not known is one block of
bytes: only a weight that needs it stumbles over it. Refused with a `CheckpointError`: a file cut short,
big-endian files, version 1, a model in several files, a Git LFS pointer.
"""
from __future__ import annotations

import os
import struct
from bisect import bisect_right
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from shardlib.models.files.checkpoint import MAX_HEADER, CheckpointError, TensorEntry, check_places
from shardlib.models.files.lfs import BEGIN, check_fetched

SCALARS = {GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H",
           GGUFValueType.INT16: "h", GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i",
           GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q", GGUFValueType.FLOAT32: "f",
           GGUFValueType.FLOAT64: "d", GGUFValueType.BOOL: "?"}
MAX_DIMS = 4
MAX_ITEMS = 1 << 22     # array items in all; vocabularies of today have 2**20 at most, with their merges
MIN_PAIR, MIN_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8     # bytes of the shortest entries


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key, the tokenizer's included; tensors by name."""
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of the file."""
    try:
        with open(path, "rb") as file:
            check_fetched(file.read(len(BEGIN)), path)
            file.seek(0)
            return _header(_Cursor(file, str(path)))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


class _Cursor:
    """Reads onward in a file, never past its end, never more than the limits above."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.at = self.items = 0

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {text}")

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise self.error(
                f"{what} at byte {self.at} needs {count} bytes of the {self.size - self.at} left; "
                f"the file is damaged or cut short")
        if self.at + count > MAX_HEADER:
            raise self.error(f"the header is longer than {MAX_HEADER} bytes, the longest that is read")

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        self.at += count
        return self.file.read(count)

    def unpack(self, format: str, what: str) -> tuple[Any, ...]:
        return struct.unpack("<" + format, self.take(struct.calcsize("<" + format), what))

    def number(self, format: str, what: str) -> Any:
        return self.unpack(format, what)[0]

    def string(self, what: str) -> str:
        begin = self.at
        try:
            return self.take(self.number("Q", what), what).decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} at byte {begin} is not UTF-8; the file is damaged") from None

    def count(self, shortest: int, what: str) -> int:
        """A number of things that follow, each `shortest` bytes at least."""
        count = self.number("Q", what)
        self.need(count * shortest, f"{what} of {count}")
        return count


def _header(cursor: _Cursor) -> GgufHeader:
    magic, version = cursor.unpack("4sI", "the beginning")
    if magic != b"GGUF":
        raise cursor.error("not a GGUF file")
    if version not in (2, 3):
        raise cursor.error(f"GGUF version {version}; versions 2 and 3, little-endian, are read")
    num_tensors, num_pairs = (cursor.count(MIN_TENSOR, "the list of tensors"),
                              cursor.count(MIN_PAIR, "the metadata"))
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.string("a key")
        if key in metadata:
            raise cursor.error(f"key {key[:80]!r} appears twice")
        metadata[key] = _value(cursor, key[:80])
    if metadata.get("split.count", 0) not in (0, 1):
        raise cursor.error("one of several files of a model; join them first with: llama-gguf-split --merge")
    return GgufHeader(
        metadata, _tensors(cursor, num_tensors, metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)))


def _value(cursor: _Cursor, key: str) -> Any:
    kind = _kind(cursor, key)
    if kind is GGUFValueType.STRING:
        return cursor.string(key)
    if kind is not GGUFValueType.ARRAY:
        return cursor.number(SCALARS[kind], key)
    kind = _kind(cursor, key)
    if kind is GGUFValueType.ARRAY:
        raise cursor.error(f"{key} is an array of arrays, which is not implemented")
    count = cursor.count(8 if kind is GGUFValueType.STRING else struct.calcsize(SCALARS[kind]),
                         f"the array {key}")
    cursor.items += count
    if cursor.items > MAX_ITEMS:
        raise cursor.error(f"the metadata lists more than {MAX_ITEMS} items, the most that are read")
    if kind is GGUFValueType.STRING:
        return [cursor.string(key) for _ in range(count)]
    return list(cursor.unpack(f"{count}{SCALARS[kind]}", key))


def _kind(cursor: _Cursor, key: str) -> GGUFValueType:
    number = cursor.number("I", key)
    try:
        return GGUFValueType(number)
    except ValueError:
        raise cursor.error(f"{key} has unknown type {number}; the file is damaged") from None


def _tensors(cursor: _Cursor, count: int, alignment: Any) -> dict[str, TensorEntry]:
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {alignment!r}, not a power of two")
    listed = [_listed(cursor) for _ in range(count)]
    start = -(-cursor.at // alignment) * alignment
    ends = sorted({cursor.size - start, *(offset for *_, offset in listed)})
    tensors: dict[str, TensorEntry] = {}
    for name, shape, kind, offset in listed:
        dtype, block, block_bytes = _stored(kind, prod(shape), _next(ends, offset) - offset)
        if name in tensors:
            raise cursor.error(f"tensor {name[:200]} appears twice")
        if shape[-1] % block and dtype in GGMLQuantizationType.__members__:
            raise cursor.error(f"tensor {name[:200]} of shape {shape} has rows that are no whole blocks of "
                               f"{block} ({dtype})")
        tensors[name] = TensorEntry(name, cursor.path, start + offset, shape, dtype, block, block_bytes)
    check_places(tensors.values(), start, cursor.size)
    return tensors


def _next(ends: list[int], offset: int) -> int:
    """The first of the sorted `ends` behind `offset`, or that itself."""
    i = bisect_right(ends, offset)
    return ends[i] if i < len(ends) else offset


def _stored(kind: int, count: int, room: int) -> tuple[str, int, int]:
    """The name of a type, and its block; of one that is not known, all `count` elements,
    in the room to the next tensor."""
    if kind in GGML_QUANT_SIZES:
        return GGMLQuantizationType(kind).name, *GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return f"type {kind}", max(1, count), room


def _listed(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string("the name of a tensor")
    what = f"tensor {name[:200]}"
    num_dims = cursor.number("I", what)
    if not 1 <= num_dims <= MAX_DIMS:
        raise cursor.error(f"{what} has {num_dims} dims; 1 to {MAX_DIMS} are legal")
    *dims, kind, offset = cursor.unpack(f"{num_dims}QIQ", what)
    return name, tuple(reversed(dims)), kind, offset
