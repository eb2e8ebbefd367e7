"""What the compiler makes of the kernels between GPUs, for sm_90, without one: instructions and their order, registers, no spills.

The simulator shows that the protocols are right as written; here is shown that Triton does not take out what they rest on. It has
compiled a release without the barrier that must precede it, and 16 bytes as eight loads of 2. Any version of Triton is asked anew.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DEADLINE_S = 400.0
WORLDS = (2, 3, 4, 8)
KERNELS = ("one_shot", "two_shot", "reduce_scatter", "chunks", "packets")
PUSH, POLL, FLAG_POLL = "st.relaxed.sys.global.v4.b32", "ld.relaxed.sys.global.v4.b32", "ld.volatile.global.b64"
each = pytest.mark.parametrize("kernel", KERNELS)
each_world = pytest.mark.parametrize("world", WORLDS)


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All that compile_worker.py writes: by a process of its own, since this one has imported Triton to interpret."""
    folder = tmp_path_factory.mktemp("compiled")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run([sys.executable, Path(__file__).with_name("compile_worker.py"), folder / "out.json"], env=env, timeout=DEADLINE_S,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text())


def of(launches: list[dict[str, Any]], kernel: str, world: int) -> list[dict[str, Any]]:
    found = [launch for launch in launches if (launch["kernel"], launch["world"]) == (kernel, world)]
    assert len(found) == (1 if kernel in ("chunks", "packets") else 3), "a launch for each kind of words"
    return found


def instructions(ptx: str) -> list[str]:
    """Instructions and labels, without predicates, comments and directives."""
    body = ptx[ptx.index("$L__func_begin0"):ptx.index("$L__func_end0")] if "$L__func_begin0" in ptx else ptx
    lines = (line.partition("//")[0].strip() for line in body.splitlines())
    kept = [line for line in lines if line and line[0] not in "{}.(" and not line.startswith(("$L__tmp", "$L__func"))]
    return [line.partition(" ")[2].strip() if line.startswith("@") else line for line in kept]


def is_label(line: str) -> bool:
    return line.partition(" ")[0].endswith(":")


@each
@each_world
def test_every_quad_is_one_instruction(launches: list[dict[str, Any]], kernel: str, world: int) -> None:
    """Pushes and polls of 16 bytes, as many as the kernel's text has, and no narrower ones."""
    others = world - 1
    for launch in of(launches, kernel, world):
        pushes, polls = {"one_shot": (2, 1), "two_shot": (3, 2), "reduce_scatter": (2, 1), "chunks": (2 * launch["unroll"], 0), "packets": (2, 2)}[kernel]
        lines = instructions(launch["ptx"])
        assert sum(PUSH in line for line in lines) == sum("st.relaxed" in line for line in lines) == pushes * others
        assert sum(POLL in line for line in lines) == sum("ld.relaxed" in line for line in lines) == polls * others
        assert sum("ld.volatile" in line for line in lines) == sum(FLAG_POLL in line for line in lines) == (kernel == "chunks")
        assert not any(f"{way}.global.{width}" in line for line in lines for way in ("ld", "st") for width in ("b8", "b16", "u16"))


@each
@each_world
def test_nothing_but_loads_and_tests_in_a_polling_loop(launches: list[dict[str, Any]], kernel: str, world: int) -> None:
    """A barrier or shared memory in it would cost several times the trip."""
    for launch in of(launches, kernel, world):
        lines = instructions(launch["ptx"])
        loops = polling_loops(lines)
        assert len(loops) == {"two_shot": 2}.get(kernel, 1)
        assert not [line for loop in loops for line in loop if any(word in line for word in ("bar", ".shared", "st.", "atom", "fence"))]
        assert sum(POLL in line or FLAG_POLL in line for loop in loops for line in loop) == sum(POLL in line or FLAG_POLL in line for line in lines)


def polling_loops(lines: list[str]) -> list[list[str]]:
    """From the label before a poll to the branch back to it."""
    found, start = [], 0
    for i, line in enumerate(lines):
        if is_label(line):
            start = i
        elif "bra" in line and line.rstrip(" ;}").split()[-1] == lines[start].partition(":")[0]:
            loop = lines[start:i + 1]
            if any(POLL in text or FLAG_POLL in text for text in loop):
                found.append(loop)
    return found


def ordered(lines: list[str]) -> tuple[int, int]:
    """How many releases and acquires there are; AssertionError where no barrier stands between the last store and a release, or between an
    acquire and what follows it."""
    synced, owed, releases, acquires = False, False, 0, 0
    for line in lines:
        if "bar.sync" in line:
            synced, owed = True, False
        elif "atom" in line:
            assert (synced or "acquire" in line) and not owed, line
            releases += "release" in line or "acq_rel" in line
            acquires += "acquire" in line
            synced, owed = False, "acquire" in line
        elif is_label(line) or line.startswith(("st.", "ld.", "bra", "ret", "red.")):
            assert not owed, line
            synced = synced and line.startswith("ld.")
    return releases, acquires


@each
@each_world
def test_a_barrier_comes_right_before_a_release_and_after_an_acquire(launches: list[dict[str, Any]], kernel: str, world: int) -> None:
    for launch in of(launches, kernel, world):
        lines = instructions(launch["ptx"])
        assert ordered(lines) == ((3, 1) if kernel == "chunks" else (1, 0))            # flags twice, and the count of the call
        barriers = [i for i, line in enumerate(lines) if "bar.sync" in line]
        before = [i for i, line in enumerate(lines) if "release" in line or "acq_rel" in line]
        for i in {max(b for b in barriers if b < release) for release in before}:
            with pytest.raises(AssertionError):
                ordered(lines[:i] + lines[i + 1:])                                      # the test sees a barrier that is missing


@each
@each_world
def test_what_other_gpus_see_has_the_scope_of_the_system(launches: list[dict[str, Any]], kernel: str, world: int) -> None:
    """But for the count of the call, which is this GPU's own."""
    for launch in of(launches, kernel, world):
        atomics = [line.split()[0] for line in instructions(launch["ptx"]) if "atom" in line or line.startswith("red.")]
        bits = 64 if kernel in ("chunks", "packets") else 32
        count = f"atom.global.gpu.acq_rel.add.u{bits}"
        flags = ["atom.global.sys.release.exch.b64", count, "atom.global.sys.release.exch.b64", "atom.global.sys.acquire.add.u64"]
        assert atomics == (flags if kernel == "chunks" else [count])


@each
@each_world
def test_registers_let_all_blocks_of_all_channels_run_at_once(launches: list[dict[str, Any]], kernel: str, world: int) -> None:
    """`ops/nvlink.py` relies on it: a block that waits for a peer must not keep another from running. Nothing spills."""
    narrow = kernel == "chunks" or world <= 4 and kernel in ("one_shot", "reduce_scatter")
    for launch in of(launches, kernel, world):
        assert launch["stack"] == 0
        assert launch["registers"] <= (128 if kernel == "packets" else 32 if narrow else 64), launch["kind"]
