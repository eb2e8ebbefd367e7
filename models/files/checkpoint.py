"""A checkpoint: the names of its tensors and where their bytes lie. No weight is in it.

It is plain data: one rank reads the headers and sends them to the others.

>>> entry = TensorEntry("norm", file="/m/model.safetensors", offset=80, shape=(576,), dtype="BF16",
...                     block=1, block_bytes=2)
>>> entry.num_bytes
1152
>>> checkpoint = Checkpoint("huggingface", {"/m/model.safetensors": 1232}, {"norm": entry},
...                         {"model_type": "llama"})
>>> Checkpoint.from_plain(checkpoint.to_plain()) == checkpoint
True

Refused with a `CheckpointError`: tensors that overlap, or that lie outside of their file.
"""
from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import msgspec

# bytes; the limit of the safetensors format, and ten times what GGUF files of today need
MAX_HEADER = 100_000_000


class CheckpointError(ValueError):
    """A model file that is missing, damaged, or of a kind that is not implemented."""


class CheckpointWarning(UserWarning):
    """Files of a model that contradict each other, or leave out what they should say:
    one line, with what was done."""


def note(text: str) -> None:
    """Say `text` as a CheckpointWarning; `generate` prints it on its first rank."""
    warnings.warn(text, CheckpointWarning, stacklevel=2)


@dataclass(frozen=True)
class TensorEntry:
    """A stored tensor: its bytes begin at `offset` of `file`, row after row, each of whole blocks.

    `block` elements are stored in `block_bytes` bytes; `block` is 1 where elements are stored one by one.
    """
    name: str
    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: str
    block: int
    block_bytes: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) // self.block * self.block_bytes


@dataclass(frozen=True)
class Checkpoint:
    """The headers of a model's files.

    `format` is "huggingface" or "gguf"; `files` gives the size of each in bytes.

    `metadata` is config.json, or what a GGUF file says of its model (its tokenizer left out).
    """
    format: str
    files: dict[str, int]
    tensors: dict[str, TensorEntry]
    metadata: dict[str, Any]

    def to_plain(self) -> dict[str, Any]:
        """Dicts, lists, strings and numbers, for JSON or msgpack."""
        return msgspec.to_builtins(self)

    @classmethod
    def from_plain(cls, plain: Any) -> Checkpoint:
        """The checkpoint of which `plain` is the `to_plain()`. CheckpointError when it is none."""
        try:
            return msgspec.convert(plain, cls)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"this is no checkpoint in plain data: {error}") from None


def check_places(entries: Iterable[TensorEntry], start: int, stop: int) -> None:
    """CheckpointError unless each tensor lies in bytes `start` to `stop` of its file,
    apart from the others."""
    end, before = start, None
    for entry in sorted(entries, key=lambda e: (e.offset, e.num_bytes)):
        where = (f"{entry.file}: tensor {entry.name} lies in bytes {entry.offset} to "
                 f"{entry.offset + entry.num_bytes}")
        if entry.offset < start or entry.offset + entry.num_bytes > stop:
            raise CheckpointError(f"{where}, outside of the file's data, which is {start} to {stop}; "
                                  f"the file is damaged or cut short")
        if entry.offset < end:
            raise CheckpointError(f"{where}, which overlaps tensor {before}; the file is damaged")
        end, before = entry.offset + entry.num_bytes, entry.name
