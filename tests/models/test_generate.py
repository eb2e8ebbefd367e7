"""generate says what Hugging Face transformers says, on every mesh;
and ends with one line where it cannot."""
from __future__ import annotations

import io
import json
import re
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_reference as reference
import pytest
import tokenizers
import torch
import torch.distributed as dist
import transformers
from here import HELPERS
from launching import GENERATE, Finished, forked_torchrun, ranks, run, torchrun
from simulated import generate, line, tree

from shardlib import Layout, Mesh
from shardlib.distributed.runtime import connect
from shardlib.models import ways
from shardlib.models.decoding import Model, Sampling, weight_types
from shardlib.models.files.checkpoint import CheckpointError
from shardlib.models.files.model_files import find_model, open_checkpoint
from shardlib.models.files.tokenizer import Tokenizer
from shardlib.models.generate import main
from shardlib.models.layouts import named_layout
from shardlib.models.llama import Llama, LlamaConfig
from shardlib.models.llama_config import config_of
from shardlib.models.llama_weights import load

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Known:
    """A model with what transformers, on the same weights, makes of some prompts: greedy, in fp32."""
    name: str
    config: LlamaConfig
    weights: Llama
    tokenizer: Tokenizer
    texts: tuple[str, ...]
    prompts: list[list[int]]
    tokens: list[list[int]]

    @property
    def command(self) -> list[str]:
        return ["--model", self.name, "--raw", "--max-new-tokens", str(NEW),
                *(a for text in self.texts for a in ("--prompt", text))]

    def answers(self) -> list[dict[str, Any]]:
        return [{"tokens": t, "text": self.tokenizer.decode(t[len(p):])}
                for t, p in zip(self.tokens, self.prompts)]


NEW = 12


def known(name: str, texts: Sequence[str]) -> Known:
    checkpoint, tokenizer = open_checkpoint(name), Tokenizer.load(name)
    config = config_of(checkpoint)
    weights = load(checkpoint, weight_types(config, Layout(), Mesh()), Mesh(), {}, torch.float32)
    model, prompts = reference.to_transformers(weights, config), [tokenizer.encode(text) for text in texts]
    with torch.no_grad():
        tokens = [model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.int64),
                                 max_new_tokens=NEW, do_sample=False, eos_token_id=sorted(tokenizer.eos_ids),
                                 pad_token_id=0)[0].tolist() for p in prompts]
    return Known(name, config, tree(weights, config), tokenizer, tuple(texts), prompts, tokens)


# -- SmolLM2 -------------------------------------------------------------------------------------------------

try:
    find_model("smollm2")
    smollm2_installed = pytest.mark.skipif(False, reason="")
except CheckpointError as missing:
    smollm2_installed = pytest.mark.skip(reason=str(missing))


@pytest.fixture(scope="module")
def smollm2(one_thread: None) -> Known:
    return known("smollm2",
                 ("The capital of France is", "Once upon a time", "def fibonacci(n):\n", "Water boils at",
                  "1, 2, 3, 4,", "Dear Sir or Madam, I am writing to you because"))


@smollm2_installed
@pytest.mark.parametrize("mesh, layout", [("", "tp"), ("tp=3", "tp+sp"), ("tk=2,tg=2", "tp")])
def test_smollm2_on_the_simulator(smollm2: Known, mesh: str, layout: str) -> None:
    """Its own heads, 3 of keys with 3 queries each, on 3 ranks and on 2 x 2. All other layouts: random
    models, in test_llama.py."""
    made = Mesh.parse(mesh)
    assert generate(smollm2.weights, smollm2.config, named_layout(layout, made), made, smollm2.prompts, NEW,
                    smollm2.tokenizer.eos_ids) == smollm2.tokens


@smollm2_installed
def test_smollm2_under_torchrun(smollm2: Known) -> None:
    """One batch of prompts of unequal lengths, over gloo; of 3 heads a rank has 2, the other 1. (Other
    layouts: `test_a_folder_on_two_ranks`.)"""
    finished = torchrun(2, [*GENERATE, *smollm2.command, "--mesh", "tp=2", "--layout", "tp+sp", "--json"])
    assert (finished.returncode, finished.stderr) == (0, "")
    made = json.loads(finished.stdout)
    assert made == {"completions": smollm2.answers(), "tokens_per_second": made["tokens_per_second"]}


