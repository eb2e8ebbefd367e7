"""Control messages as bytes: msgpack, never pickle, so that a message can hold data and no code.

>>> block, rest = encode({"step": 3})
>>> len(block), len(rest), decode(block, rest)
(1024, 0, {'step': 3})

The first block has a fixed size, which receivers know beforehand: a status byte, the length of the payload (8 bytes,
little-endian), and as much of the payload as fits; the rest follows in a second part. What msgspec cannot write
becomes a `SpecError` that travels as the payload, so that it is raised on every rank and none waits for ever.
"""
from __future__ import annotations

from typing import Any

import msgspec

from shardlib.errors import SpecError

BLOCK = 1024
_HEAD = 9
_GOOD, _BAD = 0, 1


def encode(message: Any) -> tuple[bytearray, bytearray]:
    """(first block, the rest) of a message of plain data."""
    try:
        status, payload = _GOOD, msgspec.msgpack.encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        status, payload = _BAD, f"a message holds plain data only: {error}".encode()[:BLOCK - _HEAD]
    block = bytearray(BLOCK)
    block[0], block[1:_HEAD] = status, len(payload).to_bytes(8, "little")
    first = payload[:BLOCK - _HEAD]
    block[_HEAD:_HEAD + len(first)] = first
    return block, bytearray(payload[len(first):])


def rest_size(block: bytes | bytearray) -> int:
    """How many bytes follow a first block."""
    return max(0, int.from_bytes(block[1:_HEAD], "little") - (BLOCK - _HEAD))


def decode(block: bytes | bytearray, rest: bytes | bytearray, as_type: Any = Any) -> Any:
    """The message, as `as_type`. SpecError where its sender could not write it, or it is no `as_type`."""
    payload = bytes(block[_HEAD:_HEAD + int.from_bytes(block[1:_HEAD], "little")]) + bytes(rest)
    if block[0] != _GOOD:
        raise SpecError(payload.decode(errors="replace"))
    try:
        return msgspec.msgpack.decode(payload, type=as_type)
    except msgspec.DecodeError as error:
        raise SpecError(f"message: {error}") from None
