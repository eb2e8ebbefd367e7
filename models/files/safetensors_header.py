"""The header of a safetensors file: 8 bytes of length, then JSON, then the tensors.

    {"norm": {"dtype": "BF16", "shape": [576], "data_offsets": [0, 1152]}, "__metadata__": {"format": "pt"}}

https://github.com/huggingface/safetensors#format

A tensor of a dtype that is not known is one block of bytes: only a weight that needs it stumbles over it.
Refused with a `CheckpointError`, before anything is allocated: a header longer than the file, a shape that
does not fit its offsets, tensors that overlap or lie outside of the file, a Git LFS pointer.
"""
from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import Any

from shardlib.models.files.checkpoint import MAX_HEADER, CheckpointError, TensorEntry, check_places
from shardlib.models.files.json_file import parse_json
from shardlib.models.files.lfs import BEGIN, check_fetched

ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8,
                 "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
MAX_DIMS, MAX_NAME = 8, 40


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of the file, by name."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin = file.read(len(BEGIN))
            check_fetched(begin, path)
            length = int.from_bytes(begin[:8], "little")
            file.seek(8)
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(f"{path}: a file of {size} bytes whose header claims {length}; it is "
                                      "damaged or cut short")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    header = parse_json(text, str(path))
    entries = {name: _entry(name, found, str(path), 8 + length) for name, found in header.items()
               if name != "__metadata__"}
    check_places(entries.values(), 8 + length, size)
    return entries


def _entry(name: str, found: Any, file: str, start: int) -> TensorEntry:
    where = f"{file}: tensor {name[:200]}"
    if not isinstance(found, dict) or set(found) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} has no dtype, shape and data_offsets; the header is damaged")
    dtype, shape, offsets = found["dtype"], _counts(found["shape"]), _counts(found["data_offsets"])
    if not isinstance(dtype, str) or len(dtype) > MAX_NAME:
        raise CheckpointError(f"{where} has no name as dtype, but {str(dtype)[:40]}; the header is damaged")
    if (shape is None or offsets is None or len(shape) > MAX_DIMS or len(offsets) != 2
        or offsets[1] < offsets[0]):
        raise CheckpointError(f"{where} has a damaged shape or damaged data_offsets")
    count, given = prod(shape), offsets[1] - offsets[0]
    block, block_bytes = (1, ELEMENT_BYTES[dtype]) if dtype in ELEMENT_BYTES else (max(1, count), given)
    needed = count // block * block_bytes
    if needed != given:
        raise CheckpointError(
            f"{where}, {dtype} of shape {shape}, needs {needed} bytes; its data_offsets give {given}")
    return TensorEntry(name, file, start + offsets[0], shape, dtype, block, block_bytes)


def _counts(value: Any) -> tuple[int, ...] | None:
    """A list of integers from 0 to 2**63 - 1 as a tuple; None for anything else."""
    fine = isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
    return tuple(value) if fine else None
