"""Control messages as bytes: msgpack, never pickle, so that a message can hold data and no code.

>>> block, rest = encode({"step": 3})
>>> len(block), len(rest), decode(block, rest)
(1024, 0, {'step': 3})

A message is a frame: a status byte, the length of the payload (8 bytes, little-endian), and the payload.
Where receivers must know beforehand how much comes, the frame is cut: a first block of fixed size, padded,
and the rest in a second part. What msgspec cannot write becomes a `SpecError` that travels as the payload, so
that it is raised on every rank and none waits for ever.
"""
from __future__ import annotations

from typing import Any

import msgspec

from shardlib.errors import SpecError

BLOCK = 1024
HEAD = 9
_GOOD, _BAD, _END = 0, 1, 2


def frame(message: Any) -> bytes:
    """The frame of a message of plain data."""
    try:
        return _frame(_GOOD, msgspec.msgpack.encode(message))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        return _frame(_BAD, f"a message holds plain data only: {error}".encode()[:BLOCK - HEAD])


def refusal(text: str) -> bytes:
    """The frame of no message: `read` raises a SpecError with this text."""
    return _frame(_BAD, text.encode(errors="replace"))


def _frame(status: int, payload: bytes) -> bytes:
    return bytes([status]) + len(payload).to_bytes(8, "little") + payload


END = _frame(_END, b"")
"""The frame after which no other comes."""


def is_end(frame: bytes | bytearray) -> bool:
    return frame[0] == _END


def is_good(frame: bytes | bytearray) -> bool:
    """Whether its sender could write it."""
    return frame[0] == _GOOD


def payload_size(head: bytes | bytearray) -> int:
    """How many bytes of payload follow a frame's first HEAD bytes."""
    return int.from_bytes(head[1:HEAD], "little")


def read(frame: bytes | bytearray, as_type: Any = Any) -> Any:
    """The message, as `as_type`. SpecError where its sender could not write it, or it is no `as_type`."""
    payload = memoryview(frame)[HEAD:HEAD + payload_size(frame)]
    if frame[0] != _GOOD:
        raise SpecError(bytes(payload).decode(errors="replace"))
    try:
        return msgspec.msgpack.decode(payload, type=as_type)
    except msgspec.DecodeError as error:
        raise SpecError(f"message: {error}") from None


def cut(frame: bytes) -> tuple[bytearray, bytearray]:
    """(first block, the rest) of a frame."""
    return bytearray(frame[:BLOCK].ljust(BLOCK, b"\0")), bytearray(frame[BLOCK:])


def encode(message: Any) -> tuple[bytearray, bytearray]:
    """(first block, the rest) of a message of plain data."""
    return cut(frame(message))


def rest_size(block: bytes | bytearray) -> int:
    """How many bytes follow a first block."""
    return max(0, payload_size(block) - (BLOCK - HEAD))


def decode(block: bytes | bytearray, rest: bytes | bytearray, as_type: Any = Any) -> Any:
    """The message of a first block and the rest, as `as_type`."""
    return read(bytes(block) + bytes(rest), as_type)
