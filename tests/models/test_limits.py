"""The limits of what is read of files that nobody vouches for: what is at a limit is taken, one more is not;
and no error repeats more of a file than a line holds."""
from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bpe_oracle import small
from damaged import GGUF, HF, LLAMA3, array, gguf_file, info, refusal, safetensors, tensor, text

from shardlib.models.files import gguf_header, json_file, safetensors_header
from shardlib.models.files.chat_template import ChatTemplate
from shardlib.models.files.checkpoint import CheckpointError, TensorEntry, check_places
from shardlib.models.files.gguf_header import read_gguf_header
from shardlib.models.files.json_file import read_json
from shardlib.models.files.safetensors_header import read_safetensors_header
from shardlib.models.files.said import Said
from shardlib.models.files.tokenizer import from_metadata
from shardlib.models.llama_config import config_from_gguf, config_from_hf

SIZE, NUMBER = "it must be an integer from 1 to 2147483648", "it must be a positive number"


def said(value: Any) -> Said:
    return Said({"a": value}, "c")


@pytest.mark.parametrize("read, taken, refused, wanted", [
    (lambda s: s.size("a"), (1, 2, 1 << 31), (0, -1, (1 << 31) + 1, 1.0, True, "1", [1]), SIZE),
    (lambda s: s.size("a", 7), (1, 1 << 31, 7), (0, True, 7.5), SIZE),
    (lambda s: s.number("a"), (5e-324, 1, 0.5, 9.9e299), (0, 0.0, -1, 1e300, math.inf, math.nan, True, "1"),
     NUMBER),
    (lambda s: s.number("a", 2.0), (5e-324, 1), (0, 1e300, True), NUMBER),
    (lambda s: s.number("a", None), (5e-324, 1), (0, 1e300, True), NUMBER),
    (lambda s: s.flag("a", True), (True, False), (0, 1, "true"), "it must be true or false"),
], ids=["size", "size or 7", "number", "number or 2", "number or None", "flag"])
def test_fields_of_a_config(read: Callable[[Said], Any], taken: tuple, refused: tuple, wanted: str) -> None:
    for value in taken:
        assert read(said(value)) == value
    for value in refused:
        assert refusal(read, said(value)) == f"c: a is {value!r}; {wanted}"


def test_fields_that_a_config_leaves_out() -> None:
    for fields in ({}, {"a": None}):
        empty = Said(fields, "c")
        assert [empty.size("a", 7), empty.size("a", None), empty.number("a", 2), empty.number("a", None),
                empty.flag("a", True), empty.flag("a", False)] == [7, None, 2.0, None, True, False]
        assert type(empty.number("a", 2)) is float and empty.only("a", 1, default=1) is None
        for read in (empty.size, empty.number):
            assert refusal(read, "a") == "c: no a"
        with pytest.raises(CheckpointError):
            empty.only("a", 1)


def test_parts_of_a_config() -> None:
    whole = Said({}, "c")
    assert [whole.whole(12, parts, "x") for parts in (1, 3, 12)] == [12, 4, 1] and whole.even(2) == 2
    assert refusal(whole.whole, 12, 5, "x") == "c: 12 over 5 is no whole number of x"
    assert refusal(whole.even, 3) == "c: heads of 3 elements; rotary embeddings need an even number"


# -- headers -------------------------------------------------------------------------------------------------

