"""Git LFS pointers: what lies in a repository in place of a large file until it is fetched.

    version https://git-lfs.github.com/spec/v1
    oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
    size 12345

https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""
from __future__ import annotations

from pathlib import Path

from shardlib.models.files.checkpoint import CheckpointError

BEGIN = b"version https://git-lfs.github.com/spec/"


def check_fetched(begin: bytes, path: str | Path) -> None:
    """CheckpointError where a file that begins with `begin` is a pointer to the one that is meant."""
    if begin.startswith(BEGIN):
        raise CheckpointError(
            f"{path}: a Git LFS pointer, in place of the file itself; in its repository, run\n  git lfs pull")
