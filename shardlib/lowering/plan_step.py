"""The steps of a program that communicate, as reports name them."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlanStep:
    """One collective of a program, for reports: its number there, counted from 1, the user's line,
    the specs before and after."""
    number: int
    program: str
    where: str
    text: str

    def __str__(self) -> str:
        return f"step {self.number} of {self.program}, {self.where + ': ' if self.where else ''}{self.text}"
