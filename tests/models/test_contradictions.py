"""Where the files of a model contradict each other: what transformers makes of them,
and the one line that is said."""
from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_reference as reference
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers.models import BPE
from transformers import LlamaForCausalLM

from shardlib import Layout, Mesh
from shardlib.models.decoding import weight_types
from shardlib.models.files.checkpoint import CheckpointError, CheckpointWarning
from shardlib.models.files.model_files import INDEX, open_checkpoint
from shardlib.models.files.weights import load_weights
from shardlib.models.generate import main
from shardlib.models.llama_config import config_of
from shardlib.models.llama_weights import load

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
PLAIN = dict(rope_type="default", rope_theta=100.0)


def changed(source: Path, path: Path, tensors: Callable[[dict], Any] = lambda tensors: None,
            **config: Any) -> Path:
    """A copy of a folder: fields of config.json changed (None: taken away), tensors changed in place."""
    shutil.copytree(source, path)
    fields = {**json.loads((path / "config.json").read_text()), **config}
    (path / "config.json").write_text(
        json.dumps({key: value for key, value in fields.items() if value is not None}))
    stored = load_file(path / "model.safetensors")
    tensors(stored)
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    return path


def numbers(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """All that a model of transformers computes with."""
    return {**model.state_dict(), "rotary frequencies": model.model.rotary_emb.inv_freq}


def ours(path: Path) -> dict[str, torch.Tensor]:
    """By our reading of the files, in a model of transformers."""
    checkpoint = open_checkpoint(path)
    config = config_of(checkpoint)
    weights = load(checkpoint, weight_types(config, Layout(), Mesh()), Mesh(), {}, torch.float32)
    return numbers(reference.to_transformers(weights, config))


def theirs(path: Path) -> dict[str, torch.Tensor]:
    return numbers(LlamaForCausalLM.from_pretrained(path, dtype=torch.float32))


CASES = {
    "rope_scaling beside rope_parameters": (dict(rope_parameters=PLAIN, rope_scaling=LLAMA3), None, [
        "rope_scaling and rope_parameters differ; rope_scaling is taken, with rope_theta 10000.0"]),
    "rope_scaling as in rope_parameters": (
        dict(rope_parameters={**LLAMA3, "rope_theta": 50.0}, rope_scaling=LLAMA3, rope_theta=50.0), None, []),
    "an empty rope_scaling": (dict(rope_parameters=PLAIN, rope_scaling={}), None, []),
    "rope_theta beside rope_parameters": (dict(rope_parameters=PLAIN, rope_theta=7.0), None, [
        "rope_theta is 7.0, and 100.0 in rope_parameters; 100.0 is taken"]),
    "rope_theta as in rope_parameters": (dict(rope_parameters=PLAIN, rope_theta=100.0), None, []),
    "a context outside of rope_parameters": (
        dict(rope_parameters={**LLAMA3, "rope_theta": 50.0}, original_max_position_embeddings=6), None,
        ["original_max_position_embeddings is 6, and 16 in rope_parameters; 6 is taken"]),
    "a scaling without its context": (
        dict(rope_parameters={"rope_theta": 50.0,
                              **{k: v for k, v in LLAMA3.items() if "original" not in k}}),
        None, []),
    "head_dim other than hidden_size / heads": (
        dict(head_dim=32),
        lambda t: [t.update({k: torch.cat([v, v + 1], -2 if "o_proj" not in k else -1)}) for k, v in t.items()
                   if any(name in k for name in ("q_proj", "k_proj", "v_proj", "o_proj"))],
        []),
    "fewer layers than are stored": (dict(num_hidden_layers=2), None, [
        "num_hidden_layers is 2, but layers up to number 2 are stored; those from 2 on are not used"]),
    "tied, and two that differ": (dict(tie_word_embeddings=True), None, [
        f"tie_word_embeddings is true, but {EMBED} and {HEAD} are stored and differ; both are used, untied"]),
    "tied, and two that are equal": (dict(tie_word_embeddings=True),
                                     lambda t: t.update({HEAD: t[EMBED].clone()}), []),
    "tied, and equal in another dtype": (
        dict(tie_word_embeddings=True),
        lambda t: t.update({HEAD: t[EMBED].half().float(), EMBED: t[EMBED].half()}),
        ["dtype is float32, but model.embed_tokens.weight is stored as F16; weights are converted from "
         "what is stored to the dtype asked for"]),
    "tied, and the head alone": (dict(tie_word_embeddings=True), lambda t: t.pop(EMBED) is None, [
        f"tie_word_embeddings is true, and {EMBED} is not stored; {HEAD} is taken for both"]),
    "tied, and the embedding alone": (dict(tie_word_embeddings=True), lambda t: t.pop(HEAD) is None, []),
    "another dtype than is stored": (dict(dtype="bfloat16"), None, [
        f"dtype is bfloat16, but {EMBED} is stored as F32; weights are converted from what is stored to the "
        "dtype asked for"]),
    "another torch_dtype than is stored": (dict(dtype=None, torch_dtype="float16"), None, [
        f"torch_dtype is float16, but {EMBED} is stored as F32; weights are converted from what is stored to "
        "the dtype asked for"]),
    "tensors that nothing needs": (dict(), lambda t: t.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8, dtype=torch.int64),
            "scale": torch.ones(3).to(torch.float8_e4m3fn), "flag": torch.tensor(True),
         "phase": torch.ones(2, dtype=torch.complex64)}), []),
}


