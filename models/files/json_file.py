"""JSON from files that nobody vouches for: bounded in size, one object, no key twice.

>>> parse_json(b'{"a": [1, 2]}', "config.json")
{'a': [1, 2]}
>>> parse_json(b'{"a": 1, "a": 2}', "config.json")
Traceback (most recent call last):
    ...
shardlib.models.files.checkpoint.CheckpointError: config.json: key 'a' appears twice
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shardlib.models.files.checkpoint import MAX_HEADER, CheckpointError
from shardlib.models.files.lfs import check_fetched


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file.

    CheckpointError when it is missing, a Git LFS pointer, too long, or no JSON object.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_HEADER + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    check_fetched(text, path)
    if len(text) > MAX_HEADER:
        raise CheckpointError(f"{path}: more than {MAX_HEADER} bytes, the longest JSON that is read")
    return parse_json(text, str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The object that `text` writes. CheckpointError, saying `where`, when it writes none."""
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"{where}: key {key[:80]!r} appears twice")
            found[key] = value
        return found

    try:
        value = json.loads(text.decode(), object_pairs_hook=once)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: JSON, but not an object")
    return value
