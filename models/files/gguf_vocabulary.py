"""The byte-level BPE vocabulary that a GGUF file lists, as a tokenizer of the tokenizers package.

>>> found = read_vocabulary({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe",
...     "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b", "ab", "1", "2"],
...     "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1], "tokenizer.ggml.merges": ["a b"],
...     "tokenizer.ggml.bos_token_id": 0}, "a.gguf")
>>> found.core.encode("abba12</s>").tokens
['<s>', 'ab', 'b', 'a', '1', '2', '</s>']
>>> found.ends
{'</s>'}

How text is cut before merging is no part of a GGUF file; it names a rule, and much else is understood from
that name. The rules and the defaults are those of llama.cpp (src/llama-vocab.cpp, read at commit 00ad355 of
ggml-org/llama.cpp). Where a file leaves out what the ids depend on, or marks an end token as a plain one, a
`CheckpointWarning` says what was taken.
Refused with a `CheckpointError`: other vocabularies (SentencePiece, WordPiece), unknown rules, damaged lists.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from shardlib.models.files.checkpoint import CheckpointError, note

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def _cut(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Words are the matches of the first pattern and what lies between them,
    each cut by the next pattern in turn."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _words() -> pre_tokenizers.PreTokenizer:
    """GPT-2: words with the blank before them, runs of digits, runs of signs."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits() -> pre_tokenizers.PreTokenizer:
    """As GPT-2, each digit first cut off as a word of its own."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _words()])


def _llama3() -> pre_tokenizers.PreTokenizer:
    """Digits in threes, line ends with the signs before them."""
    return _cut(LLAMA3)


def _default() -> pre_tokenizers.PreTokenizer:
    """Runs of signs apart, then as GPT-2, digits in threes."""
    return _cut(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


class Rule(NamedTuple):
    """What the name of a pre-tokenizer stands for.

    `whole_words`: a word that is a token is not built up by merges.
    """
    cut: Callable[[], pre_tokenizers.PreTokenizer]
    whole_words: bool = False
    add_bos: bool = False


RULES = {"default": Rule(_default), "gpt-2": Rule(_words), "smollm": Rule(_digits),
         "starcoder": Rule(_digits), "refact": Rule(_digits), "command-r": Rule(_digits),
         "smaug-bpe": Rule(_llama3),
         **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), Rule(_llama3, whole_words=True, add_bos=True))}
# ours: in the file's keys
KINDS = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}
DEFAULT_IDS = {"bos": 11, "eos": 11}        # of "gpt2" vocabularies that name none and are as long
# Tokens that end a text wherever a vocabulary has them: a file names one alone.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "</s>",
        "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]", "<end_of_turn>", "<end_of_utterance>",
        "<｜end▁of▁sentence｜>")


class Vocabulary(NamedTuple):
    """A tokenizer; the tokens that the file names: bos, eos, eot, eom, unk, pad; those that end a text."""
    core: Tokenizer
    named: dict[str, str]
    ends: set[str]


def read_vocabulary(metadata: Mapping[str, Any], where: str) -> Vocabulary:
    """What a GGUF file's metadata say of its tokenizer; `where` names the file in errors."""
    rule = _rule(metadata, where)
    tokens, kinds = _lists(metadata, where)
    vocabulary = {token: id for id, token in enumerate(tokens)}
    core = Tokenizer(_bpe(vocabulary, metadata.get("tokenizer.ggml.merges"), rule.whole_words, where))
    core.pre_tokenizer, core.decoder = rule.cut(), decoders.ByteLevel()
    ends = {token for token in ENDS if token in vocabulary}
    for token in sorted(token for token in ends if kinds[vocabulary[token]] != CONTROL):
        note(f"{where}: {token} is not marked as a control token; it is taken as one that ends a text, as "
             "llama.cpp does")
    special = [token for token, kind in zip(tokens, kinds) if kind in (CONTROL, UNKNOWN) or token in ENDS]
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    core.add_tokens([AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds)
                     if kind == USER_DEFINED and t not in ENDS])
    named = {kind: token for kind in KINDS if (token := _named(metadata, kind, tokens, where)) is not None}
    first = _around(metadata, "bos", named, rule.add_bos, where)
    last = _around(metadata, "eos", named, False, where)
    if first or last:
        around = [{"id": kind, "ids": [vocabulary[named[kind]]], "tokens": [named[kind]]}
                  for kind in first + last]
        core.post_processor = processors.TemplateProcessing(single=[*first, "$A", *last],
                                                            special_tokens=around)
    return Vocabulary(core, named, ends | {named[kind] for kind in ("eos", "eot", "eom") if kind in named})


