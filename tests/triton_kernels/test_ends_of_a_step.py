"""What stands before the first layer of a step and behind the last, each in one kernel: lookups and what they
note, the table of angles, the tokens that are fed next."""
from __future__ import annotations

import numpy
import pytest
import torch
import triton
from accuracy import near
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlib.lowering.index_check import IndexSite
from shardlib.models.following import follow as follow_by_torch
from shardlib.ops import lookups
from shardlib.ops.few_rows import choose_few
from shardlib.ops.rope import rope_angles as angles_by_torch
from shardlib.ops.take import pick, rows_of
from shardlib.triton_kernels.follow import follow, follow_reference
from shardlib.triton_kernels.lookup import lookup, lookup_reference, note, note_reference
from shardlib.triton_kernels.rope_angles import rope_angles, rope_angles_reference
from shardlib.triton_kernels.row_argmax import row_argmax, row_argmax_reference

OLD = (tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
       and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4))
pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.skipif(OLD, reason="the interpreter of Triton 3.6 runs no loops with numpy 2.4")]
some = settings(max_examples=settings.default.max_examples // 10)
integers, seeds = st.sampled_from((torch.int64, torch.int32)), st.integers(0, 2**31)


@some
@given(integers, seeds, st.integers(0, 3), st.integers(1, 600), st.integers(1, 9), st.booleans(),
       st.integers(0, 4), st.lists(st.integers(-3, 3), min_size=2, max_size=2))
def test_lookups(dtype: torch.dtype, seed: int, rows: int, width: int, size: int, own: bool, first: int,
                 seen: list[int]) -> None:
    """Of a table, and of entries that each row has for itself; of a piece that begins at `first`. What is
    asked for is noted, right or wrong."""
    torch.manual_seed(seed)
    x = torch.randn(rows if own else 1, size, width)
    index = torch.randint(-2, size + first + 3, (rows,)).to(dtype)
    before, noted = (torch.tensor(sorted(seen)) for _ in range(2))
    got = lookup(x, index, first, noted)
    assert torch.equal(got, lookup_reference(x, index.long(), first) if rows else x.new_empty(0, width))
    assert torch.equal(noted, note_reference(index.long(), before))
    note(index, before)
    assert torch.equal(noted, before)


@some
@given(integers, seeds, st.integers(1, 300))
def test_notes_of_several_blocks(dtype: torch.dtype, seed: int, count: int) -> None:
    torch.manual_seed(seed)
    index, seen = torch.randint(-2**31, 2**31, (count,)).to(dtype), torch.zeros(2, dtype=torch.int64)
    expected = note_reference(index.long(), seen)
    note(index, seen)
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_ops_look_up_by_kernels_as_by_torch(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows, and what is noted: of a piece of a table, of entries of each row; where the kernel takes no
    index, torch does."""
    made = []
    for by_kernel in (False, True):
        monkeypatch.setattr(lookups, "notes", lambda site, index, by_kernel=by_kernel: by_kernel)
        torch.manual_seed(0)
        site = IndexSite("embedding", "ids", "V", 5, seen=torch.zeros(2, dtype=torch.int64))
        ids, table, x = torch.tensor([[0, 4, bad], [1, 2, 3]]), torch.randn(3, 4), torch.randn(2, 5, 2, 4)
        last = torch.tensor([bad, 3]).view(2, 1, 1, 1)
        made.append((rows_of(ids, table, 2, site), pick(x, last, 1, 0, site),
                     pick(x, torch.ones(1, 5, 1, 4, dtype=torch.int64), 2, 0, site)[:1], site.seen))
        lookups.look(site, torch.tensor([7, -7]))
    for one, other in zip(*made):
        assert torch.equal(one, other)
    assert site.seen.tolist() == [-7, max(7, bad)]


def test_what_a_kernel_looks_up() -> None:
    """On the CPU nothing is noted, and torch raises."""
    site = IndexSite("take", "index", "V", 5, seen=torch.zeros(2, dtype=torch.int64))
    assert not lookups.notes(site, torch.tensor([1]))
    cuda = torch.empty(2, 1, dtype=torch.int64, device="meta")
    assert not lookups.looks_up(site, torch.randn(2, 5), cuda, 1)


@some
@given(integers, seeds, st.integers(0, 3), st.integers(1, 3), st.integers(0, 5), st.integers(1, 70))
def test_angles(dtype: torch.dtype, seed: int, rows: int, length: int, offset: int, half: int) -> None:
    """As near to the exact ones as torch's."""
    torch.manual_seed(seed)
    start, inv = torch.randint(0, 9000, (rows,)).to(dtype), torch.rand(half)
    got = rope_angles(start, offset, length, inv)
    by_torch = angles_by_torch(start, offset, length, inv, torch.float32)
    angle = (by_torch.new_zeros(rows, length, half) + start[:, None, None] + offset
             + torch.arange(length)[:, None]) * inv             # rounded once, as the kernel's
    exact = torch.cat((angle.double().cos(), angle.double().sin()), -1)
    assert got.shape == by_torch.shape == rope_angles_reference(start, offset, length, inv).shape
    assert not rows or near(got, by_torch, exact)


@some
@given(st.sampled_from((torch.float32, torch.float16, torch.bfloat16)), seeds, st.integers(1, 3),
       st.integers(1, 5000), st.integers(1, 70), st.sampled_from((-1, 2, 30)), st.booleans())
def test_choices(dtype: torch.dtype, seed: int, rows: int, columns: int, parts: int, high: int,
                 nan: bool) -> None:
    """By any number of blocks a row: the first of equals, NaN before all, -0.0 as 0.0."""
    torch.manual_seed(seed)
    x = torch.randint(min(high, 0) - 1, max(high, 1), (rows, columns)).to(dtype).mul(-1)
    if nan:
        x[0, torch.randint(columns, (2,))] = float("nan")
    counts = torch.zeros(rows, dtype=torch.int32)
    assert torch.equal(row_argmax(x, counts, parts), row_argmax_reference(x)) and not counts.any()
    assert torch.equal(choose_few(x.view(rows, 1, columns), None), x.view(rows, 1, columns).argmax(-1))


@some
@given(seeds, st.integers(1, 70), st.integers(0, 5))
def test_what_is_fed_next(seed: int, rows: int, ends: int) -> None:
    """By the kernel, by torch, and as the reference has it."""
    torch.manual_seed(seed)
    chosen, ids, position = (torch.randint(0, 6, (rows,)) for _ in range(3))
    live, over = torch.rand(rows) < 0.5, torch.randint(-1, 6, (ends,))
    expected = chosen, *follow_reference(chosen, ids, position, live, over)
    for how in (follow, follow_by_torch):
        state = torch.zeros(rows, dtype=torch.int64), ids.clone(), position.clone(), live.clone()
        how(chosen, *state, over)
        assert all(map(torch.equal, state, expected))
