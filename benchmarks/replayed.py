"""Where the time of a call goes, from a profile of a few: by kernel, and of one layer, kernel after kernel.

Kernels that start before the one before them has ended wait inside of themselves, so that their own times
overlap. `from_end_to_end` is what passes between the end of what came before a kernel and its own end: these
add up to the call.
"""
from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Ran(NamedTuple):
    """A kernel of one call, µs. own: from its start to its end."""
    name: str
    own: float
    from_end_to_end: float


def kernels_of(call: Callable[[], object], calls: int = 4) -> list[Ran]:
    """Those of the last of several calls, in order."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    events = sorted((e.time_range.start, e.time_range.elapsed_us(), short(e.name)) for e in profile.events()
                    if e.device_type == torch.autograd.DeviceType.CUDA)
    return ran(events[-(len(events) // calls):], events)


def short(name: str) -> str:
    return re.sub(r"<[^(]*", "", name).removeprefix("void ").removeprefix("at::native::")[:70]


def ran(last: Sequence[tuple[float, float, str]], events: Sequence[tuple[float, float, str]]) -> list[Ran]:
    """`last`: the last of all `events`, (start, µs, name) each."""
    before = events[-len(last) - 1] if len(events) > len(last) else last[0]
    end, made = before[0] + (before[1] if before is not last[0] else 0), []
    for start, us, name in last:
        made.append(Ran(name, us, max(0.0, start + us - end)))
        end = max(end, start + us)
    return made


def by_name(kernels: Sequence[Ran]) -> dict[str, list[float]]:
    """name -> [µs from end to end, launches, own µs], what takes longest first."""
    found: dict[str, list[Ran]] = defaultdict(list)
    for k in kernels:
        found[k.name].append(k)
    made = {name: [round(sum(k.from_end_to_end for k in of), 1), len(of), round(sum(k.own for k in of), 1)]
            for name, of in found.items()}
    return dict(sorted(made.items(), key=lambda item: -item[1][0]))


def layer(kernels: Sequence[Ran], first: str) -> list[tuple[str, float]]:
    """(kernel, median µs from end to end) of a layer, which begins with the kernel `first`."""
    at = [i for i, k in enumerate(kernels) if k.name.startswith(first)]
    rounds = [kernels[a:b] for a, b in zip(at, at[1:]) if b - a == at[1] - at[0]]
    return [(of[0].name, round(statistics.median(k.from_end_to_end for k in of), 2)) for of in zip(*rounds)]