def test_tensors_of_safetensors_at_their_limits(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "m", {"a": tensor((1, 1, 1, 1, 1, 1, 2, 4), (0, 16)),
                                        "b": tensor((0, (1 << 63) - 1), (16, 16), "F" * 40)})
    assert [entry.shape for entry in read_safetensors_header(path).values()] == [
        (1, 1, 1, 1, 1, 1, 2, 4), (0, (1 << 63) - 1)]
    for changed in (tensor((1,) * 8 + (2, 4)), tensor((0, 1 << 63), (0, 0)), tensor((0,), (-1, -1)),
                    tensor((0,), (1, 0)), tensor((0,), (0,)), {**tensor(), "shape": 8},
                    {**tensor(), "data_offsets": {"0": 0, "16": 16}}):
        assert refusal(read_safetensors_header, safetensors(tmp_path / "m", {"a": changed})) == (
            f"{path}: tensor a has a damaged shape or damaged data_offsets")
    for more in ({"more": 1}, {"dtype": None}):
        damaged = {k: v for k, v in {**tensor(), **more}.items() if v is not None}
        assert refusal(read_safetensors_header, safetensors(tmp_path / "m", {"a": damaged})) == (
            f"{path}: tensor a has no dtype, shape and data_offsets; the header is damaged")


