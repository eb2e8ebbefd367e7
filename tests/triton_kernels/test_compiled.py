"""What the compiler makes of the kernels, for sm_90, without one:
instructions and their order, registers, spills.

The simulator shows that the protocols are right as written; here is shown that Triton does not take out what
they rest on. It has compiled a release without the barrier that must precede it, and 16 bytes as eight loads
of 2. Any version of Triton is asked anew.
"""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from here import HELPERS

import shardlib.triton_kernels

DEADLINE_S = 240.0
WORLDS = (2, 4, 8)
KERNELS = ("one_shot", "two_shot", "reduce_scatter", "exchange", "norm", "two_shot_norm")
NORMS = KERNELS[-2:]
PUSH, POLL = "st.relaxed.sys.global.v4.b32", "ld.relaxed.sys.global.v4.b32"
PUSH_WORD, POLL_WORD = "st.relaxed.sys.global.b32", "ld.relaxed.sys.global.b32"
each = pytest.mark.parametrize("kernel", KERNELS)
each_world = pytest.mark.parametrize("world", WORLDS)


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All that compile_worker.py writes: by a process of its own,
    since this one has imported Triton to interpret."""
    return compile_all(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def of_few_rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return compile_all(tmp_path_factory.mktemp("rows"), "rows")


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return compile_all(tmp_path_factory.mktemp("early"), "early")


def compile_all(folder: Path, *what: str) -> list[dict[str, Any]]:
    env = ({name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
           | {"TRITON_CACHE_DIR": str(folder / "cache")})
    done = subprocess.run([sys.executable, HELPERS / "compile_worker.py", folder / "out.json", *what],
                          env=env, timeout=DEADLINE_S, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text())


def of(launches: list[dict[str, Any]], kernel: str, world: int) -> list[dict[str, Any]]:
    found = [launch for launch in launches if (launch["kernel"], launch["world"]) == (kernel, world)]
    assert len(found) == (3 if world == 4 or kernel == "exchange" else 2), "for each kind of words or lines"
    return found


def instructions(ptx: str) -> list[str]:
    """Instructions and labels, without predicates, comments and directives."""
    body = ptx[ptx.index("$L__func_begin0"):ptx.index("$L__func_end0")] if "$L__func_begin0" in ptx else ptx
    lines = (line.partition("//")[0].strip() for line in body.splitlines())
    kept = [line for line in lines
            if line and line[0] not in "{}.(" and not line.startswith(("$L__tmp", "$L__func"))]
    return [line.partition(" ")[2].strip() if line.startswith("@") else line for line in kept]


def is_label(line: str) -> bool:
    return line.partition(" ")[0].endswith(":")


def count(lines: list[str], *words: str) -> int:
    """Lines that have one of the words in them."""
    return sum(any(word in line for word in words) for line in lines)


@each
@each_world
def test_every_quad_is_one_instruction(launches: list[dict[str, Any]], kernel: str, world: int) -> None:
    """Pushes and polls of 16 bytes, as many as the kernel's text has; of single words those of an exchange
    alone: of lines, and of what they hide; and, where there is a norm, one for the sum of squares, of which a
    quad is polled."""
    others = world - 1
    pushes, polls = {"one_shot": (2, 1), "two_shot": (3, 2), "reduce_scatter": (2, 1), "exchange": (2, 1),
                     "norm": (2, 1), "two_shot_norm": (3, 2)}[kernel]
    word_pushes, word_polls = (4 * others, 2 * others) if kernel == "exchange" else (kernel in NORMS, 0)
    for launch in of(launches, kernel, world):
        lines = instructions(launch["ptx"])
        assert (count(lines, PUSH), count(lines, PUSH_WORD)) == (pushes * others, word_pushes)
        assert (count(lines, POLL),
                count(lines, POLL_WORD)) == (polls * others + (kernel in NORMS), word_polls)
        assert (count(lines, "st.relaxed") == pushes * others + word_pushes
                and count(lines, "ld.relaxed") == polls * others + word_polls + (kernel in NORMS))
        # of x: what two chunks push, what stays
        loads = {"one_shot": 3, "norm": 5,
                 "two_shot_norm": 2 * others + 2 + 2 * world}.get(kernel, 2 * others + 1)
        assert count(lines, "ld.global.v4.b32") == loads
        assert not count(lines, "volatile",
                         *(f"{way}.global.{width}" for way in ("ld", "st") for width in ("b8", "b16", "u16")))


@each
@each_world
def test_every_push_is_by_one_thread_and_of_the_lanes_that_are_there(launches: list[dict[str, Any]],
                                                                     kernel: str, world: int) -> None:
    """Every quad is pushed once: a second copy could come when the first has been read and cleared. The
    predicate is one that is computed, and no two threads have the same lane: an instruction in inline
    assembler is run by all that have it."""
    for launch in of(launches, kernel, world):
        ptx = launch["ptx"]
        assert ptx.count("@p st.relaxed.sys") == ptx.count("st.relaxed")
        flags = re.findall(r"setp\.ne\.s32 p, (\S+), 0;\n@p st\.relaxed", ptx)
        assert (len(flags) == ptx.count("st.relaxed")
                and set(flags) <= set(re.findall(r"selp\.b32 \s*(%r\d+), 1, 0, %p\d+;", ptx)))
        layout, = launch["layouts"]
        assert (re.findall(r"(\w+) = \[(\d+)\]", layout)
                == [("sizePerThread", "1"), ("threadsPerWarp", "32"), ("warpsPerCTA", str(launch["warps"])),
                     ("order", "0")])


def conditions(ptx: str, flag: str) -> set[str]:
    """The comparisons that all hold where a flag is set, as they stand in the text."""
    ways = re.findall(rf"^\s*(\S+)\s+{flag}, (.*);$", ptx, re.MULTILINE)
    assert len(ways) == 1, f"{flag} is computed in one place"
    (name, operands), = ways
    if name == "and.pred" or name == "selp.b32" and operands.startswith("1, 0, "):
        return {c for operand in operands.removeprefix("1, 0, ").split(", ")
                for c in conditions(ptx, operand)}
    return {f"{name} {operands}"}


def flags(ptx: str, *instructions: str) -> list[tuple[str, str]]:
    """(instruction, flag) of all of these that run under a predicate of their own, as they come."""
    ways = "|".join(map(re.escape, instructions))
    return [(name, flag)
            for flag, name in re.findall(rf"setp\.(?:ne|eq)\.s32 p, (%r\d+), 0;\n@p ({ways}) ?[\[;]", ptx)]


@each_world
def test_words_are_pushed_and_taken_by_lanes_that_are_there_alone(launches: list[dict[str, Any]],
                                                                  world: int) -> None:
    """A lane beyond the end stands at the last quad, whose word comes once and is emptied by one lane:
    another would wait for ever, which the simulator, whose lanes stay together, does not see. So every flag
    asks for the bound of its chunk's quads, and for more."""
    others = world - 1
    for launch in of(launches, "exchange", world):
        ptx = launch["ptx"]
        piece = set(re.findall(r"ld\.param\.b32 \s*(%r\d+), \[exchange_kernel_param_4\]", ptx))

        def bound(flag: str) -> str:
            only, = conditions(ptx, flag)
            assert re.fullmatch(r"setp\.lt\.s32 (%r\d+), (%r\d+)", only) and only.split()[-1] in piece, only
            return only
        pushed, taken = flags(ptx, PUSH, PUSH_WORD), flags(ptx, "bra DONE", "st.global.v4.b32")
        assert [name for name, _ in pushed] == ([PUSH] * others + [PUSH_WORD] * 2 * others) * 2
        assert [name for name, _ in taken] == ["bra DONE", "st.global.v4.b32"] * others
        for (_, flag), (_, stored) in zip(taken[::2], taken[1::2]):
            assert conditions(ptx, flag) > {bound(stored)}
        first, later = ([flag for _, flag in pushed[start:start + 3 * others]] for start in (0, 3 * others))
        for chunk in (first, later):
            there, = {bound(flag) for flag in chunk[:others]}
            for of_line, of_hidden in zip(chunk[others::2], chunk[others + 1::2]):
                assert conditions(ptx, of_hidden) > {there}
                if chunk is later and launch["line"] == 32 * launch["warps"]:
                    # as the first lane does: the only one with a line
                    assert starts_before_the_end(ptx, chunk[0], piece)
                else:
                    assert conditions(ptx, of_line) > {there}


