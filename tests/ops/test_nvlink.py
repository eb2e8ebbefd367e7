"""What the communicator over NVLink decides before any kernel runs: whether there is one, what it takes, and how it launches."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from shardlib.distributed.communicators.protocol import Call
from shardlib.ops import nvlink
from shardlib.ops.nvlink import (CAPACITY, CHANNELS, MOST_BLOCKS, MOST_RANKS, PACKETS, QUAD, TWO_SHOT, WIDE_BLOCKS, NVLink, launch, launch_chunks,
                                 launch_packets, slots)
from shardlib.ops.nvlink_report import Reader, sums_missing
from shardlib.triton_kernels.exchange import CHUNKS
from shardlib.triton_kernels.lamport import EMPTY
from shardlib.triton_kernels.workspace import MAX_BLOCKS, Workspace

WORLDS = range(2, MOST_RANKS + 1)


def place(size: int = 2, **how: Any) -> Any:
    """A group as its first member sees it, where all members have the same to say."""
    plain = dict(name="tp", ranks=tuple(range(size)), rank=0, me=0, size=size, hosts=(0,) * size, device=torch.device("cuda", 0),
                 device_group=None, agree=lambda reason: reason, control=SimpleNamespace(barrier=lambda: None))
    return SimpleNamespace(**{**plain, **how})


# -- whether there is one ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how, reason", [
    (dict(device=torch.device("cpu")), "the group's tensors are on cpu"),
    (dict(hosts=(0, 1)), "members run on 2 hosts"),
    (dict(size=9), "9 members; at most 8"),
    (dict(agree=lambda reason: "what another member says"), "what another member says"),
])
def test_declines(how: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    assert nvlink.nvlink(place(**how)) == reason


def gpu(monkeypatch: pytest.MonkeyPatch, count: int = 1, sms: int = 132, free: int = 10**12) -> None:
    """A machine with GPUs like these."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=sms))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))


def test_declines_a_gpu_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, sms=108)
    assert nvlink.nvlink(place()) == "GPU 0 has 108 multiprocessors; the kernels of 2 channels want 132 to run side by side"
    gpu(monkeypatch, free=10**8)
    assert nvlink.nvlink(place()) == "GPU 0 has 100.0 MB free, 539.0 MB are needed"


