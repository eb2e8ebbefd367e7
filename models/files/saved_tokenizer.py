"""The tokenizer of a Hugging Face folder, put together from its files as transformers 5 does it.

tokenizer.json holds nearly all of it. Beside it, tokenizer_config.json names the special tokens and may add
more (older folders do so in special_tokens_map.json and added_tokens.json, which count only where
tokenizer_config.json has no `added_tokens_decoder`). Where that names the class LlamaTokenizer, a vocabulary
of SentencePiece is meant: its blanks are those of that class, whatever tokenizer.json says. All other classes
are read as tokenizer.json has them. Files that contradict each other are told of by a `CheckpointWarning`.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from shardlib.models.files.checkpoint import CheckpointError, note
from shardlib.models.files.json_file import read_json

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
# of the class LlamaTokenizer, where nothing is said
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def read_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, Any], dict[str, str]]:
    """The tokenizer; what tokenizer_config.json says of it; the names of its special tokens."""
    path = folder / "tokenizer.json"
    saved = read_json(path)         # bounded, and says in our words what is wrong
    try:
        core = Tokenizer.from_file(str(path))
    except Exception as error:      # the package raises nothing narrower
        raise CheckpointError(f"{path}: the tokenizers package does not read it: {error}") from None
    config = optional(folder / "tokenizer_config.json")
    modern = isinstance(config.get("added_tokens_decoder"), dict)
    if not modern:
        config = {**config, **_older(folder, config)}
    if core.padding is not None:
        config = {"pad_token": core.padding["pad_token"], **config}
    named = {key: config[key] for key in SPECIAL if config.get(key) is not None}
    if _is_llama(config, optional(folder / "config.json"), saved):
        core, named = _llama(core, saved, config), {**LLAMA, **named}
    tokens = {key: text(token) for key, token in named.items()}
    _add(core, folder, {**({} if modern else _added(folder, saved)), **_listed(config)}, named)
    core.encode_special_tokens = config.get("split_special_tokens") is True
    _say_around(core, config, tokens, folder)
    return core, config, tokens


def optional(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one where there is no file."""
    return read_json(path) if path.exists() else {}


def text(token: Any) -> str:
    """A token, or the content of one that is written with its flags."""
    return str(token["content"] if isinstance(token, dict) and "content" in token else token)


def _older(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens of special_tokens_map.json."""
    found = {key: token for key, token in optional(folder / "special_tokens_map.json").items()
             if key in SPECIAL}
    for key in sorted(found.keys() & config.keys()):
        if config[key] is not None and text(found[key]) != text(config[key]):
            note(f"{folder}: {key} is {text(config[key])!r} in tokenizer_config.json and "
                 f"{text(found[key])!r} in special_tokens_map.json, which is taken")
    return found


def _is_llama(config: Mapping[str, Any], model: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Whether the class is LlamaTokenizer, of a vocabulary that is not one of bytes."""
    name, core = config.get("tokenizer_class") or model.get("tokenizer_class"), saved.get("model")
    fits = isinstance(core, dict) and core.get("type") == "BPE"
    return (name in ("LlamaTokenizer", "LlamaTokenizerFast") and fits
            and '"ByteLevel"' not in repr(saved).replace("'", '"'))


def _llama(core: Tokenizer, saved: Mapping[str, Any], config: Mapping[str, Any]) -> Tokenizer:
    """The same vocabulary, merges and post-processor; the blanks,
    bytes and unknown letters of the class LlamaTokenizer."""
    model = saved["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
              for merge in model["merges"]]
    made = Tokenizer(BPE(model["vocab"], merges, fuse_unk=True, byte_fallback=True))
    prefix = config["add_prefix_space"] if config.get("add_prefix_space") is not None else True
    scheme = "never" if not prefix else "always" if config.get("legacy") else "first"
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    if core.post_processor is not None:
        made.post_processor = core.post_processor
    return made


def _added(folder: Path, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens beside the vocabulary, by their content, in the order of their ids:
    of added_tokens.json, and of tokenizer.json, which wins."""
    older = {id: {"content": token} for token, id in optional(folder / "added_tokens.json").items()}
    found = {**older, **{token["id"]: token for token in saved.get("added_tokens") or ()}}
    return {token["content"]: token for _, token in sorted(found.items(), key=lambda item: int(item[0]))}


def _listed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens of `added_tokens_decoder`, in the order of their ids."""
    found = config.get("added_tokens_decoder")
    if (not isinstance(found, dict)
        or not all(id.isdecimal() and isinstance(token, dict) for id, token in found.items())):
        return {}
    return {text(token): token for _, token in sorted(found.items(), key=lambda item: int(item[0]))}


def _add(core: Tokenizer, folder: Path, tokens: Mapping[str, Any], named: Mapping[str, Any]) -> None:
    """Add the tokens that `core` does not have with these flags; the special ones, where no list has them."""
    there = {str(token.content): token for token in core.get_added_tokens_decoder().values()}
    extra = {text(token): token for token in named.values() if text(token) not in {*there, *tokens}}
    before = core.get_vocab_size()
    for content, token in (*tokens.items(), *extra.items()):
        flags = {flag: token[flag] for flag in FLAGS
                 if isinstance(token, dict) and type(token.get(flag)) is bool}
        special = content in map(text, named.values()) or flags.get("special", False)
        made = AddedToken(content, **{"normalized": not special, **flags, "special": special})
        if content and repr(there.get(content)) != repr(made):
            core.add_tokens([made])
    if core.get_vocab_size() > before and extra:
        new = [token for token in extra if core.token_to_id(token) >= before]
        if new:
            note(f"{folder}: the special tokens {', '.join(new)} are not in tokenizer.json; they are added "
                 "to it behind its last id")


def _say_around(core: Tokenizer, config: Mapping[str, Any], tokens: Mapping[str, str], folder: Path) -> None:
    """Flags that say other than tokenizer.json which tokens stand around a text; it is followed."""
    around = core.encode("").ids
    for flag, key, at in (("add_bos_token", "bos_token", around[:1]),
                          ("add_eos_token", "eos_token", around[-1:])):
        stands = key in tokens and at == [core.token_to_id(tokens[key])]
        if type(config.get(flag)) is bool and config[flag] != stands:
            note(f"{folder}: {flag} is {str(config[flag]).lower()} in tokenizer_config.json, but not in "
                 "tokenizer.json, which is followed")
