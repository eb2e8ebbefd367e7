"""Tokenizers as folders have them, whatever their files say and leave out:
the ids that transformers makes of texts and chats."""
from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, logging

from shardlib.models.files.checkpoint import CheckpointWarning
from shardlib.models.files.tokenizer import Tokenizer

WORDS = ("<unk>", "<s>", "</s>", "▁", "a", "b", "c", "Ġ", "▁a", "ab", "▁ab", "Ġa", "<0x0A>")
MERGES = [("a", "b"), ("▁", "a"), ("▁", "ab"), ("Ġ", "a")]
texts = st.lists(st.sampled_from(["a", "b", "ab", " ", " a", "  ab", "c", "x", "\n", "<s>", "</s>", "<unk>",
                                  "<new>", "<tool>", "A"]), max_size=6).map("".join)
CHATS = ("{% for m in messages %}{{ m.content }}{% endfor %}",
         "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}",
         ("{% for m in messages %}<s>{% generation %}{{ m.content }}{% endgeneration %}</s>\n"
          "{% endfor %}{% if add_generation_prompt %}a{% endif %}"))
MESSAGES = [{"role": "user", "content": " ab c"}, {"role": "assistant", "content": "a</s>"},
            {"role": "user", "content": "b"}]


@st.composite
def folders(draw: st.DrawFn) -> dict[str, Any]:
    """File name -> content."""
    def maybe(*values: Any) -> Any:
        return draw(st.sampled_from((None, *values)))
    core = tokenizers.Tokenizer(BPE({word: i for i, word in enumerate(WORDS)}, MERGES,
                                    unk_token=maybe("<unk>"), fuse_unk=draw(st.booleans())))
    core.normalizer = maybe(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
                            normalizers.Lowercase(), normalizers.NFKC())
    core.pre_tokenizer = maybe(pre_tokenizers.Metaspace(), pre_tokenizers.Whitespace(),
                               pre_tokenizers.ByteLevel(add_prefix_space=False))
    core.add_special_tokens(["<unk>", "<s>", "</s>"][:draw(st.integers(0, 3))])
    if draw(st.booleans()):
        core.add_tokens([AddedToken("<tool>", lstrip=draw(st.booleans()), rstrip=draw(st.booleans()),
                                    normalized=draw(st.booleans()))])
    around = maybe("<s> $A", "$A </s>", "<s> $A </s>")
    if around:
        core.post_processor = processors.TemplateProcessing(single=around,
                                                            special_tokens=[("<s>", 1), ("</s>", 2)])
    if draw(st.booleans()):
        core.enable_truncation(draw(st.integers(2, 5)))
    if draw(st.booleans()):
        core.enable_padding(length=draw(st.integers(1, 9)), pad_id=2, pad_token="</s>")
    tokens = {"bos_token": maybe("<s>", "<new>", {"__type": "AddedToken", "content": "<s>", "lstrip": False,
                                                  "rstrip": False, "normalized": False}),
              "eos_token": maybe("</s>", "<tool>"), "unk_token": maybe("<unk>")}
    config = {**tokens, "tokenizer_class": maybe("PreTrainedTokenizerFast", "LlamaTokenizer",
                                                 "LlamaTokenizerFast", "TokenizersBackend"),
              "legacy": maybe(True, False), "add_prefix_space": maybe(True, False),
              "add_bos_token": maybe(True, False), "add_eos_token": maybe(True, False),
              "split_special_tokens": maybe(False, True), "chat_template": maybe(*CHATS),
              "clean_up_tokenization_spaces": maybe(True), "model_max_length": maybe(3)}
    if draw(st.booleans()):
        config["added_tokens_decoder"] = {"20": {"content": "<new>", "lstrip": draw(st.booleans()),
                                                 "rstrip": False, "normalized": False, "single_word": False,
                                                 "special": draw(st.booleans())}}
    return {"tokenizer.json": json.loads(core.to_str()), "config.json": {"model_type": "llama"},
            "tokenizer_config.json": {key: value for key, value in config.items() if value is not None},
            "special_tokens_map.json": maybe(
                {"bos_token": "</s>"}, {"eos_token": {"content": "<s>", "lstrip": False, "rstrip": False,
                                                      "normalized": False, "single_word": False}}),
            "added_tokens.json": maybe({"<new>": 20}, {"<s>": 1}), "chat_template.jinja": maybe(*CHATS)}


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(folders(), st.lists(texts, min_size=1, max_size=4))
def test_ids_are_those_of_transformers(files, given_texts):
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        write(Path(folder), files)
        theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    bos = theirs.bos_token_id
    for text in given_texts:
        ids = theirs(text).input_ids
        twice = (bos is not None and ids[:2] == [bos, bos]
                 == [*theirs("").input_ids[:1], *theirs(text, add_special_tokens=False).input_ids[:1]])
        assert ours.encode(text) == ids[twice:]  # BOS once: they put it before one that is written, too
    if theirs.chat_template:
        chat = ours.chat(MESSAGES)
        assert chat == theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        assert ours.encode(chat) == theirs.apply_chat_template(MESSAGES,
                                                               add_generation_prompt=True)["input_ids"]


