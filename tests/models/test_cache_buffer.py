"""The memory of keys and values: one piece as long as batches fit, a larger one where one does not."""
from __future__ import annotations

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from shardlib.models.cache_buffer import CacheBuffer

SHAPES = st.fixed_dictionaries({"k": st.tuples(st.just(2), st.integers(1, 3), st.integers(0, 4)),
                                "v": st.tuples(st.just(2), st.integers(1, 3), st.integers(0, 4))})


@given(st.lists(SHAPES, min_size=1, max_size=5))
def test_what_fits_lies_in_front_of_what_there_is(wanted: list[dict[str, tuple[int, int, int]]]) -> None:
    """Each leaf counts: one that does not fit makes all anew, as zeros."""
    buffer = CacheBuffer(torch.float64, torch.device("cpu"))
    room: dict[str, int] = {}
    made, begins = 0, {}
    for shapes in wanted:
        sizes = {name: prod(shape[1:]) for name, shape in shapes.items()}
        fits = bool(room) and all(sizes[name] <= room[name] for name in sizes)
        assert buffer.room(shapes) == fits
        views = buffer.views(shapes)
        if not fits:
            room, made = sizes, made + 1
            begins = {name: leaf.untyped_storage().data_ptr() for name, leaf in views.items()}
            assert not any(leaf.any() for leaf in views.values())
        assert buffer.made == made and buffer.room(shapes)
        for name, leaf in views.items():
            assert leaf.shape == shapes[name] and leaf.dtype == torch.float64
            assert leaf.untyped_storage().data_ptr() == begins[name]
            assert leaf.untyped_storage().nbytes() == 8 * 2 * room[name]
            leaf.fill_(1)


def test_leaves_of_another_model_are_made_anew_and_the_first_let_go() -> None:
    buffer = CacheBuffer(torch.float32, torch.device("cpu"))
    buffer.views({"k": (1, 2, 3)})
    assert buffer.room({"k": (1, 2, 3)}) and not buffer.room({"state": (1, 2, 3)})
    assert [*buffer.views({"state": (1, 1, 1)})] == ["state"] and buffer.made == 2
    assert not buffer.room({"k": (1, 1, 1)})
