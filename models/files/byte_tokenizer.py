"""A tokenizer for weights that have none: a token a byte, those beyond by their numbers.

>>> bytes_only = ByteTokenizer()
>>> bytes_only.encode("né"), bytes_only.decode([110, 195, 169, 4711])
([110, 195, 169], 'né<4711>')
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence


class ByteTokenizer:
    """What `Tokenizer` does, without a vocabulary, an end, or a chat template."""
    eos_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(bytes([i]) if i < 256 else f"<{i}>".encode() for i in ids).decode(errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        yield self.decode(list(ids))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        return messages[-1]["content"]
