"""Byte ranges against brute force: number every element, cut the numbered tensor,
look where the numbers lie."""
from math import prod

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlib.mesh import Mesh
from shardlib.models.files.checkpoint import TensorEntry
from shardlib.models.files.ranges import ByteRange, boxes, read_ranges, spans_of, stored_sizes
from shardlib.spec import Spec, parse

LEAVES = [("V D", "V D"), ("L D", "D"), ("L D K G H", "(K G H) D"), ("L D K H", "(K H) D"),
          ("L K G H D", "D (K G H)"), ("L F D", "D F"), ("L D K G H", "(K G H_pair H_half) D"),
          ("L D K H", "(K H_pair H_half) D")]


@st.composite
def cases(draw, sizes: dict[str, st.SearchStrategy], leaves=LEAVES):
    """(type, stored, sizes, mesh): axes dealt to dims in any way, dims in any order."""
    spec, stored = draw(st.sampled_from(leaves))
    mesh = Mesh({axis: draw(st.integers(1, 3)) for axis in "xyz"})
    names = draw(st.permutations(parse(spec).names))
    axes = {name: [] for name in names}
    for axis in draw(st.permutations("xyz")):
        axes[draw(st.sampled_from(names))].append(axis)
    type = parse(" ".join("/".join([name, *axes[name]]) for name in names))
    return type, parse(stored), {name: draw(sizes[name]) for name in names}, mesh


def numbered(stored: Spec, type: Spec, sizes: dict[str, int]) -> np.ndarray:
    """The number in the file of each element, with dims in the order of `type`, L left aside."""
    names = list(stored.names)
    full = np.arange(prod(stored_sizes(stored, sizes))).reshape(stored_sizes(stored, sizes))
    if "H_half" in names:
        full, i = full.swapaxes(names.index("H_pair"), names.index("H_half")), names.index("H_pair")
        full, names = (full.reshape(*full.shape[:i], sizes["H"], *full.shape[i + 2:]),
                       [*names[:i], "H", *names[i + 2:]])
    return full.transpose([names.index(n) for n in type.names if n != "L"])


def shard(full: np.ndarray, type: Spec, sizes: dict[str, int], mesh: Mesh,
          coordinate: dict[str, int]) -> np.ndarray:
    spans = spans_of(type, sizes, mesh, coordinate)
    return full[tuple(slice(spans[n].start, spans[n].start + spans[n].size) for n in type.names if n != "L")]


def elements(ranges: list[ByteRange], entry: TensorEntry) -> np.ndarray:
    """The numbers of the elements that lie in `ranges`."""
    per_block = [np.arange((r.offset - entry.offset) // entry.block_bytes * entry.block,
                           (r.offset - entry.offset + r.length) // entry.block_bytes * entry.block)
                 for r in ranges]
    return np.concatenate([*per_block, np.arange(0)])


SMALL = {"L": st.just(2), "V": st.integers(0, 7), "D": st.integers(0, 6), "F": st.integers(0, 7),
         "K": st.integers(1, 5), "G": st.integers(1, 3), "H": st.sampled_from([2, 4, 6])}


@settings(max_examples=300, deadline=None)
@given(cases(SMALL))
def test_a_rank_reads_exactly_its_elements(case):
    type, stored, sizes, mesh = case
    full = numbered(stored, type, sizes)
    entry = TensorEntry("w", "file", 1000, full.shape, "BF16", 1, 2)
    covered = set()
    for coordinate in mesh.coordinates():
        ranges = read_ranges(entry, stored, type, sizes, mesh, coordinate)
        assert elements(ranges, entry).tolist() == sorted(
            shard(full, type, sizes, mesh, coordinate).ravel().tolist())
        assert all(a.offset + a.length < b.offset
                   for a, b in zip(ranges, ranges[1:])), "neighbours are merged"
        covered.update(elements(ranges, entry).tolist())
    assert covered == set(range(full.size))


BLOCKS = {"L": st.just(2), "V": st.integers(0, 4), "D": st.sampled_from([32, 64, 96]),
          "F": st.sampled_from([32, 96, 128]), "K": st.integers(1, 4), "G": st.integers(1, 3),
          "H": st.sampled_from([32])}
# rows of (K G H), with heads that begin in the middle of a block
HEADS = {**BLOCKS, "D": st.integers(1, 4), "K": st.sampled_from([2, 4]), "G": st.sampled_from([2, 4, 6]),
         "H": st.sampled_from([8, 16, 24])}


@settings(max_examples=200, deadline=None)
@given(st.one_of(cases(BLOCKS), cases(HEADS, [("L K G H D", "D (K G H)")])))
def test_quantised_rows_cost_at_most_one_block_more_a_run(case):
    type, stored, sizes, mesh = case
    full = numbered(stored, type, sizes)
    entry = TensorEntry("w", "file", 1000, full.shape, "Q4_1", 32, 20)
    for coordinate in mesh.coordinates():
        ranges = read_ranges(entry, stored, type, sizes, mesh, coordinate)
        mine = sorted(shard(full, type, sizes, mesh, coordinate).ravel().tolist())
        read = elements(ranges, entry)
        assert set(mine) <= set(read.tolist()), "no element is missing"
        assert all(a.offset + a.length < b.offset
                   for a, b in zip(ranges, ranges[1:])), "no block is read twice"
        runs = [run for box in boxes(stored, spans_of(type, sizes, mesh, coordinate), sizes)
                for run in box.runs()]
        share = sum(-(-run.size // 32) * 20 for run in runs)
        assert sum(r.length for r in ranges) <= share + 20 * len(runs)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9))
def test_a_split_along_the_row_costs_at_most_one_block_more_a_row(rows, tp, blocks):
    entry = TensorEntry("down", "file", 0, (rows, 32 * blocks), "Q8_0", 32, 34)
    for coordinate in Mesh(tp=tp).coordinates():
        mine = Mesh(tp=tp).extent(32 * blocks, ("tp",), coordinate)[1]
        ranges = read_ranges(entry, parse("D F"), parse("F/tp D"), {"D": rows, "F": 32 * blocks}, Mesh(tp=tp),
                             coordinate)
        assert sum(r.length for r in ranges) <= rows * (-(-mine // 32) + 1) * 34


def test_three_kv_heads_on_two_ranks():
    """SmolLM2: rows of 576 in blocks of 32; rank 0 holds 2 of 3 kv heads, 384 of 576 columns."""
    entry = TensorEntry("wo", "file", 0, (576, 576), "Q4_1", 32, 20)
    sizes, mesh = {"D": 576, "K": 3, "G": 3, "H": 64}, Mesh(tp=2)
    first, second = (read_ranges(entry, parse("D (K G H)"), parse("K/tp G H D"), sizes, mesh, c)
                     for c in mesh.coordinates())
    assert first[:2] == [("file", 0, 240), ("file", 360, 240)] and len(first) == 576
    assert second[:2] == [("file", 240, 120), ("file", 600, 120)] and len(second) == 576


def test_a_rank_that_holds_nothing_reads_nothing():
    entry = TensorEntry("wk", "file", 0, (2, 4), "F32", 1, 4)
    assert read_ranges(entry, parse("(K H) D"), parse("D K/tp H"), {"D": 4, "K": 1, "H": 2}, Mesh(tp=2),
                       {"tp": 1}) == []