@smollm2_installed
def test_smollm2_chats(capfd: pytest.CaptureFixture[str]) -> None:
    """Without --raw the prompt is a turn of a chat, and the end token ends it."""
    assert main(["--prompt", "Say only the word yes.", "--max-new-tokens", "40", "--json"]) == 0
    made = json.loads(capfd.readouterr().out)
    assert sorted(made) == ["text", "tokens", "tokens_per_second"]
    tokenizer = Tokenizer.load("smollm2")
    prompt = tokenizer.encode(tokenizer.chat([{"role": "user", "content": "Say only the word yes."}]))
    answer = made["tokens"][len(prompt):]
    assert made["tokens"][:len(prompt)] == prompt and made["text"] == tokenizer.decode(answer)
    assert answer[-1] in tokenizer.eos_ids and tokenizer.eos_ids.isdisjoint(answer[:-1])


# -- a folder that a user has --------------------------------------------------------------------------------

TEXTS = ("abcabc", "b", "ccccbbbba")
CONFIG = LlamaConfig(vocab_size=41, d_model=48, num_layers=2, num_kv_heads=3, queries_per_kv=2, head_dim=8,
                     d_ff=29, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=False, max_context=48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that transformers saved, with a tokenizer of its own,
    and an end token that one of its answers meets."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    model = reference.to_transformers(reference.random_weights(CONFIG, 5), CONFIG)
    vocab = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLM")} | {"<s>": 39, "</s>": 40}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    core.add_special_tokens(["<s>", "</s>"])
    with torch.no_grad():
        made = model.generate(torch.tensor([core.encode(TEXTS[0]).ids]), max_new_tokens=NEW, do_sample=False,
                              eos_token_id=[], pad_token_id=0)
    answer = made[0, len(TEXTS[0]):].tolist()
    end = next(token for i, token in enumerate(answer) if i >= 3 and token not in answer[:i])
    model.generation_config = transformers.GenerationConfig(eos_token_id=end)
    model.save_pretrained(path)
    core.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Known:
    return known(str(folder), TEXTS)


def test_an_end_token_ends_its_row_and_belongs_to_it(tiny: Known) -> None:
    (end,) = tiny.tokenizer.eos_ids
    made = [t[len(p):] for t, p in zip(tiny.tokens, tiny.prompts)]
    assert (made[0][-1] == end and end not in made[0][:-1] and 3 < len(made[0]) < NEW
            and max(map(len, made)) == NEW)
    for mesh in ("tp=2", "dp=3"):
        assert generate(tiny.weights, tiny.config, named_layout("tp", Mesh.parse(mesh)), Mesh.parse(mesh),
                        tiny.prompts, NEW, {end}) == tiny.tokens


def test_draws(tiny: Known) -> None:
    """A draw is a function of the seed, the position and the row, on every mesh; greedy at a temperature of
    next to nothing. (Real groups of ranks draw in `test_a_folder_on_two_ranks`, frequencies are in
    tests/ops/test_sampling.py.)"""
    def drawn(mesh: str = "tp=1", layout: str = "tp", seed: int = 1, temperature: float = 1.5,
              prompts: Sequence[list[int]] = tiny.prompts, new: int = NEW) -> list[list[int]]:
        made, how = Mesh.parse(mesh), Sampling(temperature, 0.9, seed)
        return generate(tiny.weights, tiny.config, named_layout(layout, made), made, prompts, new, (), how)
    alone = drawn()
    assert drawn("tp=2") == drawn("tp=3", "tp+sp") == drawn("dp=2") == alone != drawn(seed=0)
    assert [t[:len(e)] for t, e in zip(drawn(temperature=1e-300), tiny.tokens)] == tiny.tokens
    for said in (1, 5):         # what was said so far as the prompt gives the same next token
        longer = [t[:len(p) + said] for t, p in zip(alone, tiny.prompts)]
        assert drawn(prompts=longer, new=NEW - said) == alone


def test_a_folder_alone(tiny: Known, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*tiny.command, "--json"]) == 0
    made = json.loads(capfd.readouterr().out)
    assert made == {"completions": tiny.answers(), "tokens_per_second": made["tokens_per_second"]}
    for i, text in enumerate(tiny.texts):        # each prompt by itself, and shown as it comes
        one = ["--model", tiny.name, "--raw", "--max-new-tokens", str(NEW), "--prompt", text]
        assert main([*one, "--json"]) == 0
        made = json.loads(capfd.readouterr().out)
        assert made == {**tiny.answers()[i], "tokens_per_second": made["tokens_per_second"]}
        assert main([*one, "--quiet"]) == 0
        assert capfd.readouterr() == (tiny.answers()[i]["text"] + "\n", "")
    assert main([*tiny.command, "--quiet"]) == 0
    assert capfd.readouterr() == ("".join(f"[{i}] {a['text']}\n" for i, a in enumerate(tiny.answers())), "")


