"""Frames of `messages` over a communicator of CPU tensors:
the first block, whose size all know, and then the rest, if there is one.

>>> from shardlib.distributed.communicators.alone import Alone
>>> frame = messages.frame({"step": 3})
>>> messages.read(broadcast(Alone(), frame, root=0, mine=True))
{'step': 3}
"""
from __future__ import annotations

import torch

from shardlib.distributed import messages
from shardlib.distributed.communicators.protocol import Communicator


def broadcast(control: Communicator, frame: bytes, root: int, mine: bool) -> bytes:
    """Member root's frame, on every member; `mine` on root. The others' `frame` is not looked at."""
    block, rest = messages.cut(frame) if mine else (bytearray(messages.BLOCK), bytearray())

    def pass_on(part: bytearray) -> bytes:
        return control.broadcast(torch.frombuffer(part, dtype=torch.uint8), root).numpy().tobytes()
    head = pass_on(block)
    size = messages.rest_size(head)
    return head + (pass_on(rest if mine else bytearray(size)) if size else b"")


def send(control: Communicator, frame: bytes, to: int) -> None:
    """Hands a frame to member `to`, which calls `recv`."""
    for part in messages.cut(frame):
        if part:
            control.send(torch.frombuffer(part, dtype=torch.uint8), to)


def recv(control: Communicator, source: int) -> bytes:
    """The frame that member `source` sends here."""
    def some(count: int) -> bytes:
        return control.recv(count, torch.uint8, torch.device("cpu"), source).numpy().tobytes()
    head = some(messages.BLOCK)
    size = messages.rest_size(head)
    return head + (some(size) if size else b"")
