"""Files of models as they are written, whole and damaged, and the words of their refusal."""
from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from shardlib.models.files.checkpoint import CheckpointError

HF = dict(model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192,
          num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5,
          max_position_embeddings=131072, tie_word_embeddings=True)
LLAMA3 = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)
GGUF = {"general.architecture": "llama", "llama.vocab_size": 100, "llama.embedding_length": 64,
        "llama.feed_forward_length": 96, "llama.block_count": 2, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.context_length": 512,
        "llama.attention.layer_norm_rms_epsilon": 1e-5}


def refusal(function: Callable, *args: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        function(*args)
    return str(caught.value)


def safetensors(path: Path, header: object, data: bytes = bytes(16), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(shape=(2, 4), offsets=(0, 16), dtype="BF16") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf_file(path: Path, pairs: Sequence[bytes] = (), tensors: Sequence[bytes] = (), data: int = 64,
              version: int = 3, counts: tuple | None = None) -> Path:
    head = (b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(pairs)))) + b"".join(pairs)
            + b"".join(tensors))
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(data))
    return path


def info(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def array(key: str, kind: int, count: int, items: bytes) -> bytes:
    return text(key) + struct.pack("<IIQ", 9, kind, count) + items
