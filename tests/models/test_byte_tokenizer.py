"""The tokenizer of weights that have none."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlib.models.files.byte_tokenizer import ByteTokenizer


@given(st.text())
def test_a_text_is_its_bytes(text: str) -> None:
    ids = ByteTokenizer().encode(text)
    assert ids == [*text.encode()] and ByteTokenizer().decode(ids) == text
    assert [*ByteTokenizer().stream(iter(ids))] == [text]


@pytest.mark.parametrize("ids, text", [
    ([], ""), ([0, 97, 127], "\0a\x7f"), ([255], "\ufffd"), ([256], "<256>"), ([97, 257, 98], "a<257>b"),
    ([195, 169, 128255], "é<128255>")])
def test_ids_beyond_bytes_are_their_numbers(ids: list[int], text: str) -> None:
    assert ByteTokenizer().decode(ids) == text and [*ByteTokenizer().stream(ids)] == [text]


def test_a_chat_is_its_last_message() -> None:
    messages = [{"role": "user", "content": said} for said in ("a", "b", "c")]
    assert ByteTokenizer().chat(messages) == "c" and ByteTokenizer().eos_ids == frozenset()
