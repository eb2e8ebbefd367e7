"""Text to token ids and back, and chats as the model was trained to read them.

>>> tokenizer = Tokenizer.load("smollm2")
>>> tokenizer.encode("It is 2025.")
[1589, 314, 216, 34, 32, 34, 37, 30]
>>> tokenizer.decode([1589, 314, 216, 34, 32, 34, 37, 30])
'It is 2025.'
>>> print(tokenizer.chat([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]), end="")
<|im_start|>system
Be kind.<|im_end|>
<|im_start|>user
Hi<|im_end|>
<|im_start|>assistant

The names of special tokens in a text stand for those tokens: clean what users write where that matters. A text gets the
special tokens that the model wants around it; what `chat` gives has them already, and takes no more. Refused with a
`CheckpointError`: damaged vocabularies, and in GGUF files SentencePiece vocabularies and unknown pre-tokenizers.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence

import tokenizers

from shardlib.models.chat_template import MAX_TEMPLATE, ChatTemplate
from shardlib.models.checkpoint import CheckpointError
from shardlib.models.gguf_header import read_gguf_header
from shardlib.models.gguf_vocabulary import read_vocabulary
from shardlib.models.json_file import read_json
from shardlib.models.lfs import check_fetched
from shardlib.models.model_files import find_model

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class Chat(str):
    """The text of a chat: its special tokens are in it. Cut it, or add to it, and it is a text as any other."""


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
        return _from_folder(path) if path.is_dir() else from_metadata(read_gguf_header(path).metadata, str(path))

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
        begun = len(ids) > len(self.around) and self.around[:1] == ids[1:2] == [self.bos]
        return ids[1:] if begun else ids

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of `ids`; special tokens are left out unless `special`."""
        return self.core.decode(list(ids), skip_special_tokens=not special)

    def stream(self, ids: Iterable[int], special: bool = False) -> Iterator[str]:
        """The text of `ids` as they come, in whole characters; bytes of an unfinished one at the end are left out.

        >>> list(Tokenizer.load("smollm2").stream(Tokenizer.load("smollm2").encode("ok 🦜!")))
        ['ok', ' 🦜', '!']
        """
        held: list[int] = []        # from `begin` on not yet given; before it, the context that the decoder may need
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
    template = None if source is None else ChatTemplate(source, {kind + "_token": token for kind, token in named.items()})
    return Tokenizer(core, map(core.token_to_id, ends), template, named.get("bos"))


def _from_folder(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    read_json(path)         # bounded, and says in our words what is wrong
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:      # the package raises nothing narrower
        raise CheckpointError(f"{path}: the tokenizers package does not read it: {error}") from None
    config = _optional(folder / "tokenizer_config.json")
    tokens = {key: _text(config[key]) for key in SPECIAL if config.get(key) is not None}
    ids = next((found["eos_token_id"] for name in ("generation_config.json", "config.json")
                if (found := _optional(folder / name)).get("eos_token_id") is not None), None)
    eos_ids = [*(ids if isinstance(ids, list) else [ids]), core.token_to_id(tokens.get("eos_token", ""))]
    source = _template(folder, config)
    template = None if source is None else ChatTemplate(source, tokens)
    return Tokenizer(core, (id for id in eos_ids if type(id) is int), template, tokens.get("bos_token"))


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _text(token: Any) -> str:
    """A token, or the content of one that is written with its flags."""
    return str(token["content"] if isinstance(token, dict) and "content" in token else token)


def _template(folder: Path, config: Mapping[str, Any]) -> Any:
    """The source of the chat template: in a file of its own, or in tokenizer_config.json, there perhaps one of several."""
    path, source = folder / "chat_template.jinja", config.get("chat_template")
    if path.exists():
        with open(path, "rb") as file:
            text = file.read(4 * MAX_TEMPLATE + 4)
        check_fetched(text, path)
        return text.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    if isinstance(source, list):
        return next((t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), None)
    return source