def starts_before_the_end(ptx: str, flag: str, piece: set[str]) -> bool:
    """Whether the branch before the use of a flag goes where a chunk has begun at or beyond the end."""
    skip = re.findall(r"@(%p\d+) bra", ptx[:ptx.index(f"p, {flag}, 0;")])[-1]
    only, = conditions(ptx, skip)
    return only.startswith("setp.ge.s32") and only.split()[-1] in piece


@each
@each_world
def test_nothing_but_loads_and_tests_in_a_polling_loop(launches: list[dict[str, Any]], kernel: str,
                                                       world: int) -> None:
    """A barrier or shared memory in it would cost several times the trip. All sources are polled in one loop;
    what their lines hide in one for each, where a lane that waits for nothing does not come."""
    others = world - 1
    quads = {"two_shot": [others, others], "norm": [others, 1],
             "two_shot_norm": [others, others, 1]}.get(kernel, [others])
    for launch in of(launches, kernel, world):
        lines = instructions(launch["ptx"])
        loops = polling_loops(lines)
        assert sum(count(loop, POLL, POLL_WORD) for loop in loops) == count(lines, POLL, POLL_WORD)
        assert not [line for loop in loops for line in loop
                    if any(word in line for word in ("bar", ".shared", "st.", "atom", "fence"))]
        if kernel == "exchange":
            assert ([(count(loop, POLL), count(loop, POLL_WORD)) for loop in loops] == [(others, others)]
                    + [(0, 1)] * others)
            assert len(re.findall(r"@p bra DONE;\nPOLL: ld", launch["ptx"])) == others
        else:
            assert [(count(loop, POLL), count(loop, POLL_WORD)) for loop in loops] == [(n, 0) for n in quads]


