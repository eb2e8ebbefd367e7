"""SmolLM2's greedy decoding: ms a token, ours (tp=1) beside transformers' generate, and ours on two processes (tp=2, shared memory)."""
from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from record import row, write

from shardlib import Layout, Mesh
from shardlib.distributed.runtime import connect
from shardlib.models.decoding import Model, llama_of
from shardlib.models.llama_config import config_of
from shardlib.models.model_files import open_checkpoint
from shardlib.models.tokenizer import Tokenizer
from shardlib.params import leaf_values

PROMPT, NEW, ROUNDS = "The history of the sea is", 32, 5


def transformers_model(model: Model):
    """The same weights in transformers' LlamaForCausalLM."""
    from transformers import LlamaConfig as Config, LlamaForCausalLM
    c = model.config
    hf = LlamaForCausalLM(Config(vocab_size=c.vocab_size, hidden_size=c.d_model, num_hidden_layers=c.num_layers, num_key_value_heads=c.num_kv_heads,
                                 num_attention_heads=c.num_kv_heads * c.queries_per_kv, head_dim=c.head_dim, intermediate_size=c.d_ff,
                                 rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, tie_word_embeddings=c.tied, max_position_embeddings=c.max_context))
    w = dict(leaf_values(model.weights, ""))
    state = {"model.embed_tokens.weight": w[".embed"], "model.norm.weight": w[".norm"]}
    rows = {"input_layernorm": ("norm1", lambda x: x), "post_attention_layernorm": ("norm2", lambda x: x),
            "self_attn.q_proj": ("wq", lambda x: x.flatten(1).t()), "self_attn.k_proj": ("wk", lambda x: x.flatten(1).t()),
            "self_attn.v_proj": ("wv", lambda x: x.flatten(1).t()), "self_attn.o_proj": ("wo", lambda x: x.flatten(0, 2).t()),
            "mlp.gate_proj": ("gate", lambda x: x.t()), "mlp.up_proj": ("up", lambda x: x.t()), "mlp.down_proj": ("down", lambda x: x.t())}
    for i in range(c.num_layers):
        for name, (leaf, turn) in rows.items():
            state[f"model.layers.{i}.{name}.weight"] = turn(w[f".layers.{leaf}"][i]).contiguous()
    hf.load_state_dict(state, strict=False)
    return hf.to(model.dtype).eval()


def measure(dtype: torch.dtype) -> dict[str, float]:
    """ms a token of both, in turn, on the same prompt; the tokens must be equal in fp32."""
    checkpoint = open_checkpoint("smollm2")
    with connect(Mesh(), "cpu") as runtime:
        model = Model.load(checkpoint, Layout(), runtime, dtype)
        hf = transformers_model(model)
        packed = Model(model.config, model.weights, Layout(), runtime, dtype).pack()
        ids = Tokenizer.load("smollm2").encode(PROMPT)
        inputs = torch.tensor([ids])

        def ours() -> list[int]:
            return packed.generate([ids], NEW).tokens[0]

        def theirs() -> list[int]:
            with torch.inference_mode():
                return hf.generate(inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)[0].tolist()
        if dtype == torch.float32 and ours() != theirs():
            raise SystemExit("the two generate different tokens")
        times: dict[str, list[float]] = {"ours": [], "transformers": []}
        for _ in range(ROUNDS):
            for name, run in (("ours", ours), ("transformers", theirs)):
                begin = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - begin) / NEW * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def two_processes() -> float:
    """ms a token of tp=2 under torchrun, which meet in shared memory."""
    found = subprocess.run([str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "-m", "shardlib.models.generate", "--model", "smollm2",
                            "--mesh", "tp=2", "--raw", "--prompt", PROMPT, "--max-new-tokens", str(NEW), "--json"],
                           env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True, timeout=600)
    return 1e3 / json.loads(found.stdout)["tokens_per_second"]


def main() -> None:
    rows = []
    fp32 = measure(torch.float32)
    rows.append(row("SmolLM2-135M greedy decoding, fp32, tp=1", "ms/token", fp32["ours"], {"transformers generate": fp32["transformers"]}))
    bf16 = measure(torch.bfloat16)
    rows.append(row("SmolLM2-135M greedy decoding, bf16, tp=1", "ms/token", bf16["ours"], {"transformers generate": bf16["transformers"]}))
    rows.append(row("SmolLM2-135M greedy decoding, fp32, tp=2 through shared memory", "ms/token", two_processes(), {"ours at tp=1": fp32["ours"]}))
    write("decoding", rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
