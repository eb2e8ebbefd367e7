"""Lines of the user's source: where a step was written, and which frames are the user's own."""
from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Where:
    """A line of the user's source, and the instruction that was running (`code.co_positions()` says
    which expression it is)."""
    file: str
    line: int
    code: Any = field(default=None, compare=False, repr=False)
    instruction: int = field(default=0, compare=False, repr=False)

    @classmethod
    def of(cls, frame: Any) -> Where:
        return cls(frame.f_code.co_filename, frame.f_lineno, frame.f_code, frame.f_lasti)

    def __str__(self) -> str:
        return f"{self.file.rsplit('/', 1)[-1]}:{self.line}"


def user_frame() -> Any:
    """The innermost frame outside of the library's own language and ops."""
    frame = sys._getframe(1)
    while frame.f_back is not None and is_ours(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return frame


def user_line(error: BaseException) -> Where | None:
    """The innermost line outside of the library on the way to where `error` was raised."""
    found, entry = None, error.__traceback__
    while entry is not None:
        if not is_ours(entry.tb_frame.f_globals.get("__name__", "")):
            found = Where(entry.tb_frame.f_code.co_filename, entry.tb_lineno)
        entry = entry.tb_next
    return found


def is_ours(module: str) -> bool:
    """Whether a module is of the language and its ops; models are written like a user's."""
    return module.startswith("shardlib.") and not module.startswith("shardlib.models")
