"""SmolLM2's greedy decoding: ms a token, ours (tp=1) beside transformers' generate,
and ours on two processes beside one, on the same cores.

Two processes meet in shared memory and have half of the cores each. Each way is timed after a first
generation, with its compilation.
"""
from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

import torch
from record import row, write

from shardlib import Layout, Mesh
from shardlib.distributed.runtime import connect
from shardlib.models.decoding import Model
from shardlib.models.files.model_files import open_checkpoint
from shardlib.models.files.tokenizer import Tokenizer
from shardlib.models.layouts import named_layout
from shardlib.params import leaf_values

PROMPT, NEW, ROUNDS = "The history of the sea is", 32, 5


def transformers_model(model: Model):
    """The same weights in transformers' LlamaForCausalLM."""
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM
    c = model.config
    hf = LlamaForCausalLM(Config(vocab_size=c.vocab_size, hidden_size=c.d_model,
                                 num_hidden_layers=c.num_layers, num_key_value_heads=c.num_kv_heads,
                                 num_attention_heads=c.num_kv_heads * c.queries_per_kv, head_dim=c.head_dim,
                                 intermediate_size=c.d_ff, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta,
                                 tie_word_embeddings=c.tied, max_position_embeddings=c.max_context))
    w = dict(leaf_values(model.weights, ""))
    state = {"model.embed_tokens.weight": w[".embed"], "model.norm.weight": w[".norm"]}
    rows = {"input_layernorm": ("norm1", lambda x: x), "post_attention_layernorm": ("norm2", lambda x: x),
            "self_attn.q_proj": ("wq", lambda x: x.flatten(1).t()),
            "self_attn.k_proj": ("wk", lambda x: x.flatten(1).t()),
            "self_attn.v_proj": ("wv", lambda x: x.flatten(1).t()),
            "self_attn.o_proj": ("wo", lambda x: x.flatten(0, 2).t()),
            "mlp.gate_proj": ("gate", lambda x: x.t()), "mlp.up_proj": ("up", lambda x: x.t()),
            "mlp.down_proj": ("down", lambda x: x.t())}
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
                return hf.generate(inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                                   pad_token_id=0)[0].tolist()
        if dtype == torch.float32 and ours() != theirs():
            raise SystemExit("the two generate different tokens")
        times: dict[str, list[float]] = {"ours": [], "transformers": []}
        for _ in range(ROUNDS):
            for name, run in (("ours", ours), ("transformers", theirs)):
                begin = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - begin) / NEW * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def one_of(count: int) -> None:
    """One of `count` processes: prints the median over rounds of ms a token on the slowest."""
    mesh = Mesh(tp=count)
    with connect(mesh, "cpu") as runtime:
        runtime.create_groups([("tp",)])
        group = runtime.group(("tp",))
        model = Model.load(open_checkpoint("smollm2"), named_layout("tp", mesh), runtime).pack()
        ids = Tokenizer.load("smollm2").encode(PROMPT)
        times = []
        for _ in range(1 + ROUNDS):
            begin = time.perf_counter()
            model.generate([ids], NEW)
            took = torch.tensor((time.perf_counter() - begin) / NEW * 1e3)
            times.append(group.all_reduce(took, "max").item())
        if runtime.rank == 0:
            print(json.dumps(statistics.median(times[1:])))


def on_processes(count: int) -> float:
    """ms a token of that many processes, which share the cores."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), __file__]
    done = subprocess.run(command,
                          env={**os.environ, "OMP_NUM_THREADS": str(max(1, os.cpu_count() // count))},
                          stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    return json.loads(done.stdout)


def main() -> None:
    rows = []
    fp32 = measure(torch.float32)
    rows.append(row("SmolLM2-135M greedy decoding, fp32, tp=1", "ms/token", fp32["ours"],
                    {"transformers generate": fp32["transformers"]}))
    bf16 = measure(torch.bfloat16)
    rows.append(row("SmolLM2-135M greedy decoding, bf16, tp=1", "ms/token", bf16["ours"],
                    {"transformers generate": bf16["transformers"]}))
    processes: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(3):
        for count, times in processes.items():
            times.append(on_processes(count))
    one, two = (statistics.median(times) for times in processes.values())
    rows.append(row("SmolLM2-135M greedy decoding, fp32, tp=2 through shared memory", "ms/token", two,
                    {"ours at tp=1": one}))
    write("decoding", rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    one_of(int(os.environ["WORLD_SIZE"])) if "RANK" in os.environ else main()
