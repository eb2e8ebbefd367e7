"""Where a drawn token comes from: the seed, its position in the text and its row, and nothing else."""
from __future__ import annotations

import llama_reference as reference
import pytest
import torch
from simulated import tree

from shardlib import Layout, Mesh
from shardlib.distributed.runtime import connect
from shardlib.models.decoding import Model, Sampling
from shardlib.models.llama import LlamaConfig

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = LlamaConfig(vocab_size=31, d_model=24, num_layers=1, num_kv_heads=2, queries_per_kv=1, head_dim=8,
                     d_ff=17, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=False, max_context=32)


def test_what_was_said_as_the_prompt_is_continued_as_before() -> None:
    """Its next token is drawn at the same position, whether a prompt or an answer led there,
    whatever is beside it in the batch."""
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2, 3]]
    with connect(Mesh(), "cpu") as runtime:
        model = Model(CONFIG, tree(reference.random_weights(CONFIG, 3), CONFIG), Layout(), runtime,
                      torch.float32)

        def said(prompts: list[list[int]], count: int, seed: int = 1, temperature: float = 1.0,
                 top_p: float = 0.95) -> list[list[int]]:
            return model.generate(prompts, count, (), Sampling(temperature, top_p, seed)).tokens
        whole = said(prompts, 8)
        for so_far in (1, 2, 5):
            assert said([t[:len(p) + so_far] for t, p in zip(whole, prompts)], 8 - so_far) == whole
        assert said([whole[0][:4], [9, 9], [9], [9]], 7)[0] == whole[0]
        assert whole[0] != whole[3] and said(prompts, 8, seed=2) != whole
        assert (said(prompts, 8, temperature=1e-300) == said(prompts, 8, top_p=1e-9)
                == said(prompts, 8, temperature=0.0) != whole)
        assert all(len(set(t[len(p):])) > 2 for t, p in zip(whole, prompts))
