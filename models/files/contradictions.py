"""Where the files of a model contradict each other or themselves:
one answer to each question, and a line that says so.

The answers are those of Hugging Face transformers 5, so that a folder means the same here and there. Which
one was taken is said as a `CheckpointWarning`. What no answer fits is left as it is, for the reader of the
config to refuse.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch

from shardlib.mesh import Mesh
from shardlib.models.files.checkpoint import Checkpoint, note
from shardlib.models.files.weights import PART, PLAIN, Weight, load_weights
from shardlib.spec import parse

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = re.compile(r"(?:model\.layers|blk)\.(\d+)\.")
# what stands beside a set of rotary numbers, or in it
ROPE = ("rope_theta", "original_max_position_embeddings")
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def settled(checkpoint: Checkpoint, where: str) -> Checkpoint:
    """The same checkpoint, saying each thing once; `where` names the file that holds its metadata."""
    gguf = checkpoint.format == "gguf"
    _say_layers_left_over(checkpoint, "llama.block_count" if gguf else "num_hidden_layers", where)
    if gguf:
        return checkpoint
    _say_other_dtype(checkpoint, where)
    return _tied(replace(checkpoint, metadata=_one_rope(checkpoint.metadata, where)), where)


def _say_layers_left_over(checkpoint: Checkpoint, key: str, where: str) -> None:
    stored = {int(found[1]) for name in checkpoint.tensors if (found := LAYER.match(name))}
    wanted = checkpoint.metadata.get(key)
    if type(wanted) is int and stored and max(stored) >= wanted:
        note(f"{where}: {key} is {wanted}, but layers up to number {max(stored)} are stored; those from "
             f"{wanted} on are not used")


def _say_other_dtype(checkpoint: Checkpoint, where: str) -> None:
    key = "dtype" if checkpoint.metadata.get("dtype") is not None else "torch_dtype"
    said = checkpoint.metadata.get(key)
    entry = checkpoint.tensors.get(EMBED)
    if (isinstance(said, str) and said in DTYPES and entry and entry.dtype in PLAIN
        and entry.dtype != DTYPES[said]):
        note(f"{where}: {key} is {said}, but {EMBED} is stored as {entry.dtype}; weights are converted from "
             "what is stored to the dtype asked for")


def _one_rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config with its rotary embedding in `rope_parameters` alone."""
    given, older = config.get("rope_parameters"), config.get("rope_scaling")
    taken, name = (older, "rope_scaling") if older else (given, "rope_parameters")
    if not isinstance(taken or {}, dict):
        return dict(config)
    beside = {key: config[key] for key in ROPE if config.get(key) is not None}
    taken = taken or {}
    one = {"rope_theta": 10000.0, **beside, **taken,
           **{key: beside[key] for key in ROPE[1:] if key in beside}}
    if older and isinstance(given, dict) and any(one.get(key) != value for key, value in given.items()):
        note(f"{where}: rope_scaling and rope_parameters differ; rope_scaling is taken, with rope_theta "
             f"{one['rope_theta']}")
    for key in beside:
        if taken.get(key, beside[key]) != beside[key]:
            note(f"{where}: {key} is {beside[key]}, and {taken[key]} in {name}; {one[key]} is taken")
    return {**{key: value for key, value in config.items() if key not in ("rope_scaling", *ROPE)},
            "rope_parameters": one}


def _tied(checkpoint: Checkpoint, where: str) -> Checkpoint:
    """The flag that says of head and embedding that they are one, held against what is stored of the two."""
    if checkpoint.metadata.get("tie_word_embeddings") is not True or HEAD not in checkpoint.tensors:
        return checkpoint
    if EMBED not in checkpoint.tensors:
        note(f"{where}: tie_word_embeddings is true, and {EMBED} is not stored; {HEAD} is taken for both")
        return replace(checkpoint,
                       tensors={**checkpoint.tensors, EMBED: replace(checkpoint.tensors[HEAD], name=EMBED)})
    if _equal(checkpoint, EMBED, HEAD):
        return checkpoint
    note(f"{where}: tie_word_embeddings is true, but {EMBED} and {HEAD} are stored and differ; both are "
         "used, untied")
    return replace(checkpoint, metadata={**checkpoint.metadata, "tie_word_embeddings": False})


def _equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
    """Whether two stored matrices hold the same numbers, read in parts, until one differs."""
    one, other = checkpoint.tensors[a], checkpoint.tensors[b]
    if one.shape != other.shape or len(one.shape) != 2 or not {one.dtype, other.dtype} <= PLAIN.keys():
        return False
    sizes, parts = dict(zip("VD", one.shape)), Mesh(part=max(1, -(-prod(one.shape) // PART)))
    table, type = [Weight("a", "V D", a, "V D"), Weight("b", "V D", b, "V D")], parse("V/part D")
    for part in parts.coordinates():
        found = load_weights(checkpoint, table, sizes, {"a": type, "b": type}, parts, part, torch.float64)
        if not torch.equal(found["a"], found["b"]):
            return False
    return True