SAVED = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
         "pre_tokenizer": None, "post_processor": None, "decoder": None,
         "model": {"type": "BPE", "unk_token": None, "vocab": {"<s>": 0, "</s>": 1, "a": 2}, "merges": []}}


@pytest.mark.parametrize("files, said", [
    ({"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"},
      "generation_config.json": {"eos_token_id": [2, 0]}, "config.json": {"eos_token_id": 1}},
     ["a text ends with [2, 0] by generation_config.json, with [1] by config.json; the first is taken",
      ("a text ends with [2, 0] by generation_config.json, with [1] by tokenizer_config.json; the first is "
       "taken")]),
    ({"tokenizer_config.json": {"eos_token": "</s>"}, "generation_config.json": {"eos_token_id": [1, 2]},
      "config.json": {"eos_token_id": 1}}, []),
    ({"tokenizer_config.json": {"bos_token": "<s>", "add_bos_token": True}},
     ["add_bos_token is true in tokenizer_config.json, but not in tokenizer.json, which is followed"]),
    ({"tokenizer_config.json": {"bos_token": "<s>", "add_bos_token": False, "add_eos_token": False}}, []),
    ({"tokenizer_config.json": {"bos_token": "<s>"}, "special_tokens_map.json": {"bos_token": "</s>"}},
     ["bos_token is '<s>' in tokenizer_config.json and '</s>' in special_tokens_map.json, which is taken"]),
    ({"tokenizer_config.json": {"bos_token": "<s>", "added_tokens_decoder": {}},
      "special_tokens_map.json": {"bos_token": "</s>"}}, []),
    ({"tokenizer_config.json": {"bos_token": "<new>"}},
     ["the special tokens <new> are not in tokenizer.json; they are added to it behind its last id"]),
    ({"tokenizer_config.json": {"chat_template": "x"}, "chat_template.jinja": "y"},
     ["chat_template.jinja and tokenizer_config.json have chat templates that differ; chat_template.jinja is "
      "taken"]),
    ({"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "y"}]},
      "chat_template.jinja": "y"}, []),
])
def test_what_contradicts_is_said_in_a_line(files, said, tmp_path, recwarn):
    Tokenizer.load(write(tmp_path, {"tokenizer.json": SAVED, **files}))
    assert ([str(w.message) for w in recwarn if w.category is CheckpointWarning]
            == [f"{tmp_path}: {line}" for line in said])


def test_listed_tokens_are_added_in_the_order_of_their_ids(tmp_path):
    """Which are numbers: 9 comes before 10, and 3 before both."""
    listed = {id: {"content": f"<{id}>", "special": True} for id in ("10", "9", "3")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": listed}
    write(tmp_path, {"tokenizer.json": SAVED, "tokenizer_config.json": config,
                     "config.json": {"model_type": "llama"}})
    ids = Tokenizer.load(tmp_path).encode("<10>a<9><3>")
    assert ids == AutoTokenizer.from_pretrained(tmp_path)("<10>a<9><3>").input_ids == [5, 2, 4, 3]


@pytest.mark.parametrize(
    "said, blank", [({}, True), *(({"add_prefix_space": x}, x is not False) for x in (None, True, False))])
def test_a_blank_is_put_before_a_text_unless_the_folder_says_no(said, blank, tmp_path):
    """Of the class LlamaTokenizer. Null says nothing, as it does for transformers."""
    words = {word: id for id, word in enumerate(("<s>", "</s>", "a", "\u2581", "\u2581a", "<unk>"))}
    core = {"type": "BPE", "unk_token": None, "vocab": words, "merges": ["\u2581 a"]}
    write(tmp_path, {"tokenizer.json": {**SAVED, "model": core}, "config.json": {"model_type": "llama"},
                     "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>",
                                               **said}})
    ids = Tokenizer.load(tmp_path).encode("a a")
    assert ids == AutoTokenizer.from_pretrained(tmp_path)("a a").input_ids == [4 if blank else 2, 4]
