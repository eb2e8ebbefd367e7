"""Forked processes of one place, for what ends badly: they may be killed, patched and interrupted,
and start in milliseconds.

    answers = family(3, body, hosts=(0, 0, 1))      # body(place) in each of three processes

An answer is what `body` returned, "RankError: its text" for what it raised, or "killed by 9". No family
outlives its deadline.
"""
from __future__ import annotations

import os
import selectors
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from shardlib.distributed import segment
from shardlib.distributed.communicators.protocol import Place
from shardlib.distributed.communicators.torch_distributed import TorchDistributed

DEADLINE_S = 30.0


def family(size: int, body: Callable[[Place], Any], hosts: Sequence[int] = (),
           timeout_s: float = 5.0) -> list[Any]:
    """What each of `size` processes says. AssertionError if one says nothing within DEADLINE_S."""
    with tempfile.TemporaryDirectory() as folder:
        places = [(Path(folder) / "store", size, me, tuple(hosts) or (0,) * size, timeout_s)
                  for me in range(size)]
        children = [_fork(body, place) for place in places]
        try:
            return _collect([out for _, out in children])
        finally:
            for pid, out in children:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                os.close(out)


def ours() -> list[str]:
    """What of ours has a name in /dev/shm."""
    return sorted(path.name for path in segment.SHARED.glob(f"{segment.PREFIX}*"))


def _collect(outs: Sequence[int]) -> list[Any]:
    texts, end = {out: b"" for out in outs}, time.monotonic() + DEADLINE_S
    with selectors.DefaultSelector() as selector:
        for out in outs:
            selector.register(out, selectors.EVENT_READ)
        while selector.get_map():
            assert time.monotonic() < end, f"no answer within {DEADLINE_S:g} s; so far {list(texts.values())}"
            for key, _ in selector.select(0.1):
                part = os.read(key.fd, 1 << 16)
                texts[key.fd] += part
                if not part:
                    selector.unregister(key.fd)
    return [msgspec.msgpack.decode(texts[out]) if texts[out] else "killed" for out in outs]


def _fork(body: Callable[[Place], Any], place: tuple[Any, ...]) -> tuple[int, int]:
    out, into = os.pipe()
    pid = os.fork()
    if pid:
        os.close(into)
        return pid, out
    try:
        answer = _answer(body, place)
    except BaseException as error:  # whatever it is: it must not run on as a second pytest
        answer = f"{type(error).__name__}: {error}"
    os.write(into, msgspec.msgpack.encode(answer))
    os.close(into)
    while True:                                                 # its end must not look like a peer that died
        time.sleep(60)


def _answer(body: Callable[[Place], Any], place: tuple[Any, ...]) -> Any:
    store, size, me, hosts, timeout_s = place
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    ranks, limit = tuple(range(size)), timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), size), rank=me, world_size=size,
                            timeout=limit)
    group = dist.group.WORLD
    return body(Place("tp", ranks, me, hosts, torch.device("cpu"), group, group, timeout_s,
                      TorchDistributed(group, ranks, me)))
