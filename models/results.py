"""Results that survive: one JSON line a finished request, appended as soon as it is there.

    {"request": 0, "of": "d2a84f4b8b650937", "tokens": [1, 5, 2], "text": " Paris"}

Requests are numbered from 0; `of` is a digest of the prompt and of all options that decide its tokens. A last
line that was cut short, by a process that died while it wrote, is dropped; one that lacks its newline alone
gets it. Refused with a `SpecError`, and the file left as it is: results of other prompts or options, two of
one request that differ, what is no results, what cannot be written.
"""
from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from shardlib import SpecError


class Result(msgspec.Struct, frozen=True):
    """One finished request: prompt and answer ids, and the answer as text."""
    request: int
    of: str
    tokens: list[int]
    text: str


class Results:
    """The results in `path`, of the requests whose digests are `expected`.

    With no path they are kept in memory alone.
    """

    def __init__(self, path: str | None, expected: Sequence[str]) -> None:
        self.path, self.expected = Path(path) if path else None, tuple(expected)
        self.done: dict[int, Result] = {}
        if self.path:
            self._read(self.path, _open(self.path))

    def _read(self, path: Path, data: bytes) -> None:
        *lines, rest = data.split(b"\n")
        if whole := _is_result(rest):
            lines.append(rest)
        for number, line in enumerate(lines, 1):
            self._take(line, f"{path}, line {number}")
        if whole:
            _append(path, b"\n")
        elif rest and not self._begins(rest):
            raise SpecError(f"{path} is no file of results of these prompts and options; name another file")
        elif rest:
            os.truncate(path, len(data) - len(rest))

    def _take(self, line: bytes, where: str) -> None:
        try:
            result = _result(line)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"{where}: {error}") from None
        if not 0 <= result.request < len(self.expected) or self.expected[result.request] != result.of:
            raise SpecError(f"{where}: a result of other prompts or options; name another file")
        if self.done.setdefault(result.request, result) != result:
            raise SpecError(f"{where}: another result of request {result.request} than in a line before; "
                            "delete one of them")

    def _begins(self, rest: bytes) -> bool:
        """Whether one of our lines begins with `rest`, as far as it can be known beforehand."""
        known = (msgspec.json.encode(Result(i, of, [], "")).partition(b"]")[0]
                 for i, of in enumerate(self.expected))
        return any(rest.startswith(begin) or begin.startswith(rest) for begin in known)

    def add(self, request: int, tokens: list[int], text: str) -> None:
        """Keeps a result, unless there is one already; it is on the disk when this returns."""
        if request in self.done:
            return
        self.done[request] = result = Result(request, self.expected[request], tokens, text)
        if self.path:
            _append(self.path, msgspec.json.encode(result) + b"\n")


def _open(path: Path) -> bytes:
    """What the file holds, which is made where there is none.

    SpecError where nothing could be appended later.
    """
    try:
        with path.open("a+b") as file:
            os.fsync(file.fileno())
            file.seek(0)
            return file.read()
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror or error}") from None


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _result(line: bytes) -> Result:
    """ValueError or RecursionError where it is none."""
    return msgspec.json.decode(line.decode(), type=Result)


def _is_result(line: bytes) -> bool:
    try:
        return bool(_result(line))
    except (ValueError, RecursionError):
        return False


def digest(prompt: Sequence[int], options: Sequence[object]) -> str:
    """What a request is known by: its prompt, and the options that decide its tokens."""
    return hashlib.sha256(repr((list(prompt), *options)).encode()).hexdigest()[:16]
