"""A byte-level BPE of thirty lines, written from the description and not from the package; small
vocabularies, and GGUF files of them."""
from __future__ import annotations

from pathlib import Path

import gguf
import regex

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_letters() -> list[str]:
    """The letter that stands for each byte: itself where it can be seen, else the next from U+0100 on."""
    seen = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    rest = iter(range(0x100, 0x200))
    return [chr(b) if b in seen else chr(next(rest)) for b in range(256)]


class Oracle:
    """Special tokens first, then words by one rule after the other, then merges by rank."""

    def __init__(self, metadata: dict, rules: tuple[str, ...], whole_words: bool = False) -> None:
        tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        self.ids = {token: id for id, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank
                      for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
        self.special = [token for token, kind in zip(tokens, kinds) if kind == 3]
        self.rules, self.letters, self.whole_words = rules, byte_letters(), whole_words

    def encode(self, text: str) -> list[int]:
        parts = regex.split("(" + "|".join(map(regex.escape, self.special)) + ")", text)
        return [id for part in parts if part
                for id in ([self.ids[part]] if part in self.special else self.plain(part))]

    def plain(self, text: str) -> list[int]:
        words = [text]
        for rule in self.rules:
            words = [piece for word in words for piece in pieces(rule, word)]
        letters = [[self.letters[b] for b in word.encode()] for word in words]
        return [self.ids[token] for word in letters
                for token in self.merge([letter for letter in word if letter in self.ids])]

    def knows(self, text: str) -> bool:
        """Whether each byte has a token. SmolLM2 drops six control characters, and F1 and F2."""
        return all(self.letters[b] in self.ids for b in text.encode())

    def merge(self, parts: list[str]) -> list[str]:
        if self.whole_words and "".join(parts) in self.ids:
            return ["".join(parts)]
        while True:
            ranked = [(self.ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:]))
                      if pair in self.ranks]
            if not ranked:
                return parts
            i = min(ranked)[1]
            parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2:]]


def pieces(rule: str, text: str) -> list[str]:
    """The matches of a rule, and what lies between them."""
    out, end = [], 0
    for match in regex.finditer(rule, text):
        out += [text[end:match.start()], match.group()]
        end = match.end()
    return [piece for piece in (*out, text[end:]) if piece]


def small(**changes) -> dict:
    letters = sorted(byte_letters())
    tokens = ["<s>", "</s>", "<user>", *letters, "ab", "12", "123", "Ġab", "xyz"]
    found = dict(model="gpt2", pre="smollm", tokens=tokens, token_type=[3, 3, 4] + [1] * (len(tokens) - 3),
                 merges=["a b", "Ġ ab", "1 2", "12 3"], bos_token_id=0, eos_token_id=1)
    return {f"tokenizer.ggml.{key}": value for key, value in {**found, **changes}.items()
            if value is not None}


def write(path: Path, metadata: dict, template: str | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        add = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool,
               list: writer.add_array}[type(value)]
        add(key, value)
    if template:
        writer.add_chat_template(template)
    (writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(),
     writer.close())
    return path
