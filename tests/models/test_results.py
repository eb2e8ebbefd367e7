"""Results that survive: what is in the file is not done again, what is not whole is dropped, what is another's is refused."""
from __future__ import annotations

from pathlib import Path

import pytest

from shardlib.errors import SpecError
from shardlib.models.results import Result, Results, digest

OF = ["a", "b", "c"]


def refusal(path: Path) -> str:
    with pytest.raises(SpecError) as refused:
        Results(str(path), OF)
    return str(refused.value)


def test_results_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first = Results(str(path), OF)
    first.add(2, [1, 2], "é\n")
    first.add(0, [3], "")
    first.add(2, [9], "not this")
    assert path.read_text() == '{"request":2,"of":"c","tokens":[1,2],"text":"é\\n"}\n{"request":0,"of":"a","tokens":[3],"text":""}\n'
    assert Results(str(path), OF).done == first.done == {2: Result(2, "c", [1, 2], "é\n"), 0: Result(0, "a", [3], "")}


def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first = Results(str(path), OF)
    first.add(0, [1], "x")
    whole = path.read_bytes()
    for cut in (whole[:1], whole[:-1]):
        path.write_bytes(whole + cut)
        again = Results(str(path), OF)
        assert again.done == first.done and path.read_bytes() == whole
    path.write_bytes(whole[:-1])
    Results(str(path), OF).add(1, [2], "y")
    assert [result.request for result in Results(str(path), OF).done.values()] == [1]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for text, said in (("{}\n", "Object missing required field `request`"), ("x\n", "JSON is malformed: invalid character (byte 0)"),
                       ('{"request":0,"of":"b","tokens":[],"text":""}\n', "a result of other prompts or options; name another file"),
                       ('{"request":3,"of":"c","tokens":[],"text":""}\n', "a result of other prompts or options; name another file"),
                       ('{"request":-1,"of":"c","tokens":[],"text":""}\n', "a result of other prompts or options; name another file")):
        path.write_text(text)
        assert refusal(path) == f"{path}, line 1: {said}"
        assert path.read_text() == text


def test_without_a_file_they_are_kept_in_memory() -> None:
    results = Results(None, OF)
    results.add(1, [5], "t")
    assert results.done == {1: Result(1, "b", [5], "t")}


def test_digests_tell_prompts_and_options_apart() -> None:
    assert len({digest([1, 2], (8, 0.0)), digest([1], (8, 0.0)), digest([1, 2], (9, 0.0)), digest([1, 2], (8, 0.5))}) == 4