def _rule(metadata: Mapping[str, Any], where: str) -> Rule:
    model, name = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model == "gpt2" and name in (None, ""):
        note(f"{where}: no tokenizer.ggml.pre says how text is cut into words; it is cut by 'default', as "
             "llama.cpp does, and the model may have learnt another way")
        return RULES["default"]
    if model != "gpt2" or name not in tuple(RULES):
        raise CheckpointError(
            f"{where}: the tokenizer is {_short(model)} with pre-tokenizer {_short(name)}, which is not "
            f"implemented; known are 'gpt2' with {', '.join(RULES)}")
    return RULES[name]


def _named(metadata: Mapping[str, Any], kind: str, tokens: list[str], where: str) -> str | None:
    """The token that is named as the one of its kind, or the default; None where there is neither."""
    key = f"tokenizer.ggml.{KINDS[kind]}_token_id"
    id = metadata.get(key)
    if id is None and DEFAULT_IDS.get(kind, len(tokens)) < len(tokens):
        id = DEFAULT_IDS[kind]
        note(f"{where}: no {key}; it is taken to be {id}, {_short(tokens[id])}, as in llama.cpp")
    if id is not None and not (type(id) is int and 0 <= id < len(tokens)):
        raise CheckpointError(f"{where}: {key} is {_short(id)}; there are {len(tokens)} tokens")
    return None if id is None else tokens[id]


def _around(metadata: Mapping[str, Any], kind: str, named: Mapping[str, str], default: bool,
            where: str) -> list[str]:
    """The kind alone if texts take its token, and nothing otherwise."""
    flag = f"tokenizer.ggml.add_{kind}_token"
    wanted = default if metadata.get(flag) is None else metadata[flag]
    if type(wanted) is not bool:
        raise CheckpointError(f"{where}: {flag} is {_short(wanted)}; it must be true or false")
    if wanted and kind not in named:
        raise CheckpointError(
            f"{where}: {flag} is true, but no tokenizer.ggml.{kind}_token_id names the token")
    return [kind] if wanted else []


def _lists(metadata: Mapping[str, Any], where: str) -> tuple[list[str], list[int]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if (not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens)
        or len(set(tokens)) != len(tokens)):
        raise CheckpointError(f"{where}: tokenizer.ggml.tokens is no list of different texts")
    kinds = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise CheckpointError(
            f"{where}: tokenizer.ggml.token_type does not give a type for each of {len(tokens)} tokens")
    return tokens, kinds


def _bpe(vocabulary: dict[str, int], merges: Any, whole_words: bool, where: str) -> BPE:
    pairs = ([tuple(merge.split(" ")) for merge in merges if isinstance(merge, str)]
             if isinstance(merges, list) else None)
    if pairs is None or any(len(pair) != 2 for pair in pairs) or len(pairs) != len(merges):
        raise CheckpointError(f"{where}: tokenizer.ggml.merges is no list of pairs")
    try:
        return BPE(vocabulary, pairs, ignore_merges=whole_words)
    except Exception as error:          # the package raises nothing narrower
        raise CheckpointError(f"{where}: the tokenizers package refuses the vocabulary: {error}") from None


def _short(value: Any) -> str:
    return repr(value)[:80]