def polling_loops(lines: list[str]) -> list[list[str]]:
    """From the label before a poll to the branch back to it."""
    found, start = [], 0
    for i, line in enumerate(lines):
        if is_label(line):
            start = i
        elif "bra" in line and line.rstrip(" ;}").split()[-1] == lines[start].partition(":")[0]:
            loop = lines[start:i + 1]
            if count(loop, POLL, POLL_WORD):
                found.append(loop)
    return found


def releases(lines: list[str]) -> int:
    """How many there are; AssertionError where something stands between a barrier
    and a release that may not."""
    synced, found = False, 0
    for line in lines:
        if "bar.sync" in line:
            synced = True
        elif "atom" in line:
            assert synced, line
            found += "release" in line or "acq_rel" in line
            synced = False
        elif is_label(line) or line.startswith(("st.", "ld.", "bra", "ret", "red.")):
            synced = synced and line.startswith("ld.")
    return found


@each
@each_world
def test_a_barrier_comes_right_before_the_release(launches: list[dict[str, Any]], kernel: str,
                                                  world: int) -> None:
    """Of the count of the call: all threads of a block have entered by then."""
    for launch in of(launches, kernel, world):
        lines = instructions(launch["ptx"])
        assert releases(lines) == 1
        release, = (i for i, line in enumerate(lines) if "acq_rel" in line)
        last = max(i for i, line in enumerate(lines[:release]) if "bar.sync" in line)
        with pytest.raises(AssertionError):
            releases(lines[:last] + lines[last + 1:])  # the test sees a barrier that is missing


@each
@each_world
def test_the_only_atomic_counts_the_calls_of_this_gpu(launches: list[dict[str, Any]], kernel: str,
                                                      world: int) -> None:
    """The other GPUs see pushes alone."""
    for launch in of(launches, kernel, world):
        atomics = [line.split()[0] for line in instructions(launch["ptx"])
                   if "atom" in line or line.startswith("red.")]
        assert atomics == ["atom.global.gpu.acq_rel.add.u32"]


@each
@each_world
def test_barriers_and_shared_memory_are_those_of_the_count_of_the_call(launches: list[dict[str, Any]],
                                                                       kernel: str, world: int) -> None:
    """A line of a warp costs neither; one of a block does, each time one is sent.

    A norm has them once more, for its sum of squares.
    """
    for launch in of(launches, kernel, world):
        lines = instructions(launch["ptx"])
        barriers, shared = count(lines, "bar.sync"), count(lines, ".shared.")
        if kernel in NORMS:
            assert (barriers,
                    launch["shared"]) == ((5, 4 * launch["warps"]) if launch["warps"] > 1 else (2, 4))
        elif launch["line"] <= 32:
            assert (barriers, shared, launch["shared"]) == (2, 2, 4) and not count(lines, "shfl")
        else:
            assert barriers >= 2 + 2 * 2 and shared > 2 and launch["shared"] == 4 * launch["warps"]
        assert count(lines, "redux.sync") == (2 if kernel == "exchange" else 0)


