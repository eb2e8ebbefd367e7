"""The byte-level BPE vocabulary that a GGUF file lists, as a tokenizer of the tokenizers package.

>>> core = build_bpe({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
...     "tokenizer.ggml.tokens": ["<end>", "a", "b", "ab", "1", "2"], "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1],
...     "tokenizer.ggml.merges": ["a b"]}, "a.gguf")
>>> core.encode("abba12<end>").tokens
['ab', 'b', 'a', '1', '2', '<end>']

How text is cut before merging is no part of a GGUF file; it names a rule. The rules are those of llama.cpp
(src/llama-vocab.cpp). Refused with a `CheckpointError`: other vocabularies (SentencePiece, WordPiece), unknown rules,
damaged lists.
"""
from __future__ import annotations

from typing import Any, Mapping

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from shardlib.models.checkpoint import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def _words() -> pre_tokenizers.PreTokenizer:
    """GPT-2: words with the blank before them, runs of digits, runs of signs."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits() -> pre_tokenizers.PreTokenizer:
    """As GPT-2, each digit first cut off as a word of its own."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _words()])


def _llama3() -> pre_tokenizers.PreTokenizer:
    """Digits in threes, line ends with the signs before them."""
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


RULES = {"gpt-2": _words, "smollm": _digits, "starcoder": _digits, "refact": _digits, "command-r": _digits, "llama-bpe": _llama3}
LONG = {"unk": "unknown", "pad": "padding"}
WHOLE_WORDS = ("llama-bpe",)        # a word that is a token is not built up by merges


def build_bpe(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer of a GGUF file's metadata; `where` names the file in errors."""
    model, rule = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or rule not in tuple(RULES):
        raise CheckpointError(f"{where}: the tokenizer is {_short(model)} with pre-tokenizer {_short(rule)}, which is not "
                              f"implemented; known are 'gpt2' with {', '.join(RULES)}")
    tokens, kinds = _lists(metadata, where)
    vocabulary = {token: id for id, token in enumerate(tokens)}
    core = Tokenizer(_bpe(vocabulary, metadata.get("tokenizer.ggml.merges"), rule in WHOLE_WORDS, where))
    core.pre_tokenizer, core.decoder = RULES[rule](), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, kind in zip(tokens, kinds) if kind == CONTROL])
    core.add_tokens([AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds) if kind == USER_DEFINED])
    if metadata.get("tokenizer.ggml.add_bos_token"):
        core.post_processor = _begin_with(special_token(metadata, "bos", where), vocabulary)
    return core


def special_token(metadata: Mapping[str, Any], kind: str, where: str) -> str | None:
    """The token named as the one of its kind: bos, eos, eot, eom, unk, pad. None where none is named."""
    key = f"tokenizer.ggml.{LONG.get(kind, kind)}_token_id"
    id, tokens = metadata.get(key), metadata["tokenizer.ggml.tokens"]
    if id is not None and not (type(id) is int and 0 <= id < len(tokens)):
        raise CheckpointError(f"{where}: {key} is {_short(id)}; there are {len(tokens)} tokens")
    return None if id is None else tokens[id]


def _lists(metadata: Mapping[str, Any], where: str) -> tuple[list[str], list[int]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens) or len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{where}: tokenizer.ggml.tokens is no list of different texts")
    kinds = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise CheckpointError(f"{where}: tokenizer.ggml.token_type does not give a type for each of {len(tokens)} tokens")
    return tokens, kinds


def _bpe(vocabulary: dict[str, int], merges: Any, whole_words: bool, where: str) -> BPE:
    pairs = [tuple(merge.split(" ")) for merge in merges if isinstance(merge, str)] if isinstance(merges, list) else None
    if pairs is None or any(len(pair) != 2 for pair in pairs) or len(pairs) != len(merges):
        raise CheckpointError(f"{where}: tokenizer.ggml.merges is no list of pairs")
    try:
        return BPE(vocabulary, pairs, ignore_merges=whole_words)
    except Exception as error:          # the package raises nothing narrower
        raise CheckpointError(f"{where}: the tokenizers package refuses the vocabulary: {error}") from None


def _begin_with(token: str | None, vocabulary: Mapping[str, int]) -> processors.PostProcessor | None:
    if token is None:
        return None
    return processors.TemplateProcessing(single=[token, "$A"], special_tokens=[(token, vocabulary[token])])


def _short(value: Any) -> str:
    return repr(value)[:80]
