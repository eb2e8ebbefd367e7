"""What a GGUF file leaves out of its tokenizer, against a table of what llama.cpp takes for it.

The table is written by hand from src/llama-vocab.cpp of ggml-org/llama.cpp, `llama_vocab::impl::load` and the
regular expressions of `llm_tokenizer_bpe`, at commit 00ad355; BPE vocabularies ("gpt2") alone.
"""
from __future__ import annotations

import warnings
from typing import NamedTuple

import pytest
from bpe_oracle import Oracle, small
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlib.models.files.checkpoint import CheckpointError, CheckpointWarning
from shardlib.models.files.tokenizer import Tokenizer, from_metadata

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
          r"?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", "[0-9][0-9][0-9]")


class Known(NamedTuple):
    """How words are cut; whether a word that is a token needs no merges;
    whether a text begins with BOS where no flag says."""
    cut: tuple[str, ...]
    whole_words: bool
    add_bos: bool


TABLE = {
    None: Known(DEFAULT, False, False),
    "": Known(DEFAULT, False, False),
    "default": Known(DEFAULT, False, False),
    "gpt-2": Known((WORDS,), False, False),
    "smollm": Known((r"\p{N}", WORDS), False, False),
    "starcoder": Known((r"\p{N}", WORDS), False, False),
    "refact": Known((r"\p{N}", WORDS), False, False),
    "command-r": Known((r"\p{N}", WORDS), False, False),
    "smaug-bpe": Known((LLAMA3,), False, False),
    "llama-bpe": Known((LLAMA3,), True, True),
    "llama3": Known((LLAMA3,), True, True),
    "llama-v3": Known((LLAMA3,), True, True),
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
UNNAMED = 11        # BOS and EOS of a "gpt2" vocabulary that names none
ENDS = ("<|eot_id|>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<|eom_id|>", "<|end|>",
        "<end_of_turn>", "[EOT]", "<eos>")
texts = st.lists(st.sampled_from(["ab", " ab", "a", "b", "xyz", " ", "  ", "\n", "\r\n", "123", "1234567",
                                  "²³", "٣", "!?", "+=|", "'s", "'RE", "é", "<s>", "</s>", "<unk>", "<tool>",
                                  "<|im_end|>", "<|eot_id|>"]), max_size=8).map("".join)


@st.composite
def vocabularies(draw: st.DrawFn) -> dict:
    """Metadata with anything left out that may be, and types of tokens as files have them."""
    extra = draw(st.lists(st.sampled_from(ENDS[:-1]), unique=True, max_size=3))
    base = small()
    tokens = ["<s>", *dict.fromkeys(["<unk>", "<tool>", *extra, *base["tokenizer.ggml.tokens"][3:]])]
    special = {"<s>": CONTROL, "<unk>": UNKNOWN, "<tool>": USER_DEFINED,
               **{t: draw(st.sampled_from((CONTROL, NORMAL, USER_DEFINED))) for t in extra}}
    ids = st.none() | st.integers(0, len(extra) + 2)
    said = {"pre": draw(st.sampled_from([*TABLE])),
            "add_bos_token": draw(st.sampled_from((None, None, True, False))),
            "add_eos_token": draw(st.sampled_from((None, None, True, False))),
            **{f"{kind}_token_id": draw(ids) for kind in ("bos", "eos", "eot", "eom")}}
    return small(tokens=tokens, token_type=[special.get(token, NORMAL) for token in tokens], **said)


@settings(max_examples=150, deadline=None)
@given(vocabularies(), st.lists(texts, min_size=1, max_size=4))
def test_what_a_file_leaves_out_is_taken_as_llama_cpp_takes_it(metadata, given_texts):
    said = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    known, tokens = TABLE[said.get("pre")], said["tokens"]
    bos, eos = said.get("bos_token_id", UNNAMED), said.get("eos_token_id", UNNAMED)
    ends = ({tokens.index(token) for token in ENDS if token in tokens} | {eos}
            | {said[key] for key in ("eot_token_id", "eom_token_id") if key in said})
    marked = [t for t, kind in zip(tokens, said["token_type"])
              if kind in (CONTROL, UNKNOWN, USER_DEFINED) or t in ENDS]
    plain_ends = sorted(t for t, kind in zip(tokens, said["token_type"]) if t in ENDS and kind != CONTROL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenizer = from_metadata(metadata, "m")
    assert [str(w.message) for w in caught if w.category is CheckpointWarning] == [
        *["m: no tokenizer.ggml.pre says how text is cut into words; it is cut by 'default', as llama.cpp "
          "does, and the model may have "
          "learnt another way"] * (not said.get("pre")),
        *[f"m: {token} is not marked as a control token; it is taken as one that ends a text, as llama.cpp "
          "does" for token in plain_ends],
        *[f"m: no tokenizer.ggml.{kind}_token_id; it is taken to be 11, {tokens[11]!r}, as in llama.cpp"
          for kind in ("bos", "eos")
          if f"{kind}_token_id" not in said]]
    assert tokenizer.eos_ids == ends
    oracle = Oracle(metadata, known.cut, known.whole_words)
    oracle.special = marked
    for text in given_texts:
        plain = oracle.encode(text)
        # once: llama.cpp warns, and puts two
        first = [bos] if said.get("add_bos_token", known.add_bos) and plain[:1] != [bos] else []
        assert tokenizer.encode(text) == [*first, *plain,
                                          *([eos] if said.get("add_eos_token", False) else [])]


def tiny(**changes: object) -> dict:
    """Fewer tokens than the ids that stand for unnamed ones."""
    return small(**{"pre": "llama-bpe", "tokens": ["<s>", "</s>", "a"], "token_type": [3, 3, 1], "merges": [],
                    **changes})


@pytest.mark.parametrize("change, message", [
    (dict(bos_token_id=None),
     "m: tokenizer.ggml.add_bos_token is true, but no tokenizer.ggml.bos_token_id names the token"),
    (dict(eos_token_id=None, add_eos_token=True),
     "m: tokenizer.ggml.add_eos_token is true, but no tokenizer.ggml.eos_token_id names the token"),
    (dict(add_eos_token="yes"), "m: tokenizer.ggml.add_eos_token is 'yes'; it must be true or false"),
])
def test_a_token_that_texts_take_and_nobody_names(change, message):
    with pytest.raises(CheckpointError) as caught:
        from_metadata(tiny(**change), "m")
    assert str(caught.value) == message


def test_a_vocabulary_too_short_for_the_default_ids():
    tokenizer = from_metadata(tiny(bos_token_id=None, eos_token_id=None, add_bos_token=False), "m")
    assert tokenizer.encode("a") == [2] and tokenizer.eos_ids == {1}
    # names that mean something to the package
    assert from_metadata(tiny(tokens=["a:0", "$A", "a"]), "m").encode("a") == [0, 2]


def test_a_chat_takes_no_more_special_tokens():
    template = {"tokenizer.chat_template": "{{ messages[0].content }}"}
    tokenizer: Tokenizer = from_metadata({**tiny(add_eos_token=True), **template}, "m")
    assert (tokenizer.encode("aa") == [0, 2, 2, 1]
            and tokenizer.encode(tokenizer.chat([{"role": "user", "content": "aa"}])) == [2, 2])
