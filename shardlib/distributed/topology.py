"""Which ranks run on one host: those that see the same shared memory.

>>> hosts(["a", "a", "b", "a"])
(0, 0, 1, 0)
"""
from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

SHARED = Path("/dev/shm")


def identity() -> str:
    """Equal for two processes exactly if they can share memory:
    the kernel's boot, and the file system behind /dev/shm.

    Containers of one machine that have a /dev/shm each are hosts of their own. Where there is no /dev/shm,
    the host's name.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    shared = f"{os.stat(SHARED).st_dev}:{os.stat(SHARED).st_ino}" if SHARED.is_dir() else socket.gethostname()
    return f"{boot.read_text().strip() if boot.exists() else socket.gethostname()} {shared}"


def hosts(identities: Sequence[str]) -> tuple[int, ...]:
    """The number of each rank's host, in the order in which they occur."""
    numbers: dict[str, int] = {}
    return tuple(numbers.setdefault(i, len(numbers)) for i in identities)
