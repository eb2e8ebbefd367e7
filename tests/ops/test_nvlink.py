"""What the communicator over NVLink decides before any kernel runs:
whether there is one, what it takes, and how it launches."""
from __future__ import annotations

from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from shardlib.distributed.communicators.protocol import Call, FusingCommunicator
from shardlib.distributed.flat import Cut
from shardlib.errors import SpecError, bytes_text
from shardlib.ops import nvlink
from shardlib.ops.nvlink import CAPACITY, CHANNELS, MOST_RANKS, QUAD, SMS, NVLink, slot_bytes
from shardlib.ops.nvlink_grids import (
    BLOCK_REGISTERS,
    LAUNCHES,
    MOST_BLOCKS,
    ONE_SHOT,
    WORD_A_WARP,
    grid_of,
    launches_of,
)
from shardlib.ops.nvlink_report import Reader, missing
from shardlib.triton_kernels import exchange, expert_exchange
from shardlib.triton_kernels.all_reduce_add_rms_norm import filled_bytes
from shardlib.triton_kernels.lamport import EMPTY, SLOTS, STATE_WORDS
from shardlib.triton_kernels.launching import Grid
from shardlib.triton_kernels.reduce_scatter import reduce_scatter_reference
from shardlib.triton_kernels.workspace import Workspace

WORLDS = range(2, MOST_RANKS + 1)


def place(size: int = 2, **how: Any) -> Any:
    """A group as its first member sees it, where all members have the same to say."""
    plain = dict(name="tp", ranks=tuple(range(size)), rank=0, me=0, size=size, hosts=(0,) * size,
                 device=torch.device("cuda", 0), device_group=None, agree=lambda reason: reason,
                 share=lambda mine: [f"uuid {m}" for m in range(size)],
                 control=SimpleNamespace(barrier=lambda: None))
    return SimpleNamespace(**{**plain, **how})


# -- whether there is one ------------------------------------------------------------------------------------

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
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(multi_processor_count=sms, uuid=f"uuid {device}"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))


def test_declines_a_gpu_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, sms=108)
    assert nvlink.nvlink(place()) == (
        "GPU 0 has 108 multiprocessors; the kernels of 2 channels want 132 to run side by side")
    gpu(monkeypatch, free=10**8)
    assert nvlink.nvlink(place()) == "GPU 0 has 100.0 MB free, 404.2 MB are needed"