def test_a_report_of_two_shots_names_the_rank_whose_pieces_or_sums_are_missing() -> None:
    size, quads = 4, 8
    ranks, reader = (3, 5, 7, 9), Reader(torch.device("cpu"))
    for missing in range(6):
        arena = torch.zeros(3 * 4096 // 4, dtype=torch.int32)
        start = 4096 // 4 + missing * 4 * quads                        # slot 1; of the sender's quads, the last three words
        arena[start + 4 * quads - 3:start + 4 * quads] = EMPTY.value
        state = torch.tensor([2, 0, 0, 2 * 3 * quads, 0], dtype=torch.int32)
        workspace = Workspace(2, size, torch.zeros(size, dtype=torch.int64), arena, state, 4096)
        rank, what = (3, 5, 9)[missing % 3], ("pieces", "sums")[missing // 3]
        assert sums_missing(workspace, reader, ranks, lambda n, q: q, 2) == [
            f"of rank {rank}, 3 of 32 words of the {what} have not come: block 7 waits for quad 7, expects data and sees 0x7fff7fff"]
    arena[:] = 0
    assert sums_missing(workspace, reader, ranks, lambda n, q: q, 2) == []


def test_declines_where_a_gpu_does_not_reach_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, count=3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda here, there: there != 2)
    assert nvlink.nvlink(place()) == "GPU 0 does not reach the memory of all others"


def test_declines_without_symmetric_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first line of what torch says."""
    def refuse(*where: Any) -> None:
        raise RuntimeError("no such handle\nException raised from rendezvous")
    gpu(monkeypatch)
    monkeypatch.setattr(nvlink, "lamport_workspace", refuse)
    assert nvlink.nvlink(place()) == "symmetric memory: no such handle"


@pytest.mark.parametrize("size", WORLDS)
def test_allocates_the_slots_of_all_channels(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of the mesh in any order: members are numbered as in the process group, whose order is sorted."""
    asked = []

    def allocate(group: Any, members: list[int], me: int, device: torch.device, slot_bytes: int) -> Any:
        asked.append((members, me, slot_bytes))
        return SimpleNamespace(arena=torch.empty(25, dtype=torch.int32))
    gpu(monkeypatch)
    monkeypatch.setattr(nvlink, "lamport_workspace", allocate)
    monkeypatch.setattr(nvlink, "flagged_workspace", allocate)
    monkeypatch.setattr(nvlink, "Reader", lambda device: None)
    made = nvlink.nvlink(place(size, ranks=tuple(range(10, 10 + size))[::-1]))
    assert asked == [(list(range(size))[::-1], 0, slot_bytes) for slot_bytes in slots(size)] * CHANNELS
    assert made.workspace_bytes == 300 * CHANNELS


# -- what it takes -----------------------------------------------------------------------------------------------------

GOOD = Call("all_reduce", "sum", torch.bfloat16, "cuda", 4096)
GATHER = Call("all_gather", None, torch.bool, "cuda", 4096)


@pytest.mark.parametrize("call, refusal", [
    (GOOD, None),
    (GOOD._replace(nbytes=16), None),
    (GOOD._replace(nbytes=CAPACITY, dtype=torch.float32, capturing=True), None),
    (GOOD._replace(name="reduce_scatter", dtype=torch.float16, nbytes=48), None),
    (GATHER, None),
    (GATHER._replace(name="all_to_all", dtype=torch.int64), None),
    (GOOD._replace(name="broadcast", op=None), "NVLink takes all_reduce, reduce_scatter, all_gather and all_to_all, not broadcast"),
    (GOOD._replace(device="cpu"), "NVLink takes tensors on cuda, not on cpu"),
    (GOOD._replace(op="max"), "NVLink adds up float32, bfloat16 and float16; it has no max of bfloat16"),
    (GOOD._replace(dtype=torch.int64), "NVLink adds up float32, bfloat16 and float16; it has no sum of int64"),
    (GATHER._replace(even=False), "NVLink takes even pieces only"),
    (GATHER._replace(name="all_to_all", even=False, nbytes=-1), "NVLink takes even pieces only"),
    (GOOD._replace(nbytes=4090), "NVLink takes pieces of a multiple of 16 bytes"),
    (GOOD._replace(nbytes=0), "NVLink takes pieces of a multiple of 16 bytes"),
    (GATHER._replace(nbytes=64), "NVLink takes pieces of a multiple of 16 bytes"),
    (GOOD._replace(nbytes=3 * CAPACITY), "NVLink takes at most 67.1 MB, not 201.3 MB"),
])
def test_supports(call: Call, refusal: str | None) -> None:
    """Of three ranks."""
    call = call._replace(nbytes=4080 if call.nbytes == 4096 else call.nbytes)
    assert NVLink(place(3, device=torch.device("cpu")), []).supports(call) == refusal


# -- how it launches ---------------------------------------------------------------------------------------------------

SM_COUNT, SM_REGISTERS, SM_THREADS, SM_BLOCKS = 132, 65536, 2048, 32
"""Of an H200."""
worlds, quads = st.sampled_from(WORLDS), st.one_of(st.integers(1, CAPACITY // QUAD), st.integers(1, 4096), st.just(CAPACITY // QUAD))


def fits(blocks: int, warps: int, registers: int) -> bool:
    """Whether all blocks of all channels run at once."""
    threads = 32 * warps
    an_sm = min(SM_REGISTERS // (threads * registers), SM_THREADS // threads, SM_BLOCKS)
    return 1 <= blocks and CHANNELS * blocks <= SM_COUNT * an_sm


@given(worlds, quads)
def test_sums_run_at_once_and_fit_their_slot(world: int, count: int) -> None:
    """Registers as tests/triton_kernels/test_compiled.py has them at most."""
    nbytes = count * QUAD
    narrow, slot = world <= 4, slots(world)[0]
    shares = -(-count // world) * QUAD
    if world == 2 or nbytes <= TWO_SHOT:
        assert fits(*launch(nbytes, MOST_BLOCKS if narrow else WIDE_BLOCKS), 32 if narrow else 64)
        assert (world - 1) * nbytes <= slot
    else:
        assert fits(*launch(nbytes // world, WIDE_BLOCKS), 64)
        assert 2 * (world - 1) * shares <= slot
    assert fits(*launch(shares, MOST_BLOCKS if narrow else WIDE_BLOCKS), 32 if narrow else 64)
    assert (world - 1) * (count // world) * QUAD <= slot


@given(worlds, quads)
def test_exchanges_run_at_once_and_fit_their_slot(world: int, count: int) -> None:
    piece = max(1, count // world) * QUAD
    if piece * world <= PACKETS:
        assert fits(*launch_packets(piece), 128)
        assert 2 * (world - 1) * piece <= slots(world)[1]
    else:
        blocks, warps, unroll = launch_chunks(piece)
        assert fits(blocks, warps, 32 if warps == 16 else 64) and blocks <= MAX_BLOCKS
        assert (world - 1) * piece <= slots(world)[2]
        assert piece // QUAD / (blocks * warps * 32 * unroll) < CHUNKS.value


@pytest.mark.parametrize("size", WORLDS)
def test_slots_are_whole_quads(size: int) -> None:
    """Else the second slot of an arena would begin within one. Offsets into an arena of sums are counted in 32 bits."""
    assert all(slot % QUAD == 0 for slot in slots(size))
    assert 3 * slots(size)[0] < 2**31


def test_a_tensor_within_a_quad_is_copied() -> None:
    x = torch.arange(9, dtype=torch.float32)
    assert nvlink._aligned(x).data_ptr() == x.data_ptr()
    copy = nvlink._aligned(x[1:])
    assert copy.data_ptr() % QUAD == 0 and torch.equal(copy, x[1:])
