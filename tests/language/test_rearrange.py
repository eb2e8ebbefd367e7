"""What `rearrange` does not take."""
from __future__ import annotations

import pytest

from shardlib import Layout, Mesh, SpecError, lower, rearrange, sharded


@pytest.mark.parametrize("text", ["T 3 -> T", "T 3 -> 3 T", "T -> T 3", "T D -> T", "T -> T D",
                                  "T D -> T D, T", "T D, T -> T D"])
def test_what_is_no_rearrangement_is_refused(text: str) -> None:
    given, _, out = (part.partition(",")[0] for part in text.partition(" -> "))
    with pytest.raises(SpecError) as error:
        lower(sharded(f"{given} -> {out}")(lambda x: rearrange(text, x)), Layout(), mesh=Mesh())
    assert str(error.value).startswith(f'rearrange "{text}": one spec on each side, with the same names')
