"""Two hosts: ranks know where they are, results are right,
and a cable that is cut ends every worker on both, with a report.

torchrun on each host, with the options that a user gives: see `two_hosts`, which makes the hosts, and
docs/multihost.md.
"""
from __future__ import annotations

import fcntl
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from here import HELPERS
from transformers import LlamaConfig, LlamaForCausalLM
from two_hosts import Hosts, Job, missing, processes, two_hosts

from shardlib import Layout, Mesh
from shardlib.distributed import connect, segment
from shardlib.models.decoding import Model
from shardlib.models.files.model_files import open_checkpoint
from shardlib.models.files.tokenizer import Tokenizer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(missing() != "", reason=missing()),
              pytest.mark.skipif(segment.unsupported() is not None, reason=str(segment.unsupported()))]

WORKER = HELPERS / "two_hosts_worker.py"
TIMEOUT_S = 10
GLOO, ELSEWHERE = "torch.distributed (gloo)", {"shared_memory": "members run on 2 hosts"}
TOTAL = "all_reduce sum of 4 float32, at step 1 of total, model.py:7: N +dp -> N"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def job(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Four ranks that have said what they found, and now call collectives, over and over."""
    folder = tmp_path_factory.mktemp("job")
    job = hosts.torchrun(folder, [WORKER, folder], SHARDLIB_TIMEOUT_S=str(TIMEOUT_S))
    job.wait("four ranks to loop", lambda: len([*folder.glob("*.loops")]) == 4)
    return job


def found(job: Job, what: str) -> list[Any]:
    return [json.loads(job.said(rank, "stdout"))[what] for rank in range(4)]


def test_everybody_knows_who_is_where(job: Job) -> None:
    assert found(job, "places") == [
        {"rank": rank, "local_rank": rank % 2, "name": f"host{rank // 2}", "hosts": [0, 0, 1, 1],
         "groups": {"tp": [[[0, 1], [2, 3]][rank // 2], "shared memory", {}],
                    "dp": [[[0, 2], [1, 3]][rank % 2], GLOO, ELSEWHERE],
                    "dp/tp": [[0, 1, 2, 3], GLOO, ELSEWHERE]}}
        for rank in range(4)]


def test_collectives_are_right(job: Job) -> None:
    assert found(job, "collectives") == [[]] * 4


def test_messages_reach_readers_beside_and_elsewhere(job: Job) -> None:
    got = [{"step": 3, "names": ["a", "b"]}, 3_000_000, True,
           "a message holds plain data only: Encoding objects of type type is unsupported"]
    assert found(job, "messages") == [{"got": got, "in memory": rank < 2, "over the network": [2, 3]}
                                      for rank in range(4)]


# -- the cable: after this test the job is gone --------------------------------------------------------------

def is_gone(lives: Path) -> bool:
    """Whether the process that held this lock has ended."""
    with open(lives) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def report(job: Job, rank: int) -> str:
    """Our own lines, without numbers that vary, and without where others were when
    they were last heard of."""
    text = "\n".join(line for line in job.said(rank).splitlines() if line.startswith("shardlib ["))
    return re.sub("when last heard of it was in .*", "...",
                  re.sub("collective [0-9]+", "collective N", re.sub("waited [0-9]+ s", "waited N s", text)))


def test_a_cut_cable_ends_every_worker_and_says_so(hosts: Hosts, job: Job) -> None:
    """Who is on the host of the store names the ranks that are cut off;
    the others, who cannot know, name that host."""
    hosts.cut_cable()
    lives = sorted(job.folder.glob("*.lives"))
    job.wait("four ranks to end", lambda: len(lives) == 4 and all(map(is_gone, lives)), TIMEOUT_S)
    silent = [f"  rank {rank} is silent: it was killed, stopped or cut off; ..." for rank in (2, 3)]
    for rank in range(4):
        head = f"has waited N s in collective N of group dp (ranks {rank % 2} {rank % 2 + 2}): {TOTAL}"
        lines = [head, *(silent if rank < 2 else ["  the store on 192.0.2.1 does not answer"])]
        assert report(job, rank) == "\n".join(f"shardlib [rank {rank}] {line}" for line in lines)


# -- a model -------------------------------------------------------------------------------------------------

PROMPTS = ("abcabc", "b", "ccccbbbba")
NEW = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that transformers saved, with a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=28, hidden_size=48, intermediate_size=29, num_hidden_layers=2,
                                 num_attention_heads=6, num_key_value_heads=3, head_dim=8,
                                 max_position_embeddings=48, initializer_range=0.4, bos_token_id=None,
                                 eos_token_id=27)).save_pretrained(folder)
    core = tokenizers.Tokenizer(tokenizers.models.BPE(
        {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")} | {"<s>": 26, "</s>": 27}, []))
    core.add_special_tokens(["<s>", "</s>"])
    core.save(str(folder / "tokenizer.json"))
    return folder


def test_generate_says_what_one_process_says(model: Path, tmp_path: Path) -> None:
    with two_hosts() as hosts:
        prompts = [part for text in PROMPTS for part in ("--prompt", text)]
        job = hosts.torchrun(tmp_path, ["-m", "shardlib.models.generate", "--model", model, "--mesh",
                                        "dp=2,tp=2", "--layout", "tp+sp", "--raw", *prompts,
                                        "--max-new-tokens", str(NEW), "--json"])
        job.end()
    tokenizer = Tokenizer.load(str(model))
    with connect(Mesh(), "cpu") as runtime:
        alone = Model.load(open_checkpoint(str(model)), Layout(), runtime).generate(
            [tokenizer.encode(text) for text in PROMPTS], NEW, tokenizer.eos_ids)
    assert [c["tokens"] for c in json.loads(job.said(0, "stdout"))["completions"]] == alone.tokens
    assert (len({token for tokens in alone.tokens for token in tokens}) > 6
            and [job.said(rank, "stdout") for rank in (1, 2, 3)] == [""] * 3)


# -- the hosts themselves ------------------------------------------------------------------------------------

def test_nothing_is_left_of_two_hosts() -> None:
    """Whatever runs on them, and however it ends."""
    with pytest.raises(KeyError):
        with two_hosts() as hosts:
            names = [host.processes for host in hosts.pair]
            sleeper = subprocess.Popen([*hosts.pair[1].inside, "sh", "-c",
                                        "echo up; setsid sleep 3600 & sleep 3600"], stdout=subprocess.PIPE)
            sleeper.stdout.readline()
            assert len(processes(names[0])) == 1 and len(processes(names[1])) > 1
            raise KeyError
    sleeper.communicate(timeout=10)
    assert [processes(name) for name in names] == [[], []]