def test_a_folder_as_a_command(tiny: Known) -> None:
    finished = run([*GENERATE, *tiny.command, "--json"])
    assert (finished.returncode, finished.stderr) == (0, "")
    assert json.loads(finished.stdout)["completions"] == tiny.answers()


def test_the_plan_alone(tiny: Known, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """On stdout, whatever else is silent; of the program that would run; results are left alone."""
    (tmp_path / "notes.json").write_text('{"my": "precious"}')
    plan = [*tiny.command, "--plan", "--results", str(tmp_path / "notes.json")]
    for how, function in (([], "next_token"), (["--temperature", "0.7"], "next_sample")):
        assert main([*plan, *how, "--json"]) == 0
        out, err = capfd.readouterr()
        found = json.loads(out)
        assert err == "" and (found["program"], found["mesh"], found["traffic"],
                              found["collectives"]) == (function, "", [], 0)
        assert main([*plan, *how, "--quiet"]) == 0
        out, err = capfd.readouterr()
        assert err == "" and out.splitlines()[0].rstrip() == f"{function} on mesh (one rank)"
        assert main([*plan, *how]) == 0
        again, err = capfd.readouterr()
        assert (again == out
                and err.splitlines()[0] == f"1 rank on cpu, mesh (), layout (); reading {tiny.name}")
    assert (tmp_path / "notes.json").read_text() == '{"my": "precious"}'


def test_the_plan_of_prompts(tiny: Known, capfd: pytest.CaptureFixture[str],
                             monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ["--model", tiny.name, "--raw", "--prompt", "ab", "--prompt", "abc", "--max-new-tokens", "4",
            "--plan", "prompts", "--quiet"]
    for most, how in (({}, "all at once"), ({"cpu": -1}, "two halves of the rows in turns, the sums of one "
                                                         "beside the other's work. One half:")):
        monkeypatch.setitem(ways.BESIDE_BYTES, "rows", most)
        assert main(plan) == 0
        said, title, *_ = capfd.readouterr().out.splitlines()
        assert re.fullmatch(rf"prompts, 2 x \d+ tokens: {how}", said)
        assert title.rstrip() == "prompt_token on mesh (one rank)"
        assert main([*plan, "--json"]) == 0 and json.loads(capfd.readouterr().out)["way"] == said


@pytest.fixture
def foreign(tiny: Known, tmp_path: Path) -> Known:
    """`tiny` with a tokenizer that speaks Japanese, and whose first answer ends within a character."""
    folder = damaged(tmp_path / "foreign", Path(tiny.name))
    spoken = json.loads((folder / "tokenizer.json").read_text())
    last = tiny.tokens[1][-1]
    assert last not in map(tiny.tokenizer.core.token_to_id, "abc")
    vocab = {token if token in "abc" or id > 38 else "\u00e3" if id == last else chr(0x3042 + id): id
             for token, id in spoken["model"]["vocab"].items()}
    spoken["model"]["vocab"], spoken["decoder"] = vocab, {"type": "ByteLevel", "add_prefix_space": True,
                                                          "trim_offsets": True, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps(spoken))
    return Known(str(folder), tiny.config, tiny.weights, Tokenizer.load(folder), tiny.texts[1:2],
                 tiny.prompts[1:2], tiny.tokens[1:2])


def test_what_stdout_cannot_encode(foreign: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is escaped; the answer ends in the bytes that make up no character, as in the JSON."""
    (answer,) = foreign.answers()
    assert answer["text"].endswith("\ufffd") and not answer["text"].isascii()
    for encoding in ("ascii", "utf-8"):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        assert main([*foreign.command, "--quiet", "--results", str(tmp_path / encoding)]) == 0
        assert sys.stdout.buffer.getvalue() == (answer["text"] + "\n").encode(encoding, "backslashreplace")
        assert json.loads((tmp_path / encoding).read_text())["text"] == answer["text"]


def test_one_model_many_batches(tiny: Known) -> None:
    """Of other sizes each time, as alone; the tokens as they come are the tokens at the end."""
    with connect(Mesh(), "cpu") as runtime:
        model = Model.load(open_checkpoint(tiny.name), Layout(), runtime)
        for rows in ([0, 1, 2], [2], [1, 0], [0, 0, 0, 0, 1]):
            prompts, steps = [tiny.prompts[i] for i in rows], []
            made = model.generate(prompts, NEW, tiny.tokenizer.eos_ids, on_tokens=steps.append)
            assert made.tokens == [tiny.tokens[i] for i in rows]
            assert ([[*p, *(t for t in column if t is not None)] for p, column in zip(prompts, zip(*steps))]
                    == made.tokens)
            assert made.new_tokens == sum(map(len, made.tokens)) - sum(map(len, prompts))


def test_whatever_tensors_are_by_default(tiny: Known) -> None:
    """A server may have set a default dtype, and may load models within torch.device("cuda")."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"), connect(Mesh(), "cpu") as runtime:
            made = Model.load(open_checkpoint(tiny.name), Layout(),
                              runtime).pack().generate(tiny.prompts, NEW, tiny.tokenizer.eos_ids)
    finally:
        torch.set_default_dtype(before)
    assert made.tokens == tiny.tokens


BATCHES = """
import json, sys
from shardlib import Mesh
from shardlib.distributed.runtime import connect
from shardlib.models.decoding import Model
from shardlib.models.layouts import named_layout
from shardlib.models.files.model_files import open_checkpoint

with connect(Mesh(dp=2), "cpu") as runtime:
    model = Model.load(open_checkpoint(sys.argv[1]), named_layout("tp", Mesh(dp=2)), runtime)
    made = [model.generate(prompts, int(sys.argv[2])).tokens for prompts in json.loads(sys.argv[3])]
    if runtime.rank == 0:
        print(json.dumps(made))
"""


def test_one_model_many_batches_on_two_ranks(tiny: Known, tmp_path: Path) -> None:
    """Of 3 rows and of 4 the first rank has 2, but they are parts of different wholes."""
    (tmp_path / "batches.py").write_text(BATCHES)
    batches = [[tiny.prompts[i] for i in rows] for rows in ([2, 1, 0], [2, 1, 0, 2], [2], [2, 1, 0])]
    finished = ranks(2, [tmp_path / "batches.py", tiny.name, str(NEW), json.dumps(batches)])
    assert (finished.returncode, finished.stderr) == (0, "")
    with connect(Mesh(), "cpu") as runtime:
        model = Model.load(open_checkpoint(tiny.name), Layout(), runtime)
        assert json.loads(finished.stdout) == [model.generate(prompts, NEW).tokens for prompts in batches]


# -- bad input -----------------------------------------------------------------------------------------------

def damaged(path: Path, source: Path, change: Callable[[bytes], bytes] = lambda data: data) -> Path:
    """A copy of a model, its weights changed."""
    shutil.copytree(source, path) if source.is_dir() else shutil.copy(source, path)
    file = path / "model.safetensors" if path.is_dir() else path
    file.write_bytes(change(file.read_bytes()))
    return path


@pytest.fixture(scope="module")
def bad(folder: Path, tiny_gguf: Path,
        tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[str], str]]:
    """Command lines, and what is said of them, alone and on ranks."""
    tmp = tmp_path_factory.mktemp("bad")
    short, header, empty = (damaged(tmp / name, folder, change) for name, change in (
        ("short", lambda data: data[:-100]), ("header", lambda data: data[:9] + b"x" + data[10:]),
        ("empty", lambda data: b"")))
    gguf_short, gguf_magic = (damaged(tmp / name, tiny_gguf, change) for name, change in (
        ("short.gguf", lambda data: data[:-100]), ("magic.gguf", lambda data: b"x" + data[1:])))
    other, alike, mute = (damaged(tmp / name, folder) for name in ("other", "alike", "mute"))
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["Z"] = 41
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    config = json.loads((folder / "config.json").read_text())
    (alike / "config.json").write_text(json.dumps({**config, "intermediate_size": 30}))
    (mute / "tokenizer.json").unlink()
    (tmp / "bytes").write_bytes(b'{"request":0,"of":"\xff"}\n')
    good, prompt = ["--model", str(folder), "--raw"], ["--raw", "--prompt", "abc"]
    return [
        ([*prompt, "--model", "nosuch"],
         "model 'nosuch': not a known name (smollm2), not a folder, not a .gguf file"),
        ([*prompt, "--model", str(short)], f"{short / 'model.safetensors'}: tensor model.norm.weight lies in "
         "bytes 107320 to 107512, outside of the "
         "file's data, which is 2104 to 107412; the file is damaged or cut short"),
        ([*prompt, "--model", str(header)],
         f"{header / 'model.safetensors'}: not JSON: Expecting property name enclosed in double quotes: "
         "line 1 column 2 (char 1)"),
        ([*prompt, "--model", str(empty)], (f"{empty / 'model.safetensors'}: a file of 0 bytes whose header "
                                            "claims 0; it is damaged or cut short")),
        ([*prompt, "--model", str(gguf_short)],
         f"{gguf_short}: tensor output.weight lies in bytes 916576 to 943456, outside of the file's data, "
         "which is 2272 to 943356; the file is damaged or cut short"),
        ([*prompt, "--model", str(gguf_magic)], f"{gguf_magic}: not a GGUF file"),
        ([*prompt, "--model", str(alike), "--max-new-tokens", "3"],
         'weight layers.gate: tensor model.layers.0.mlp.gate_proj.weight should be "F D" '
         "with F=30 D=48, so (30, 48); it is (29, 48)"),
        ([*prompt, "--model", str(mute)], f"{mute / 'tokenizer.json'}: No such file or directory"),
        ([*prompt, "--prompt", "aZ", "--model", str(other)],
         "token 41 of a prompt is none of the model's, which are 0 to 40; its tokenizer is another's"),
        ([*good], "the prompt is empty; give one with --prompt"),
        ([*good, "--prompt", "abc", "--prompt", ""], "the prompt is empty; give one with --prompt"),
        ([*good, "--prompt", "\udcff"], "the prompt is not UTF-8 text"),
        ([*good, "--prompt", "a" * 45, "--max-new-tokens", "4"],
         "the prompt has 45 tokens and 4 are to follow; the model's context is 48"),
        ([*good, "--prompt", "abc", "--max-new-tokens", "0"], "max_new_tokens is 0; ask for at least 1"),
        ([*good, "--prompt", "abc", "--max-new-tokens", "few"],
         "argument --max-new-tokens: invalid int value: 'few'; --help lists the options"),
        ([*good, "--prompt", "abc", "--layout", "K=ep"], "layout, dim K: unknown axis ep; the mesh has "),
        ([*good, "--prompt", "abc", "--layout", "Q=tp"],
         "layout 'Q=tp': the models have no dim Q; they have B, T, S, D, L, K, G, H, E, F, V"),
        ([*good, "--prompt", "abc", "--layout", "tp+zp"],
         "layout 'tp+zp': 'zp' is not one of tp, sp, fsdp, cp, ep, and no DIM=AXIS"),
        ([*good, "--prompt", "abc", "--top-p", "0"],
         "--temperature 0.0 --top-p 0.0: temperature is at least 0, top-p above 0 and at most 1"),
        ([*good, "--prompt", "abc", "--temperature", "nan"],
         "--temperature nan --top-p 1.0: temperature is at least 0, top-p above 0 and at most 1"),
        ([*good, "--prompt", "abc", "--seed", "-9223372036854775808"],
         "--seed -9223372036854775808: a seed is above -2**63 and below 2**63"),
        ([*good, "--prompt", "abc", "--max-new-tokens", "3", "--results", str(tmp / "none" / "results")],
         f"{tmp / 'none' / 'results'}: No such file or directory"),
        ([*good, "--prompt", "abc", "--max-new-tokens", "3", "--results", str(tmp / "bytes")],
         (f"{tmp / 'bytes'}, line 1: 'utf-8' codec can't decode byte 0xff in position 19: invalid start "
          "byte")),
        ([*good, "--prompt", "abc", "--dtype", "int8"],
         ("argument --dtype: invalid choice: 'int8' (choose from 'float32', 'bfloat16', 'float16'); --help "
          "lists the options")),
        ([*good, "--prompt", "abc", "--mesh", "tp2"], "mesh 'tp2': 'tp2' is not NAME=SIZE"),
        ([*good, "--prompt", "abc", "--mesh", "tp=0"],
         "mesh: axis tp has size 0; a size is an integer of at least 1"),
        ([*good, "--prompt", "abc", "--mesh", "tp=3"], "mesh tp=3 has 3 ranks, but "),
        ([*good, "--prompt", "abc", "--mesh", "tp=2,tp=2"], "mesh 'tp=2,tp=2': axis tp is given twice"),
    ]


def test_bad_input_alone(bad: list[tuple[list[str], str]], capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, said in bad:
        said += "none" if said.endswith("the mesh has ") else ""
        said += ("this process was started without torchrun; start torchrun --nproc-per-node 3, or change "
                 "the mesh" if said.endswith("but ") else "")
        assert (main(["--quiet", *arguments]), *capfd.readouterr()) == (1, "", f"error: {said}\n")


def on_two_ranks(cases: Sequence[Sequence[str]], folder: Path) -> list[list[dict[str, Any]]]:
    """What each rank did of each command line: exit status, stdout, stderr."""
    stores = [dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False) for _ in cases]
    (folder / "cases.json").write_text(
        json.dumps([{"arguments": list(case), "port": store.port} for case, store in zip(cases, stores)]))
    finished = ranks(2, [HELPERS / "generate_worker.py", folder], deadline_s=300)
    assert (finished.returncode, finished.stdout) == (0, ""), finished.stderr
    return [list(made) for made in zip(
        *(json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)), strict=True)]


