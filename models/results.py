"""Results that survive: one JSON line a finished request, appended as soon as it is there.

    {"request": 0, "of": "d2a84f4b8b650937", "tokens": [1, 5, 2], "text": " Paris"}

Requests are numbered from 0; `of` is a digest of the prompt and of all options that decide its tokens, so that the results of other
options are refused and not mixed. A last line that was cut short, by a process that died while it wrote, is dropped.
"""
from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Sequence

import msgspec

from shardlib import SpecError


class Result(msgspec.Struct, frozen=True):
    """One finished request: prompt and answer ids, and the answer as text."""
    request: int
    of: str
    tokens: list[int]
    text: str


class Results:
    """The results in `path`, of the requests whose digests are `expected`. With no path they are kept in memory alone."""

    def __init__(self, path: str | None, expected: Sequence[str]) -> None:
        self.path, self.expected = Path(path) if path else None, tuple(expected)
        self.done: dict[int, Result] = {}
        if self.path and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        whole, newline, cut_short = path.read_bytes().rpartition(b"\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                result = msgspec.json.decode(line, type=Result)
            except msgspec.DecodeError as error:
                raise SpecError(f"{path}, line {number}: {error}") from None
            if not 0 <= result.request < len(self.expected) or self.expected[result.request] != result.of:
                raise SpecError(f"{path}, line {number}: a result of other prompts or options; name another file")
            self.done[result.request] = result
        if cut_short:
            os.truncate(path, len(whole) + len(newline))

    def add(self, request: int, tokens: list[int], text: str) -> None:
        """Keeps a result, unless there is one already; it is on the disk when this returns."""
        if request in self.done:
            return
        self.done[request] = result = Result(request, self.expected[request], tokens, text)
        if self.path:
            with self.path.open("ab") as file:
                file.write(msgspec.json.encode(result) + b"\n")
                file.flush()
                os.fsync(file.fileno())


def digest(prompt: Sequence[int], options: Sequence[object]) -> str:
    """What a request is known by: its prompt, and the options that decide its tokens."""
    return hashlib.sha256(repr((list(prompt), *options)).encode()).hexdigest()[:16]