@each
@each_world
def test_registers_are_as_asked_for(launches: list[dict[str, Any]], kernel: str, world: int) -> None:
    """`ops/nvlink.py` relies on it: a block that waits for a peer must not keep another from running. Nothing
    spills, but for four words of two shots between four, two on the other ranks than this one, and some of
    two shots with a norm between eight."""
    for launch in of(launches, kernel, world):
        assert re.search(rf"^\.maxnreg {launch['most']}$", launch["ptx"], re.MULTILINE)
        assert launch["registers"] <= launch["most"], launch["kind"]
        assert launch["stack"] <= {("two_shot", 4): 16,
                                   ("two_shot_norm", 8): 192}.get((kernel, world), 0), launch["kind"]


def test_kernels_of_few_rows_read_16_bytes_at_once_and_spill_nothing(
        of_few_rows: list[dict[str, Any]]) -> None:
    """Straight to registers, or by copies that run ahead to shared memory; several rows go through the tensor
    cores. A product of one row may leave two words behind, once."""
    for launch in of_few_rows:
        ptx = launch["ptx"]
        assert launch["stack"] <= (8 if launch["kernel"] == "one_row" else 0), launch["kernel"]
        assert not re.search(r"ld\.global\S*\.b(8|16)\b", ptx), launch["kernel"]
        if launch["kernel"] in ("rms_norm", "one_row", "gate_up", "rope_into_cache", "merge_two"):
            assert re.search(r"ld\.global\S*\.v4\.b32", ptx) and "cp.async" not in ptx
        else:
            assert "cp.async.cg.shared.global" in ptx and not re.search(r"cp\.async\.ca", ptx)
            assert bool(re.search(r"(wg)?mma", ptx)) == (launch["kernel"] != "stream"), launch["kernel"]


def test_who_shares_work_counts_after_a_barrier(of_few_rows: list[dict[str, Any]]) -> None:
    """Where a kernel is split, and nowhere else."""
    for launch in of_few_rows:
        lines = instructions(launch["ptx"])
        assert count(lines, "atom") == (launch.get("split", 1) > 1)
        assert releases(lines) == count(lines, "atom")


def test_a_choice_is_pushed_by_one_lane_and_polled_in_one_loop(early: list[dict[str, Any]]) -> None:
    """A quad for each row, to each other rank; all of them are polled at once, without a barrier."""
    for launch in (launch for launch in early if launch["kernel"] == "split_argmax"):
        ptx, lines = launch["ptx"], instructions(launch["ptx"])
        assert count(lines, PUSH) == count(lines, "st.relaxed") == ptx.count("@p st.relaxed.sys") == 3
        (loop,) = polling_loops(lines)
        assert count(loop, POLL) == count(lines, "ld.relaxed") == 3
        assert not count(loop, "bar", ".shared", "st.", "atom", "fence") and releases(lines) == 1
        assert sum(line.startswith(("atom", "red.")) for line in lines) == 1
        layout, = launch["layouts"]
        assert re.findall(r"(\w+) = \[(\d+)\]", layout) == [
            ("sizePerThread", "1"), ("threadsPerWarp", "32"), ("warpsPerCTA", "8"), ("order", "0")]
        assert launch["registers"] <= 64 and launch["stack"] <= (16 if launch["kind"] == "fp32" else 0)


def test_kernels_of_experts_read_16_bytes_at_once_and_spill_nothing(early: list[dict[str, Any]]) -> None:
    """Weights and rows by copies that run ahead, through the tensor cores. The last block of a tile adds up,
    and nobody counts elsewhere."""
    for launch in (launch for launch in early if launch["kernel"].startswith(("expert", "route"))):
        lines, several = instructions(launch["ptx"]), launch["kernel"].startswith("expert")
        assert launch["stack"] == 0
        assert releases(lines) == count(lines, "atom") == (launch["kernel"] == "expert_down")
        assert bool(count(lines, "wgmma")) == bool(count(lines, "cp.async.cg.shared.global")) == several
        assert not count(lines, "cp.async.ca")


def before_the_wait(lines: list[str]) -> list[str]:
    """What a kernel does before it waits for the kernel before it; AssertionError where not every block
    comes to the one place where it does, and then to the one where the next may start."""
    waits, lets = ([i for i, line in enumerate(lines) if line.startswith(f"griddepcontrol.{what}")]
                   for what in ("wait", "launch_dependents"))
    assert len(waits) == len(lets) == 1 and waits < lets
    assert not [line for line in lines[:waits[0]] if is_label(line) or line.startswith(("bra", "ret"))]
    return lines[:waits[0]]


