"""Text to token ids and back, and chats as the model was trained to read them.

>>> tokenizer = Tokenizer.load("smollm2")
>>> tokenizer.encode("It is 2025.")
[1589, 314, 216, 34, 32, 34, 37, 30]
>>> tokenizer.decode([1589, 314, 216, 34, 32, 34, 37, 30])
'It is 2025.'
>>> print(tokenizer.chat([{"role": "system", "content": "Be kind."},
...                       {"role": "user", "content": "Hi"}]), end="")
<|im_start|>system
Be kind.<|im_end|>
<|im_start|>user
Hi<|im_end|>
<|im_start|>assistant

The names of special tokens in a text stand for those tokens: clean what users write where that matters. A
text gets the special tokens that the model wants around it; what `chat` gives has them already, and takes no
more. Refused with a `CheckpointError`: damaged vocabularies, and in GGUF files SentencePiece vocabularies and
unknown pre-tokenizers.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from shardlib.models.files.chat_template import MAX_TEMPLATE, ChatTemplate
from shardlib.models.files.checkpoint import CheckpointError, note
from shardlib.models.files.gguf_header import read_gguf_header
from shardlib.models.files.gguf_vocabulary import read_vocabulary
from shardlib.models.files.lfs import check_fetched
from shardlib.models.files.model_files import find_model
from shardlib.models.files.saved_tokenizer import optional, read_tokenizer


class Chat(str):
    """The text of a chat: its special tokens are in it.

    Cut it, or add to it, and it is a text as any other.
    """


class Tokenizer:
    """A vocabulary, the ids that end a text, and the chat template. Make one with `Tokenizer.load`."""

    def __init__(self, core: tokenizers.Tokenizer, eos_ids: Iterable[int], template: ChatTemplate | None,
                 bos: str | None = None) -> None:
        core.no_truncation()        # a file may have kept these from training
        core.no_padding()
        self.core, self.template, self.bos = core, template, core.token_to_id(bos or "")
        self.around = core.encode("").ids
        self.eos_ids = set(eos_ids)

    @classmethod
    def load(cls, name: str | Path) -> Tokenizer:
        """The tokenizer of a model: a known name, a .gguf file, or a Hugging Face folder."""
        path = find_model(name)
        return (_from_folder(path) if path.is_dir()
                else from_metadata(read_gguf_header(path).metadata, str(path)))

    @property
    def vocab_size(self) -> int:
        return self.core.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, the token that begins a text put in front once where the model wants it.

        A byte for which the vocabulary has no token is dropped: SmolLM2 has none for six control characters.
        """
        if isinstance(text, Chat):
            return self.core.encode(text, add_special_tokens=False).ids
        ids = self.core.encode(text).ids
        begun = len(ids) > len(self.around) and ids[:2] == [self.bos] * 2 and self.around[:1] == [self.bos]
        return ids[1:] if begun else ids

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of `ids`; special tokens are left out unless `special`."""
        return self.core.decode(list(ids), skip_special_tokens=not special)

    def stream(self, ids: Iterable[int], special: bool = False) -> Iterator[str]:
        """The text of `ids` as they come, in whole characters;
        bytes of an unfinished one at the end are left out.

        >>> list(Tokenizer.load("smollm2").stream(Tokenizer.load("smollm2").encode("ok 🦜!")))
        ['ok', ' 🦜', '!']
        """
        # from `begin` on not yet given; before it, the context that the decoder may need
        held: list[int] = []
        begin = 0
        for id in ids:
            held.append(id)
            new = self._after(held, begin, special)
            if new and not new.endswith("\ufffd"):
                yield new
                held, begin = held[begin:], len(held) - begin
        if rest := self._after(held, begin, special).rstrip("\ufffd"):
            yield rest

    def _after(self, ids: list[int], begin: int, special: bool) -> str:
        """What the ids from `begin` on add to the text of those before."""
        return self.decode(ids, special)[len(self.decode(ids[:begin], special)):]

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> Chat:
        """The text of a chat: messages of "role" and "content", then the beginning of the answer.

        CheckpointError where the model has no chat template.
        """
        if self.template is None:
            raise CheckpointError("the model has no chat template")
        return Chat(self.template.render(messages, add_generation_prompt))


def from_metadata(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer of a GGUF file's metadata; `where` names the file in errors."""
    core, named, ends = read_vocabulary(metadata, where)
    source = metadata.get("tokenizer.chat_template")
    template = (None if source is None
                else ChatTemplate(source, {kind + "_token": token for kind, token in named.items()}))
    return Tokenizer(core, map(core.token_to_id, ends), template, named.get("bos"))


def _from_folder(folder: Path) -> Tokenizer:
    core, config, tokens = read_tokenizer(folder)
    source = _template(folder, config)
    template = None if source is None else ChatTemplate(source, tokens)
    return Tokenizer(core, _ends(folder, core.token_to_id(tokens.get("eos_token", ""))), template,
                     tokens.get("bos_token"))


def _ends(folder: Path, own: int | None) -> list[int]:
    """The ids that end a text: generation_config.json's, else config.json's,
    else the one of the tokenizer."""
    said = {name: optional(folder / name).get("eos_token_id")
            for name in ("generation_config.json", "config.json")}
    found = {name: ids for name, value in {**said, "tokenizer_config.json": own}.items()
             if (ids := [id for id in (value if isinstance(value, list) else [value]) if type(id) is int])}
    taken = next(iter(found), "")
    for name, ids in found.items():
        if not set(ids) <= set(found[taken]):
            note(f"{folder}: a text ends with {found[taken]} by {taken}, with {ids} by {name}; the first is "
                 "taken")
    return found.get(taken, [])


def _template(folder: Path, config: Mapping[str, Any]) -> Any:
    """The source of the chat template: in a file of its own, or in tokenizer_config.json,
    there perhaps one of several."""
    path, source = folder / "chat_template.jinja", config.get("chat_template")
    if isinstance(source, list):
        source = next(
            (t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), None)
    if not path.exists():
        return source
    with open(path, "rb") as file:
        read = file.read(4 * MAX_TEMPLATE + 4)
    check_fetched(read, path)
    own = read.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    if source not in (None, own):
        note(f"{folder}: chat_template.jinja and tokenizer_config.json have chat templates that differ; "
             "chat_template.jinja is taken")
    return own