def test_declines_where_a_gpu_does_not_reach_that_of_a_member(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the process sees the members' GPUs; others do not matter."""
    gpu(monkeypatch, count=4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda here, there: there not in (2, 3))
    monkeypatch.setattr(nvlink, "symmetric_workspace", refuse)
    for members, reason in (("02", "GPU 0 does not reach the memory of GPU 2"),
                            ("013", "GPU 0 does not reach the memory of GPU 3"),
                            ("01", "symmetric memory: no such handle"),
                            ("07", "symmetric memory: no such handle"), ("00", "members share a GPU")):
        assert nvlink.nvlink(place(len(members), share=lambda mine: [f"uuid {m}" for m in members])) == reason


def refuse(*where: Any) -> None:
    raise RuntimeError("no such handle\nException raised from rendezvous")


def test_declines_without_symmetric_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first line of what torch says."""
    gpu(monkeypatch)
    monkeypatch.setattr(nvlink, "symmetric_workspace", refuse)
    assert nvlink.nvlink(place()) == "symmetric memory: no such handle"


@pytest.mark.parametrize("size", WORLDS)
def test_allocates_the_slots_of_all_channels(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of the mesh in any order: members are numbered as in the process group, whose order is sorted."""
    asked = []

    def allocate(group: Any, members: list[int], me: int, device: torch.device, slot_bytes: int) -> Any:
        asked.append((members, me, slot_bytes))
        return SimpleNamespace(arena=torch.empty(25, dtype=torch.int32))
    gpu(monkeypatch)
    monkeypatch.setattr(nvlink, "symmetric_workspace", allocate)
    monkeypatch.setattr(nvlink, "Reader", lambda device: None)
    made = nvlink.nvlink(place(size, ranks=tuple(range(10, 10 + size))[::-1]))
    assert asked == [(list(range(size))[::-1], 0, slot_bytes(size))] * CHANNELS
    assert made.workspace_bytes == 100 * CHANNELS


# -- what it takes -------------------------------------------------------------------------------------------

GOOD = Call("all_reduce", "sum", torch.bfloat16, "cuda", 4096)
GATHER = Call("all_gather", None, torch.bool, "cuda", 4096)


@pytest.mark.parametrize("call, refusal", [
    (GOOD, None),
    (GOOD._replace(nbytes=16), None),
    (GOOD._replace(nbytes=CAPACITY, dtype=torch.float32, capturing=True), None),
    (GOOD._replace(name="reduce_scatter", dtype=torch.float16, nbytes=48), None),
    (GATHER, None),
    (GATHER._replace(name="all_to_all", dtype=torch.int64), None),
    (GOOD._replace(name="broadcast", op=None),
     "NVLink takes all_reduce, reduce_scatter, all_gather and all_to_all, not broadcast"),
    (GOOD._replace(device="cpu"), "NVLink takes tensors on cuda, not on cpu"),
    (GOOD._replace(op="max"), "NVLink adds up float32, bfloat16 and float16; it has no max of bfloat16"),
    (GOOD._replace(dtype=torch.int64),
     "NVLink adds up float32, bfloat16 and float16; it has no sum of int64"),
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


# -- how it launches -----------------------------------------------------------------------------------------

SM_REGISTERS, SM_THREADS, SM_BLOCKS = 65536, 2048, 32
"""Of an H200."""
MOST = CAPACITY // QUAD
worlds = st.sampled_from(WORLDS)
quads = st.one_of(st.integers(1, MOST), st.integers(1, 4096), st.just(MOST),
                  *(st.integers(launch.most - 1, launch.most + 1)
                    for kinds in LAUNCHES.values() for launches in kinds for launch in launches[:-1]))


def fits(grid: Grid) -> bool:
    """Whether all blocks of all channels run at once."""
    an_sm = min(SM_REGISTERS // (grid.threads * grid.registers), SM_THREADS // grid.threads, SM_BLOCKS)
    return 1 <= grid.blocks and 1 <= grid.warps and CHANNELS * grid.blocks <= SMS * an_sm


@given(quads, worlds, st.integers(0, 1))
def test_the_blocks_of_all_channels_run_at_once(count: int, world: int, moved: int) -> None:
    """Four blocks an SM. None is without work."""
    grid = grid_of(count, launches_of(world)[moved])
    assert (fits(grid) and grid.blocks <= MOST_BLOCKS
            and grid.threads * grid.registers <= BLOCK_REGISTERS)
    assert (grid.blocks - 1) * grid.threads < count
    assert CHANNELS * MOST_BLOCKS <= SMS * (SM_REGISTERS // BLOCK_REGISTERS)


class Launched:
    """What a member of a group launches for tensors that have a size and nothing else."""

    def __init__(self, size: int) -> None:
        nothing = torch.empty(0, dtype=torch.int32)
        self.channels = [Workspace(0, size, nothing, nothing, nothing, slot_bytes(size))
                         for _ in range(CHANNELS)]
        self.made, self.size = NVLink(place(size, device=torch.device("cpu")), self.channels), size

    def __call__(self, name: str, nbytes: int, *arguments: Any) -> tuple[str, Workspace, Grid, int]:
        """(kernel, workspace, grid, quads of a line) of a collective of a tensor of so many bytes."""
        seen: list[tuple[str, Workspace, Grid, int]] = []

        def kernel(name: str) -> Any:
            def record(x: Tensor, workspace: Workspace, grid: Grid, line: int = 0) -> Tensor:
                seen.append((name, workspace, grid, line))
                return x
            return record
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nvlink, "current_stream", lambda device: 7)
            for launcher in ("one_shot", "two_shot", "reduce_scatter"):
                patch.setattr(nvlink, launcher, kernel(launcher))
            for launcher in ("all_gather", "all_to_all"):
                patch.setattr(exchange, launcher, kernel(launcher))
            getattr(self.made, name)(torch.empty(nbytes, dtype=torch.uint8, device="meta"), *arguments)
        (launched,) = seen
        assert launched[1] is self.channels[0]
        return launched


@given(worlds, quads)
def test_all_reduce_runs_at_once_and_fits_its_slot(world: int, count: int) -> None:
    """In one shot between two ranks, and wherever a GPU sends little."""
    kernel, workspace, grid, _ = Launched(world)("all_reduce", count * QUAD, "sum")
    assert fits(grid)
    if world == 2 or (world - 1) * count * QUAD <= ONE_SHOT:
        assert kernel == "one_shot" and (world - 1) * count * QUAD <= workspace.slot_bytes
    else:
        share = -(-count // world)
        assert kernel == "two_shot" and 2 * (world - 1) * share * QUAD <= workspace.slot_bytes
        assert grid == grid.over(share)


@given(worlds, quads)
def test_reduce_scatter_runs_at_once_and_fits_its_slot(world: int, count: int) -> None:
    share = max(1, count // world)
    kernel, workspace, grid, _ = Launched(world)("reduce_scatter", world * share * QUAD,
                                                 [share * QUAD] * world, "sum")
    assert kernel == "reduce_scatter" and fits(grid) and (world - 1) * share * QUAD <= workspace.slot_bytes


@given(worlds, quads, st.booleans())
def test_exchanges_run_at_once_and_fit_their_slot(world: int, count: int, gathers: bool) -> None:
    """With a word for each line, of a warp or, beyond the grids of the sweeps, of a block,
    and a word for each quad that hides something."""
    piece = max(1, count // world)
    counts = [piece * QUAD] * world
    name, nbytes, *arguments = (("all_gather", piece * QUAD, counts) if gathers
                                else ("all_to_all", world * piece * QUAD, counts, counts))
    kernel, workspace, grid, line = Launched(world)(name, nbytes, *arguments)
    assert (kernel == name and fits(grid) and line == (32 if piece <= WORD_A_WARP else grid.threads)
            and grid.threads % line == 0)
    words = (world - 1) * (4 * piece + -(-piece // line))
    filled = -(-words // 4) * QUAD
    assert filled + (world - 1) * piece * 4 <= exchange.slot_bytes(piece, world, line) <= workspace.slot_bytes


@given(worlds, st.integers(1, 5000), st.integers(1, 2048), st.sampled_from((torch.bfloat16, torch.float32)))
def test_rows_that_are_exchanged_run_at_once_and_fit_their_slot(world: int, tokens: int, quads: int,
                                                               dtype: torch.dtype) -> None:
    """With a word for each part of a row; both ways by the same grid."""
    launched, width, seen = Launched(world), quads * QUAD // dtype.itemsize, []
    refusal = launched.made.refuses_rows(tokens, width, dtype)

    def record(x: Tensor, *more: Any) -> Tensor:
        seen.append(more[-2:])
        return x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvlink, "current_stream", lambda device: 7)
        for name in ("dispatch_rows", "combine_rows"):
            patch.setattr(expert_exchange, name, record)
        x, place = torch.empty(tokens, width, dtype=dtype, device="meta"), torch.empty(0)
        launched.made.dispatch_rows(x, place, place, 1, tokens, tokens)
        launched.made.combine_rows(x, place, torch.empty(world * tokens, 2, device="meta"), tokens)
    (workspace, grid), again = seen
    parts = -(-quads // grid.threads)
    needed = (world - 1) * (tokens * quads + -(-tokens * parts // 4)) * QUAD
    assert again == (workspace, grid) and fits(grid) and workspace is launched.channels[0]
    assert grid.threads * grid.registers <= BLOCK_REGISTERS and grid.blocks <= MOST_BLOCKS
    assert (refusal is None) == (needed <= workspace.slot_bytes)


@pytest.mark.parametrize("size, tokens", [(2, 4096), (4, 4096), (8, 2048)])
def test_rows_of_long_prompts_fit(size: int, tokens: int) -> None:
    """Of 4096 in bfloat16; and what does not."""
    made = Launched(size).made
    assert made.refuses_rows(tokens, 4096, torch.bfloat16) is None
    assert made.refuses_rows(3 * tokens, 4096, torch.bfloat16) == (
        f"NVLink exchanges at most {bytes_text(slot_bytes(size))} of rows, not "
        f"{bytes_text((size - 1) * 3 * tokens * (8192 + 4 * (2 if size < 8 else 4)))}")
    assert made.refuses_rows(1, 4, torch.bfloat16) == (
        "NVLink exchanges rows of a multiple of 16 bytes, not 4 of bfloat16")
    assert made.refuses_rows(0, 8, torch.float64) == (
        "NVLink exchanges rows of a multiple of 16 bytes, not 8 of float64")


@pytest.mark.parametrize("size", WORLDS)
def test_slots_are_whole_quads(size: int) -> None:
    """Else the second slot of an arena would begin within one.

    Offsets into an arena are counted in 32 bits.
    """
    assert slot_bytes(size) % QUAD == 0 and SLOTS.value * slot_bytes(size) < 2**31


shapes = st.lists(st.sampled_from((1, 2, 3, 4, 8)), min_size=1, max_size=4).map(tuple)


@given(st.integers(2, 3), shapes, st.integers(0, 3), st.sampled_from((torch.float32, torch.bfloat16)),
       st.data())
@example(2, (4, 2), 1, torch.float32, None)  # a row of the whole is a quad, one of a piece is half of one
def test_pieces_are_cut_and_joined_along_any_dim(world: int, shape: tuple[int, ...], dim: int,
                                                 dtype: torch.dtype, data: Any) -> None:
    """What each rank gives its kernels is what they ask for: quads that lie side by side.

    What it gets is what torch makes of the pieces.
    """
    dim %= len(shape)
    pieces = [torch.arange(prod(shape), dtype=torch.float32).add(1000 * r).to(dtype).view(shape)
              for r in range(world)]
    wholes = [torch.cat(pieces, dim) * (r + 1) for r in range(world)]
    cut = Cut.of(shape, dim, (shape[dim],) * world)
    me = 0 if data is None else data.draw(st.integers(0, world - 1))

    def gathered(x: Tensor, workspace: Any, grid: Grid, line: int) -> Tensor:
        assert x.is_contiguous() and x.ndim == 2 and x.shape[1] * x.itemsize % QUAD == 0
        return exchange.all_gather_reference([piece.reshape(x.shape) for piece in pieces])

    def scattered(x: Tensor, workspace: Any, grid: Grid) -> Tensor:
        assert x.is_contiguous() and x.shape[1] == world and x.shape[2] * x.itemsize % QUAD == 0
        flat = x.shape[0] == 1
        return reduce_scatter_reference([(cut.split(w) if flat else w).reshape(x.shape) for w in wholes], me)
    if prod(shape) * dtype.itemsize % QUAD:
        return  # `supports` has refused it
    made = NVLink(place(world, rank=me, me=me, device=torch.device("cpu")),
                  [SimpleNamespace(arena=torch.empty(0))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvlink, "current_stream", lambda device: 7)
        patch.setattr(exchange, "all_gather", gathered)
        patch.setattr(nvlink, "reduce_scatter", scattered)
        assert torch.equal(made.all_gather_cut(pieces[me], cut), torch.cat(pieces, dim))
        want = sum(w.float() for w in wholes).to(dtype).split(shape[dim], dim)[me]
        assert torch.equal(made.reduce_scatter_cut(wholes[me], cut, "sum"), want)


def test_a_tensor_within_a_quad_is_copied() -> None:
    x = torch.arange(9, dtype=torch.float32)
    assert nvlink._aligned(x).data_ptr() == x.data_ptr()
    copy = nvlink._aligned(x[1:])
    assert copy.data_ptr() % QUAD == 0 and torch.equal(copy, x[1:])


NORMED = nvlink.MOST_NORMED // QUAD


@given(worlds, st.integers(1, 300), st.integers(1, nvlink.MOST_ROW // QUAD), st.sampled_from((2, 4)))
def test_norms_run_at_once_and_fit_their_slot(world: int, rows: int, quads: int, itemsize: int) -> None:
    """All blocks of a row above all: they wait for each other.

    In two shots where the ranks have equal shares of a row; every lane has room.
    """
    rows = min(rows, NORMED // quads)
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    x, weight = (torch.empty(shape, dtype=dtype, device="meta")
                 for shape in ((rows, quads * QUAD // itemsize), (quads * QUAD // itemsize,)))
    launched, seen = Launched(world), []

    def record(x: Tensor, residual: Tensor, weight: Tensor, eps: float, workspace: Workspace, grid: Grid,
               split: int, shots: int) -> tuple[Tensor, Tensor]:
        seen.append((workspace, grid, split, shots))
        return x, residual
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvlink, "current_stream", lambda device: 7)
        patch.setattr(nvlink, "all_reduce_add_rms_norm", record)
        launched.made.all_reduce_add_rms_norm(x[:, None], x[:, None], weight, 1e-5)
    (workspace, grid, split, shots), = seen
    assert (workspace is launched.channels[0] and fits(grid) and grid.blocks % split == 0
            and grid.blocks <= rows * split)
    assert grid.blocks * grid.threads * grid.registers <= MOST_BLOCKS * BLOCK_REGISTERS
    assert shots == 1 or quads % world == 0 and world > 2
    assert filled_bytes(rows, quads * QUAD, world, split, shots) <= workspace.slot_bytes


@pytest.mark.parametrize("shapes, dtypes, refusal", [
    (((2, 8), (2, 8), (8,)), "bbb", None),
    (((2, 3, 8), (2, 3, 8), (8,)), "fff", None),
    (((2, 8), (2, 8), (8,)), "bbf",
     "NVLink norms float32, bfloat16 or float16, not bfloat16, bfloat16, float32"),
    (((2, 8), (2, 8), (8,)), "iii", "NVLink norms float32, bfloat16 or float16, not int32, int32, int32"),
    (((2, 8), (1, 8), (8,)), "bbb",
     "NVLink norms x and a residual alike by a weight for each column, not (2, 8), (1, 8), (8,)"),
    (((0, 8), (0, 8), (8,)), "bbb",
     "NVLink norms x and a residual alike by a weight for each column, not (0, 8), (0, 8), (8,)"),
    (((2, 6), (2, 6), (6,)), "bbb", "NVLink norms rows of a multiple of 16 bytes, at most 65.5 kB, not 12"),
    (((1, 32776), (1, 32776), (32776,)), "bbb",
     "NVLink norms rows of a multiple of 16 bytes, at most 65.5 kB, not 65552"),
    (((600, 8192), (600, 8192), (8192,)), "bbb", "NVLink norms at most 8.4 MB, not 9.8 MB"),
])
def test_what_is_not_normed(shapes: tuple[tuple[int, ...], ...], dtypes: str, refusal: str | None) -> None:
    made = NVLink(place(2, device=torch.device("cpu")), [])
    x, residual, weight = (
        torch.empty(s, dtype={"b": torch.bfloat16, "f": torch.float32, "i": torch.int32}[d], device="meta")
        for s, d in zip(shapes, dtypes))
    assert made.refuses_norm(x, residual, weight) == refusal
    assert isinstance(made, FusingCommunicator)
    found = made.fused("all_reduce_add_rms_norm", (x, residual, weight), {"eps": 1e-5})
    assert callable(found) if refusal is None else found == refusal
    assert made.fused("add_rms_norm", (x, residual, weight), {"eps": 1e-5}) == "NVLink has no add_rms_norm"
    if refusal is not None:
        with pytest.raises(SpecError) as raised:
            made.all_reduce_add_rms_norm(x, residual, weight, 1e-5)
        assert str(raised.value) == refusal


@pytest.mark.parametrize("shape, dtype, refusal", [
    ((3, 5), torch.bfloat16, None), ((5,), torch.float32, None), ((65536, 1), torch.float16, None),
    ((3, 5), torch.int64, "NVLink compares float32, bfloat16 and float16, not int64"),
    ((0, 5), torch.bfloat16, "NVLink chooses among some, of at most 65536 rows, not (0, 5)"),
    ((3, 0), torch.bfloat16, "NVLink chooses among some, of at most 65536 rows, not (3, 0)"),
    ((65537, 1), torch.bfloat16, "NVLink chooses among some, of at most 65536 rows, not (65537, 1)"),
    ((1, 1 << 30), torch.bfloat16, "NVLink chooses among some, of at most 65536 rows, not (1, 1073741824)")])
def test_choices(shape: tuple[int, ...], dtype: torch.dtype, refusal: str | None,
                 monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen from, and by how many blocks."""
    x, seen = torch.empty(shape, dtype=dtype, device="meta"), []

    def record(rows: Tensor, workspace: Workspace, grid: Grid) -> Tensor:
        seen.append(grid)
        assert rows.shape == (x.numel() // shape[-1], shape[-1]) and 16 * len(rows) <= workspace.slot_bytes
        return torch.empty(len(rows), dtype=torch.int64)
    monkeypatch.setattr(nvlink, "current_stream", lambda device: 7)
    monkeypatch.setattr(nvlink, "split_argmax", record)
    made = Launched(2).made
    assert made.refuses_argmax(x) == refusal
    found = made.fused("split_argmax", (x,), {})
    if refusal is None:
        assert callable(found) and found(x).shape == shape[:-1] and all(map(fits, seen)) and len(seen) == 1
        return
    assert found == refusal
    with pytest.raises(SpecError) as raised:
        made.split_argmax(x)
    assert str(raised.value) == refusal


# -- what it says of a kernel that waits ---------------------------------------------------------------------

SLOT = 8192
RANKS = (3, 5, 7, 9)
"""Of the mesh, in a group whose third member reports."""


def stuck(quads: int, *empty: tuple[int, int], parts: int = 1, line: int = 0, blocks: int = 2,
          threads: int = 32) -> Workspace:
    """After a call in slot 1 began, as the kernel says.

    empty: (first, stop) of the slot's words that have not come.
    """
    arena = torch.zeros(SLOTS.value * SLOT // 4, dtype=torch.int32)
    for first, stop in empty:
        arena[SLOT // 4 + first:SLOT // 4 + stop] = EMPTY.value
    state = torch.tensor([2, 0, 0, 1, 0, quads, parts, line, blocks, threads], dtype=torch.int32)
    assert len(state) == STATE_WORDS
    return Workspace(2, len(RANKS), torch.zeros(len(RANKS), dtype=torch.int64), arena, state, SLOT)


@pytest.fixture
def reader() -> Reader:
    return Reader(torch.device("cpu"))


@pytest.mark.parametrize("source", range(3))
def test_a_report_of_sums_names_the_rank_whose_words_are_missing(source: int, reader: Reader) -> None:
    """And the block that waits for them: of two blocks of 32 threads, the first has quad 64 again."""
    workspace = stuck(80, (4 * 80 * source + 4 * 64 + 1, 4 * 80 * (source + 1)))
    assert missing(workspace, reader, RANKS) == [
        f"of rank {(3, 5, 9)[source]}, 63 of 320 words have not come: block 0 waits for quad 64, expects "
        "data and sees 0x7fff7fff"]
    assert missing(stuck(80), reader, RANKS) == []


@pytest.mark.parametrize("part", range(6))
def test_a_report_of_two_shots_names_the_rank_whose_pieces_or_sums_are_missing(part: int,
                                                                               reader: Reader) -> None:
    quads, rank, what = 40, (3, 5, 9)[part % 3], ("pieces", "sums")[part // 3]
    assert missing(stuck(quads, (4 * quads * (part + 1) - 3, 4 * quads * (part + 1)), parts=2, blocks=4),
                   reader, RANKS) == [
                       f"of rank {rank}, 3 of 160 words of the {what} have not come: block 1 waits for quad "
                       "39, expects data and sees 0x7fff7fff"]
    assert missing(stuck(quads, parts=2), reader, RANKS) == []


def test_a_report_of_an_exchange_names_ranks_of_data_and_of_lines(reader: Reader) -> None:
    """Nobody writes the room for hidden words, nor what is left of the last quad of the lines' words."""
    quads, line = 80, 32
    data, unwritten = 4 * 3 * quads, (4 * 3 * quads + 3 * 3, SLOT // 4)
    assert missing(stuck(quads, unwritten, line=line), reader, RANKS) == []
    assert missing(stuck(quads, unwritten, (data + 4, data + 7), line=line), reader, RANKS) == [
        ("of rank 5, 2 of 3 words of lines have not come: block 1 waits for line 1, expects data and sees "
         "0x7fff7fff"),
        ("of rank 9, 1 of 3 words of lines have not come: block 0 waits for line 0, expects data and sees "
         "0x7fff7fff")]
    assert missing(stuck(quads, unwritten, (0, 8), (4 * quads, 8 * quads), line=line), reader, RANKS) == [
        ("of rank 3, 8 of 320 words have not come: block 0 waits for quad 0, expects data and sees "
         "0x7fff7fff"),
        ("of rank 5, 320 of 320 words have not come: block 0 waits for quad 0, expects data and sees "
         "0x7fff7fff")]


@pytest.mark.parametrize("answers", [0, 1])
def test_a_report_says_that_a_gpu_does_not_answer(answers: int, reader: Reader,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, or after its state."""
    state = stuck(80, (0, 1))
    seen = [state.state] * answers
    monkeypatch.setattr(Reader, "read", lambda self, words: seen.pop() if seen else None)
    assert missing(state, reader, RANKS) == ["the GPU does not answer"]


def test_no_call_is_no_report(reader: Reader) -> None:
    workspace = stuck(0, (0, SLOT // 4))
    workspace.state.zero_()
    assert missing(workspace, reader, RANKS) == []


def test_the_communicator_reports_each_channel_that_was_used() -> None:
    made = NVLink(place(4, ranks=RANKS, device=torch.device("cpu")),
                  [stuck(16, (0, 1)), stuck(16), stuck(16, (64, 65))])
    assert made.report() is None  # no stream has called
    for stream in (7, 8):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nvlink, "current_stream", lambda device: stream)
            patch.setattr(nvlink, "one_shot", lambda x, workspace, grid: x)
            made.all_reduce(torch.empty(256, dtype=torch.uint8), "sum")
    assert made.report() == ("NVLink over tp: of rank 3, 1 of 64 words have not come: block 0 waits for quad "
                             "0, expects data and sees 0x7fff7fff")
