"""CUDA streams by their handles, and how far the GPU has come on them."""
from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch


def current_stream(device: torch.device) -> int:
    """The handle of the stream in force: what `torch.cuda.current_stream` wraps, in a tenth of its time."""
    return torch._C._cuda_getCurrentRawStream(device.index)


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """What runs beside the stream in force, and before it where both have work: made at the first call, and
    the same ever after."""
    return torch.cuda.Stream(device, priority=-1)


def marks(device: torch.device, handles: Iterable[int]) -> list[torch.cuda.Event]:
    """An event at the present end of each stream.

    A stream that is being captured has none: nothing runs on it.
    """
    made = []
    for handle in handles:
        with torch.cuda.stream(torch.cuda.ExternalStream(handle, device=device) if handle
                               else torch.cuda.default_stream(device)):
            if not torch.cuda.is_current_stream_capturing():
                made.append(torch.cuda.current_stream(device).record_event())
    return made


def passed(event: torch.cuda.Event) -> bool:
    """Whether the GPU has come to it; also where the GPU has failed,
    or the event has slipped into a capture that began meanwhile."""
    try:
        return event.query()
    except RuntimeError:
        return True