def test_files_shorter_than_a_header(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for size in range(10):
        path.write_bytes(bytes(size))       # a header of 0 bytes, which is no JSON
        assert refusal(read_safetensors_header, path) == (
            f"{path}: a file of {size} bytes whose header claims 0; it is damaged or cut short" if size < 8
            else f"{path}: not JSON: Expecting value: line 1 column 1 (char 0)")


def test_headers_as_long_as_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of each format is lowered to what a file has, and below it."""
    whole = safetensors(tmp_path / "m", {"a": tensor()})
    length = whole.stat().st_size - 24
    monkeypatch.setattr(safetensors_header, "MAX_HEADER", length)
    assert [*read_safetensors_header(whole)] == ["a"]
    monkeypatch.setattr(safetensors_header, "MAX_HEADER", length - 1)
    assert refusal(read_safetensors_header, whole) == (
        f"{whole}: a file of {length + 24} bytes whose header claims {length}; it is damaged or cut short")

    plain = tmp_path / "c.json"
    plain.write_text('{"a": 1}')
    monkeypatch.setattr(json_file, "MAX_HEADER", 8)
    assert read_json(plain) == {"a": 1}
    monkeypatch.setattr(json_file, "MAX_HEADER", 7)
    assert refusal(read_json, plain) == f"{plain}: more than 7 bytes, the longest JSON that is read"

    pair, listed = array("a", 0, 3, bytes(3)), info("w", (1, 1, 2, 4))
    packed = gguf_file(tmp_path / "m.gguf", [pair, pair.replace(b"a", b"b", 1)], [listed])
    length = 24 + 2 * len(pair) + len(listed)
    for name, limit, message in (
            ("MAX_HEADER", length, f"the header is longer than {length - 1} bytes, the longest that is read"),
            ("MAX_ITEMS", 6, "the metadata lists more than 5 items, the most that are read"),
            ("MAX_DIMS", 4, "tensor w has 4 dims; 1 to 3 are legal")):
        with monkeypatch.context() as patched:
            patched.setattr(gguf_header, name, limit)
            found = read_gguf_header(packed)
            assert found.metadata == {"a": [0] * 3, "b": [0] * 3} and found.tensors["w"].shape == (4, 2, 1, 1)
            patched.setattr(gguf_header, name, limit - 1)
            assert refusal(read_gguf_header, packed) == f"{packed}: {message}"


def test_a_gguf_file_in_one_part_and_alignments(tmp_path: Path) -> None:
    """split.count says in how many files a model lies."""
    for count in (0, 1, 2):
        path = gguf_file(tmp_path / "m.gguf", [text("split.count") + struct.pack("<IH", 2, count)])
        if count < 2:
            assert read_gguf_header(path).metadata == {"split.count": count}
        else:
            assert "one of several files of a model" in refusal(read_gguf_header, path)
    for alignment in (1, 2, 64, 0, 3, 6):
        pair = text("general.alignment") + struct.pack("<II", 4, alignment)
        path = gguf_file(tmp_path / "m.gguf", [pair], [info("w", (1,))], data=128)
        if alignment in (1, 2, 64):
            head = 24 + len(pair) + len(info("w", (1,)))
            assert read_gguf_header(path).tensors["w"].offset == math.ceil(head / alignment) * alignment
        else:
            assert refusal(read_gguf_header, path).endswith(
                f"general.alignment is {alignment}, not a power of two")


def test_places_of_tensors() -> None:
    def lie(*places: tuple[int, int]) -> str:
        """What is said of tensors at these bytes, of a file whose data are bytes 10 to 20."""
        entries = [TensorEntry(f"t{i}", "m", at, (n,), "U8", 1, 1) for i, (at, n) in enumerate(places)]
        try:
            return check_places(entries, 10, 20) or ""
        except CheckpointError as error:
            return str(error)
    assert lie() == lie((10, 10)) == lie((15, 5), (10, 5)) == lie((20, 0), (10, 0), (12, 0), (10, 2)) == ""
    for places in (((9, 1),), ((9, 0),), ((20, 1),), ((21, 0),), ((12, 9),)):
        assert lie(*places) == (f"m: tensor t0 lies in bytes {places[0][0]} to {sum(places[0])}, outside of "
                                "the file's data, which is 10 to 20; the file is damaged or cut short")
    assert lie((14, 2), (10, 5)) == (
        "m: tensor t0 lies in bytes 14 to 16, which overlaps tensor t1; the file is damaged")
    assert lie((12, 0), (10, 5)) == (
        "m: tensor t0 lies in bytes 12 to 12, which overlaps tensor t1; the file is damaged")


def test_a_chat_template_as_long_as_is_read() -> None:
    assert ChatTemplate("x" * 100_000, {}).render([]) == "x" * 100_000


# -- errors --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("junk", ["x" * 5000, ["x" * 9] * 5000, {"x" * 5000: "x" * 5000}, "x\n" * 2500],
                         ids=["text", "list", "dict", "lines"])
@pytest.mark.filterwarnings("ignore::shardlib.models.files.checkpoint.CheckpointWarning")
def test_an_error_is_a_line_however_long_the_value(junk: Any) -> None:
    gguf = {**small(), "tokenizer.ggml.add_bos_token": True}
    cases = [(config_from_hf, {**HF, "rope_scaling": LLAMA3}),
             (config_from_hf, {**HF, "rope_parameters": {}}),
             (lambda fields: config_from_gguf(fields, tied=True), GGUF),
             (lambda fields: from_metadata(fields, "m"), gguf)]
    refused = 0
    for read, fields in cases:
        for key in fields:
            try:
                read({**fields, key: junk})
            except CheckpointError as error:
                refused += 1
                assert len(str(error)) < 300 and "\n" not in str(error)
    assert refused >= 30


def test_an_error_is_a_line_however_long_the_name(tmp_path: Path) -> None:
    name = "n" * 5000
    damaged = {"a key": {name: 1}, "no tensor": {name: 1}}
    for path, read in (
            (safetensors(tmp_path / "one", {name: []}), read_safetensors_header),
            (safetensors(tmp_path / "two", {name: tensor((3,))}), read_safetensors_header),
            (safetensors(tmp_path / "dtype", {"a": tensor(dtype=name)}), read_safetensors_header),
            (safetensors(tmp_path / "twice", json.dumps(damaged).replace("no tensor", "a key").encode()),
             read_safetensors_header),
            (gguf_file(tmp_path / "dims", tensors=[info(name, (1,) * 5)]), read_gguf_header),
            (gguf_file(tmp_path / "blocks", tensors=[info(name, (7, 1), kind=8)]), read_gguf_header),
            (gguf_file(tmp_path / "same", tensors=[info(name, (1,))] * 2), read_gguf_header),
            (gguf_file(tmp_path / "pairs", [text(name) + struct.pack("<IB", 0, 1)] * 2), read_gguf_header),
            (gguf_file(tmp_path / "kind", [text(name) + struct.pack("<I", 77)]), read_gguf_header)):
        said = refusal(read, path)
        assert said.startswith(f"{path}: ") and len(said) < 400 and "\n" not in said
