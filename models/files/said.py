"""What a checkpoint's config says of its model, each field checked as it is read.

>>> said = Said({"hidden_size": 64, "num_attention_heads": 3}, "config.json")
>>> said.whole(said.size("hidden_size"), said.size("num_attention_heads"), "elements a head")
Traceback (most recent call last):
shardlib.models.files.checkpoint.CheckpointError: config.json: 64 over 3 is no whole number of elements a head
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardlib.models.files.checkpoint import CheckpointError

MAX_SIZE = 1 << 31
_REQUIRED: Any = object()


class Said:
    """Fields of a config, each checked as it is read."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self.fields, self.where = fields, where

    def assuming(self, **fields: Any) -> Said:
        """The same, and these where it says nothing of them: what transformers takes then.

        A null is said: it is read as the default of whoever asks.
        """
        return Said({**fields, **self.fields}, self.where)

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {text}")

    def get(self, key: str, default: Any) -> Any:
        value = self.fields.get(key)
        value = default if value is None else value
        if value is _REQUIRED:
            raise self.error(f"no {key}")
        return value

    def only(self, key: str, *allowed: Any, default: Any = None) -> None:
        value = self.get(key, default)
        if value not in allowed:
            raise self.error(f"{key} is {_short(value)}, which is not implemented; it may be "
                             f"{' or '.join(map(repr, allowed))}")

    def size(self, key: str, default: Any = _REQUIRED) -> int:
        value = self.get(key, default)
        if value is not default and not (type(value) is int and 1 <= value <= MAX_SIZE):
            raise self.error(f"{key} is {_short(value)}; it must be an integer from 1 to {MAX_SIZE}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.get(key, default)
        if value is default is None:
            return value
        if type(value) not in (int, float) or not 0 < value < 1e300:
            raise self.error(f"{key} is {_short(value)}; it must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.error(f"{key} is {_short(value)}; it must be true or false")
        return value

    def whole(self, n: int, parts: int, what: str) -> int:
        if n % parts:
            raise self.error(f"{n} over {parts} is no whole number of {what}")
        return n // parts

    def even(self, head_dim: int) -> int:
        if head_dim % 2:
            raise self.error(f"heads of {head_dim} elements; rotary embeddings need an even number")
        return head_dim


def _short(value: Any) -> str:
    return repr(value)[:80]