def test_a_rank_that_rank_0_left(tiny: Known, monkeypatch: pytest.MonkeyPatch,
                                 capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 0 says itself what befell it; to the others its queue has ended."""
    def left(options: object) -> None:
        raise EOFError("message queue over tp: rank 0 has closed it")
    monkeypatch.setattr("shardlib.models.generate._prepare", left)
    assert main([*tiny.command, "--quiet"]) == 1
    assert capfd.readouterr() == ("",
                                  "error on rank 0: EOFError: message queue over tp: rank 0 has closed it\n")


def test_bad_input_on_two_ranks(bad: list[tuple[list[str], str]], tmp_path: Path) -> None:
    """Every rank ends by itself, within seconds, with an exit status that is not 0;
    one of them says why, in one line."""
    found = on_two_ranks([["--quiet", "--mesh", "tp=2", *arguments] for arguments, _ in bad], tmp_path)
    for (arguments, said), made in zip(bad, found, strict=True):
        said += "tp" if said.endswith("the mesh has ") else ""
        said += ("torchrun started 2 processes; start torchrun --nproc-per-node 3, or change the mesh"
                 if said.endswith("but ") else "")
        assert [m["code"] for m in made] == [1, 1], (arguments, made)
        assert sorted(m["stderr"] for m in made) == ["", f"error: {said}\n"]
        assert [m["stdout"] for m in made] == ["", ""]


def test_a_folder_on_two_ranks(tiny: Known, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Layouts over real groups; what is shown as it comes; draws; the plan."""
    drawn = [*tiny.command, "--json", "--temperature", "1.5", "--top-p", "0.95", "--seed", "7"]
    one = ["--model", tiny.name, "--raw", "--max-new-tokens", str(NEW), "--prompt", tiny.texts[0]]
    cases = [[*tiny.command, "--json", "--mesh", mesh, "--layout", layout] for mesh, layout in (
        ("tp=2", "tp+sp"), ("dp=2", "fsdp"), ("cp=2", "cp"), ("x=2", "V=x,B=x,D=x"),
        ("dp=1,tp=2", "tp+fsdp"), ("pp=2", "L=pp"))]
    cases += [[*drawn, "--mesh", mesh] for mesh in ("tp=2", "dp=2")]
    cases += [[*one, "--mesh", "tp=2", "--quiet"], [*one, "--mesh", "tp=2"]]
    cases += [[*one, "--mesh", "tp=2", "--plan", "--quiet", *how]
              for how in ([], ["--temperature", "0.7"], ["--temperature", "0.7", "--json"])]
    *made, drawn_tp, drawn_dp, quiet, shown, plan, drawn_plan, json_plan = on_two_ranks(cases, tmp_path)
    silent = (*made, drawn_tp, drawn_dp, quiet, plan, drawn_plan, json_plan)
    assert {(m["code"], m["stderr"]) for both in silent for m in both} == {(0, "")}
    assert {both[1]["stdout"] for both in (*silent, shown)} == {""}
    assert all(json.loads(both[0]["stdout"])["completions"] == tiny.answers() for both in made)
    assert main(drawn) == 0
    alone = json.loads(capfd.readouterr().out)["completions"]
    assert (alone == json.loads(drawn_tp[0]["stdout"])["completions"]
            == json.loads(drawn_dp[0]["stdout"])["completions"] != tiny.answers())
    assert quiet[0]["stdout"] == shown[0]["stdout"] == tiny.answers()[0]["text"] + "\n"
    said = shown[0]["stderr"].splitlines()
    assert said[0] == f"2 ranks on cpu, mesh tp=2, layout K=tp,F=tp,V=tp; reading {tiny.name}"
    reduced, token = 4 * CONFIG.d_model, tiny.answers()[0]["tokens"]
    assert said[2:-1] == [
        f"plan of one token: 7 collectives, {5 * reduced + 4 + 8} B received per rank",
        f"  {line('* up, w.down)'):16}   2 x all_reduce     tp=2     {reduced} B  B T D +tp -> B T D",
        f"  {line('a, w.wo)'):16}   2 x all_reduce     tp=2     {reduced} B  B T D +tp -> B T D",
        f"  {line('* up, w.down)'):16}   1 x all_reduce     tp=2     {reduced} B  B T D +tp -> B T D",
        f"  {line('return argmax('):16}   1 x all_reduce     tp=2       4 B  B max:tp -> B",
        f"  {line('return argmax('):16}   1 x all_reduce     tp=2       8 B  B max:tp -> B"]
    assert re.fullmatch(rf"{len(token) - len(tiny.prompts[0])} tokens in [0-9.]+ s: [0-9.]+ tokens/s",
                        said[-1])
    assert [both[0]["stdout"].split("\n")[0].rstrip()
            for both in (plan, drawn_plan)] == ["next_token on mesh tp=2", "next_sample on mesh tp=2"]
    assert ([text.split()[:6] for text in plan[0]["stdout"].splitlines() if "all_reduce" in text][1]
            == [line("a, w.wo)"), "all_reduce", "B", "T", "D", "+tp"])
    found = json.loads(json_plan[0]["stdout"])
    assert (found["program"], found["mesh"], found["collectives"]) == ("next_sample", "tp=2", 6)
    assert [(t["op"], t["before"], t["after"], t["times"]) for t in found["traffic"]] == [
        ("all_reduce", "B T D +tp", "B T D", 2), ("all_reduce", "B T D +tp", "B T D", 2),
        ("all_reduce", "B T D +tp", "B T D", 1), ("all_gather", "B V/tp", "B V", 1)]



SLOW = """
import os, sys, time
from shardlib.models.generate import main
time.sleep(3 if os.environ["RANK"] == os.environ["SLOW"] else 0)
os.chdir(os.environ["ELSEWHERE" if os.environ["RANK"] == "1" else "TOGETHER"])
sys.exit(main(sys.argv[1:]))
"""


LOST = (["--mesh", "tp=2", "--model", "model", "--raw", "--prompt", "abc", "--max-new-tokens", "3"],
        "model/model.safetensors: No such file or directory")


@pytest.mark.parametrize("arguments, line, slow", [
    (["--mesh", "tp2"], "mesh 'tp2': 'tp2' is not NAME=SIZE", 0), (*LOST, 0), (*LOST, 1)],
    ids=["before they meet", "on one rank alone-0", "on one rank alone-1"])
def test_one_rank_speaks_before_torchrun_ends_it(
        folder: Path, tmp_path: Path, arguments: list[str], line: str, slow: int) -> None:
    """torchrun's agent ends all ranks as soon as one has failed: whichever is first, its line must be out.

    Its own report follows.
    """
    (tmp_path / "slow.py").write_text(SLOW)
    finished = forked_torchrun(2, [tmp_path / "slow.py", "--quiet", *arguments], SLOW=str(slow),
                               ELSEWHERE=str(tmp_path), TOGETHER=str(folder.parent))
    assert finished.returncode == 1 and finished.stdout == ""
    assert [text for text in finished.stderr.splitlines() if text.startswith("error")] == [f"error: {line}"]
    assert (finished.stderr.splitlines().count("Traceback (most recent call last):") == 1
            and "torch.distributed.elastic.multiprocessing.errors.ChildFailedError" in finished.stderr)
    assert "shardlib/models/generate.py" not in finished.stderr


def test_bad_input_as_a_command() -> None:
    finished = run([*GENERATE, "--mesh", "tp=2", "--prompt", "abc"])
    assert (finished
            == Finished(1, "", "error: mesh tp=2 has 2 ranks, but this process was started without torchrun; "
                               "start torchrun --nproc-per-node 2, or change the mesh\n"))


# -- kept results --------------------------------------------------------------------------------------------

def test_what_is_kept_is_not_generated_again(tiny: Known, tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches, all of it or a part; drawn tokens too."""
    drawn = [*tiny.command, "--temperature", "1.5", "--seed", "7", "--batch", "2", "--json", "--results"]
    assert main([*drawn, str(tmp_path / "whole")]) == 0
    whole, lines = json.loads(capfd.readouterr().out), (tmp_path / "whole").read_text().splitlines(True)
    assert len(lines) == len(tiny.texts) == 3
    for kept in ([0, 1], [2], [1], [0, 1, 2]):
        (tmp_path / "part").write_text("".join(lines[i] for i in kept))
        made, generate = [], Model.generate
        monkeypatch.setattr(Model, "generate", lambda self, prompts, *rest: made.append(len(prompts))
                            or generate(self, prompts, *rest))
        assert main([*drawn, str(tmp_path / "part")]) == 0
        monkeypatch.undo()
        assert json.loads(capfd.readouterr().out)["completions"] == whole["completions"]
        assert sorted((tmp_path / "part").read_text().splitlines(True)) == sorted(lines)
        assert made == {(0, 1): [1], (2,): [2], (1,): [2, 1], (0, 1, 2): []}[tuple(kept)]
    assert main([*tiny.command, "--results", str(tmp_path / "part"), "--quiet"]) == 1
    assert capfd.readouterr() == (
        "", f"error: {tmp_path / 'part'}, line 1: a result of other prompts or options; name another file\n")
    assert main([*tiny.command, "--batch", "0", "--quiet"]) == 1
    assert capfd.readouterr() == ("", "error: --batch 0: at least one prompt at once\n")


def test_what_is_kept_is_known_by_what_decides_its_tokens(tiny: Known, tmp_path: Path,
                                                          capfd: pytest.CaptureFixture[str],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy tokens depend on no seed and on no batch; drawn ones on their row."""
    greedy, drawn = ([*tiny.command, "--json", "--results", str(tmp_path / name), *how]
                     for name, how in (("greedy", []),
                                       ("drawn", ["--temperature", "1.5", "--seed", str(2 ** 63 - 1)])))
    made, generate = [], Model.generate
    monkeypatch.setattr(Model, "generate", lambda self, prompts, *rest: made.append(len(prompts))
                        or generate(self, prompts, *rest))
    for command, same in ((greedy, (["--batch", "1"], ["--batch", "2", "--seed", "5", "--top-p", "0.5"])),
                          (drawn, (["--batch", "3"], ["--batch", "9"]))):
        assert main(command) == 0
        first = json.loads(capfd.readouterr().out)["completions"]
        for how in same:
            assert main([*command, *how]) == 0
            assert json.loads(capfd.readouterr().out)["completions"] == first
    assert made == [3, 3]
    assert main([*drawn, "--batch", "2"]) == 1
    assert capfd.readouterr() == (
        "", f"error: {tmp_path / 'drawn'}, line 3: a result of other prompts or options; name another file\n")


def test_results_are_kept_before_they_are_shown(tiny: Known, tmp_path: Path,
                                                capfd: pytest.CaptureFixture[str],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: object) -> None:
        raise OSError("stdout is gone")
    monkeypatch.setattr("shardlib.models.generate._Stream.end", gone)
    one = ["--model", tiny.name, "--raw", "--max-new-tokens", str(NEW), "--prompt", tiny.texts[0], "--quiet",
           "--results", str(tmp_path / "kept")]
    assert main(one) == 1
    assert capfd.readouterr() == (tiny.answers()[0]["text"], "error: stdout is gone\n")
    assert json.loads((tmp_path / "kept").read_text())["tokens"] == tiny.tokens[0]


def test_results_that_could_not_be_kept_are_refused_first(tiny: Known, tmp_path: Path,
                                                          capfd: pytest.CaptureFixture[str],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "load", lambda *arguments: pytest.fail("the weights were read"))
    for path, said in ((tmp_path / "none" / "results", "No such file or directory"),
                       (tmp_path, "Is a directory")):
        assert main([*tiny.command, "--quiet", "--results", str(path)]) == 1
        assert capfd.readouterr() == ("", f"error: {path}: {said}\n")


KILLED = """
import os, shutil, signal, sys, time
from shardlib.models.decoding import Model
from shardlib.models.generate import main

attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
batches, generate = [], Model.generate

def killed(self, *arguments):
    batches.append(arguments)
    if len(batches) == 3 and attempt == "0" and rank == "1":
        time.sleep(2)           # until the other one waits in a collective, where the agent's signal finds it
        os.kill(os.getpid(), signal.SIGKILL)
    return generate(self, *arguments)

Model.generate = killed
if attempt == "1" and rank == "0":
    shutil.copy(os.environ["RESULTS"], os.environ["RESULTS"] + ".before")
sys.exit(main(sys.argv[1:]))
"""


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.mark.parametrize("rendezvous", ["c10d", "static"])
def test_a_killed_rank_and_the_second_attempt(tiny: Known, tmp_path: Path, rendezvous: str) -> None:
    """The agent starts all ranks again; what was finished is kept,
    the rest is generated to the tokens that it would have had."""
    (tmp_path / "killed.py").write_text(KILLED)
    results = tmp_path / "results.jsonl"
    where = {"c10d": ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"],
             "static": ["--rdzv-backend", "static", "--master-addr", "127.0.0.1", "--master-port",
                        str(free_port())]}[rendezvous]
    finished = run(["-m", "torch.distributed.run", *where, "--max-restarts", "1", "--nproc-per-node", "2",
                    tmp_path / "killed.py", *tiny.command, "--mesh", "tp=2", "--batch", "1", "--json",
                    "--results", results], RESULTS=str(results), SHARDLIB_TIMEOUT_S="10")
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["completions"] == tiny.answers()
    before, after = (file.read_text().splitlines(True) for file in (Path(f"{results}.before"), results))
    assert 0 < len(before) < len(after) == 3 and after[:len(before)] == before
    assert ("shardlib [rank 0]   rank 1 is silent: it was killed, stopped or cut off; when last heard of it "
            "was in") in finished.stderr