def test_a_kernel_that_starts_early_waits_before_it_reads_or_writes(early: list[dict[str, Any]]) -> None:
    """All kernels that have the constant: an instruction before the wait would see what is not there yet."""
    touches = re.compile(r"(ld|st)\.(global|relaxed|acquire|release|volatile)|atom|red\.|cp\.async|prefetch")
    assert {launch["kernel"] for launch in early} == {
        "norm", "two_shot_norm", "split_argmax", "rms_norm", "stream", "one_row", "rows", "cached_attention",
        "note", "lookup", "follow", "rope_angles", "row_argmax", "route", "expert_gate_up", "expert_down"}
    for launch in early:
        lines = instructions(launch["ptx"])
        assert not [line for line in before_the_wait(lines) if touches.search(line)], launch["kernel"]
        assert [line for line in lines if touches.search(line)]
        for missing in ("wait", "launch_dependents"):
            with pytest.raises(AssertionError):                 # the test sees what is left out
                before_the_wait([line for line in lines if f"griddepcontrol.{missing}" not in line])


def test_every_kernel_that_can_start_early_is_looked_at(early: list[dict[str, Any]]) -> None:
    """None has the constant and is not compiled above."""
    folder = Path(shardlib.triton_kernels.__path__[0])
    found = {path.stem for path in folder.glob("*.py") if "EARLY: tl.constexpr):" in path.read_text()}
    assert found == {"early", "rms_norm", "matmul_rows", "cached_attention", "all_reduce_add_rms_norm",
                     "split_argmax", "lookup", "follow", "rope_angles", "row_argmax", "route",
                     "expert_ffn"}


def test_lookups_and_angles(early: list[dict[str, Any]]) -> None:
    """16 bytes at once; a note is written by a branch, seldom; no cosine is the GPU's approximation."""
    ptx = {launch["kernel"]: launch["ptx"] for launch in early}
    assert len(re.findall(r"(?:ld|st)\.global\S*\.v4\.b32", ptx["lookup"])) == 2
    for name in ("lookup", "note"):
        assert {"min", "max"} == set(re.findall(r"(?:atom|red)\.global\S*\.(min|max)\.s64", ptx[name]))
    assert not re.search(r"(cos|sin)\.approx", ptx["rope_angles"])


def test_losses_read_logits_once_16_bytes_at_a_time(tmp_path: Path) -> None:
    """Alone what stands at the label is read again; eight blocks of eight warps are on an SM at once."""
    for launch in compile_all(tmp_path, "losses"):
        ptx, forward = launch["ptx"], launch["kernel"] != "label_sums_vjp"
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == 1, launch["kernel"]
        assert len(re.findall(r"ld\.global\S*\.b16\b", ptx)) == forward, launch["kernel"]
        assert forward or re.search(r"st\.global\S*\.v4\.b32", ptx)
        assert launch["stack"] == 0 and launch["registers"] <= 32, launch["kernel"]


def test_rows_of_experts_are_pushed_once_and_polled_in_one_loop(tmp_path: Path) -> None:
    """By lanes that are there, 16 bytes at once, and a word beside them; the loop has no barrier in it, and
    loads data where its lane is there alone: another might wait for what has been taken. Nothing spills."""
    for launch in compile_all(tmp_path, "experts"):
        lines, others = instructions(launch["ptx"]), launch["world"] - 1
        assert (count(lines, PUSH), count(lines, PUSH_WORD)) == (2 * others, 2 * others)
        assert (count(lines, POLL), count(lines, POLL_WORD)) == (others, others)
        pushed = [name for name, _ in flags(launch["ptx"], PUSH, PUSH_WORD)]
        assert pushed == [PUSH, PUSH_WORD] * 2 * others and not count(lines, "volatile")
        assert launch["ptx"].count(f"@p {POLL}") == others
        loop = lines[max(i for i, line in enumerate(lines) if line.startswith("POLL")):]
        loop = loop[:next(i for i, line in enumerate(loop) if line.startswith("bra POLL"))]
        assert count(loop, POLL) == others and not count(loop, "bar.", "shared", "@")
        assert launch["stack"] == 0 and launch["registers"] <= launch["most"]
        layout, = launch["layouts"]
        assert f"warpsPerCTA = [{launch['warps']}]" in layout and "sizePerThread = [1]" in layout