@pytest.mark.parametrize("what", CASES)
def test_what_transformers_makes_of_it(what, tiny_folder, tmp_path, recwarn):
    config, tensors, said = CASES[what]
    path = changed(tiny_folder, tmp_path / "m", tensors or (lambda tensors: None), **config)
    found, wanted = ours(path), theirs(path)
    assert ([str(w.message) for w in recwarn if w.category is CheckpointWarning]
            == [f"{path / 'config.json'}: {line}" for line in said])
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_single_file_beside_an_index(tiny_folder, tmp_path, recwarn):
    """As where a folder was saved twice, the second time in one file."""
    path = changed(tiny_folder, tmp_path / "m")
    save_file({name: torch.zeros_like(t) for name, t in load_file(path / "model.safetensors").items()},
              path / "x.safetensors")
    (path / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(load_file(path / "x.safetensors"), "x.safetensors")}))
    found, wanted = ours(path), theirs(path)
    assert [str(w.message) for w in recwarn if w.category is CheckpointWarning] == [
        f"{path}: both model.safetensors and {INDEX} are in it; model.safetensors is read"]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted) and found[EMBED].any()


def test_more_layers_than_are_stored_are_refused(tiny_folder, tmp_path):
    """transformers draws them at random."""
    with pytest.raises(CheckpointError) as caught:
        ours(changed(tiny_folder, tmp_path / "m", num_hidden_layers=4))
    assert str(caught.value) == (
        "weight layers.norm1: the checkpoint has no tensor model.layers.3.input_layernorm.weight")


def test_a_head_that_is_neither_stored_nor_tied_is_refused(tiny_folder, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        ours(changed(tiny_folder, tmp_path / "m", lambda tensors: tensors.pop(HEAD) is None))
    assert str(caught.value) == f"weight head: the checkpoint has no tensor {HEAD}"


@pytest.mark.parametrize("at", [(0, 0), (69, 95)])
def test_a_head_and_an_embedding_are_compared_in_parts_to_the_last_number(
        at, tiny_folder, tmp_path, monkeypatch, recwarn):
    read: list[int] = []

    def in_parts(*args: Any) -> dict[str, torch.Tensor]:
        found = load_weights(*args)
        read.append(found["a"].numel())
        return found
    monkeypatch.setattr("shardlib.models.files.contradictions.PART", 1000)
    monkeypatch.setattr("shardlib.models.files.contradictions.load_weights", in_parts)

    def one_number(tensors: dict) -> None:
        tensors[HEAD] = tensors[EMBED].clone()
        tensors[HEAD][at] += 1
    path = changed(tiny_folder, tmp_path / "m", one_number, tie_word_embeddings=True)
    assert config_of(open_checkpoint(path)).tied is False
    assert len([w for w in recwarn if w.category is CheckpointWarning]) == 1
    assert config_of(open_checkpoint(changed(path, tmp_path / "n",
                                             lambda t: t.update({HEAD: t[EMBED].clone()})))).tied is True
    assert read[-7:] == [960] * 7 and len(read) == 7 + (1 if at == (0, 0) else 7)


def test_layers_that_a_gguf_file_does_not_count(tiny_gguf, tmp_path, recwarn):
    before, path = tiny_gguf.read_bytes(), tmp_path / "m.gguf"
    key = b"llama.block_count" + struct.pack("<II", 4, 3)
    assert before.count(key) == 1
    path.write_bytes(before.replace(key, key[:-4] + struct.pack("<I", 2)))
    assert config_of(open_checkpoint(path)).num_layers == 2
    assert [str(w.message) for w in recwarn] == [
        f"{path}: llama.block_count is 2, but layers up to number 2 are stored; those from 2 on are not used"]


JUNK = [None, True, 0, -1, 1 << 40, 0.5, "", "x", [], [1], {}, {"a": {}}, {"rope_type": []}]


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling", "rope_theta",
                                 "original_max_position_embeddings", "tie_word_embeddings", "dtype",
                                 "num_hidden_layers"])
@pytest.mark.filterwarnings("ignore::shardlib.models.files.checkpoint.CheckpointWarning")
def test_values_of_any_kind(key, tiny_folder, tmp_path):
    path = changed(tiny_folder, tmp_path / "m", rope_scaling=LLAMA3, rope_parameters=PLAIN)
    fields = json.loads((path / "config.json").read_text())
    for junk in JUNK:
        (path / "config.json").write_text(json.dumps({**fields, key: junk}))
        try:
            config_of(open_checkpoint(path))
        except CheckpointError:
            pass


def test_the_command_says_it(tiny_folder, tmp_path, capfd):
    """On stderr, among what it says of its progress; and is as silent as that."""
    path = changed(tiny_folder, tmp_path / "m", rope_theta=7.0)
    core = tokenizers.Tokenizer(BPE({chr(33 + i): i for i in range(70)}, []))
    core.save(str(path / "tokenizer.json"))
    command = ["--model", str(path), "--raw", "--prompt", "!", "--max-new-tokens", "1"]
    assert main(command) == 0
    said = (
        f"note: {path / 'config.json'}: rope_theta is 7.0, and 10000.0 in rope_parameters; 10000.0 is taken")
    assert capfd.readouterr().err.splitlines().count(said) == 1
    assert main([*command, "--quiet"]) == 0 and capfd.readouterr().err == ""
