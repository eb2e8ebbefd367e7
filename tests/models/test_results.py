"""Results that survive: what is in the file is not done again, what is not whole is dropped,
what is another's is refused."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardlib.errors import SpecError
from shardlib.models.generate import _digests, arguments
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
    assert path.read_text() == ('{"request":2,"of":"c","tokens":[1,2],"text":"é\\n"}\n'
                                '{"request":0,"of":"a","tokens":[3],"text":""}\n')
    assert Results(str(path), OF).done == first.done == {2: Result(2, "c", [1, 2], "é\n"),
                                                         0: Result(0, "a", [3], "")}


def test_a_result_is_on_the_disk_when_add_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is synced once a line, after all of the line is in it."""
    path, synced = tmp_path / "results.jsonl", []
    results = Results(str(path), OF)

    def fsync(descriptor: int) -> None:
        assert os.fstat(descriptor).st_ino == path.stat().st_ino
        synced.append(path.read_bytes())
    monkeypatch.setattr("os.fsync", fsync)
    results.add(0, [1], "x")
    results.add(1, [2], "y")
    results.add(0, [3], "not this")
    first, second = (line + b"\n" for line in path.read_bytes().splitlines())
    assert synced == [first, first + second]
    path.write_bytes(first[:-1])
    synced.clear()
    Results(str(path), OF)
    assert synced == [first[:-1], first]        # when it is opened, and when its newline is there


def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first = Results(str(path), OF)
    first.add(0, [1], "x}")
    whole = path.read_bytes()
    for cut in range(1, len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        again = Results(str(path), OF)
        assert again.done == first.done and path.read_bytes() == whole
    path.write_bytes(whole[:-2])
    Results(str(path), OF).add(1, [2], "y")
    assert [result.request for result in Results(str(path), OF).done.values()] == [1]


def test_a_line_that_lacks_its_newline_alone_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Results(str(path), OF).add(0, [1], "x")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert Results(str(path), OF).done == {0: Result(0, "a", [1], "x")} and path.read_bytes() == whole
    path.write_bytes(whole[:-1])
    with pytest.raises(SpecError, match="line 1: a result of other prompts or options; name another file"):
        Results(str(path), ["b"])
    assert path.read_bytes() == whole[:-1]


def test_a_file_without_a_newline_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    for text in (b'{"my": "precious"}', b"x", b"\xff", b'{"request":0,"of":"b","tokens":[1', b'{"request":0}',
                 b'{"request":7,"of":"', b"[" * 100_000):
        path.write_bytes(text)
        assert refusal(path) == (
            f"{path} is no file of results of these prompts and options; name another file")
        assert path.read_bytes() == text


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for text, said in (("{}\n", "Object missing required field `request`"),
                       ("x\n", "JSON is malformed: invalid character (byte 0)"),
                       ('{"request":0,"of":"b","tokens":[],"text":""}\n',
                        "a result of other prompts or options; name another file"),
                       ('{"request":3,"of":"c","tokens":[],"text":""}\n',
                        "a result of other prompts or options; name another file"),
                       ('{"request":-1,"of":"c","tokens":[],"text":""}\n',
                        "a result of other prompts or options; name another file")):
        path.write_text(text)
        assert refusal(path) == f"{path}, line 1: {said}"
        assert path.read_text() == text


def test_what_no_decoder_takes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for text, said in ((b"\xff\n", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
                       (b'{"request":0,"of":"\xff"}\n',
                        "'utf-8' codec can't decode byte 0xff in position 19: invalid start byte"),
                       (b'{"x":' + b"[" * 100_000 + b"\n",
                        "maximum recursion depth exceeded while deserializing an object")):
        path.write_bytes(text)
        assert refusal(path) == f"{path}, line 1: {said}"
        assert path.read_bytes() == text


def test_results_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    line = '{"request":0,"of":"a","tokens":[1],"text":"x"}\n'
    path.write_text(line + line)
    assert Results(str(path), OF).done == {0: Result(0, "a", [1], "x")}
    path.write_text(line + line.replace("[1]", "[2]"))
    assert refusal(path) == (
        f"{path}, line 2: another result of request 0 than in a line before; delete one of them")


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "none" / "results.jsonl", "No such file or directory"),
                       (tmp_path, "Is a directory"), (Path("/dev/null"), "Invalid argument")):
        assert refusal(path) == f"{path}: {said}"


def test_without_a_file_they_are_kept_in_memory() -> None:
    results = Results(None, OF)
    results.add(1, [5], "t")
    assert results.done == {1: Result(1, "b", [5], "t")}


def test_digests_tell_prompts_and_options_apart() -> None:
    assert len({digest([1, 2], (8, 0.0)), digest([1], (8, 0.0)), digest([1, 2], (9, 0.0)),
                digest([1, 2], (8, 0.5))}) == 4
    assert digest([1, 2], (8, 0.0)) == "bd0fe7f338921332"           # files that were begun before are known


def test_a_request_is_known_by_all_that_decides_its_tokens() -> None:
    """Of what a command is told: one thing after another is said otherwise."""
    def known(*how: str, rows: int = 1) -> str:
        return _digests([[1, 2]] * rows, arguments().parse_args(how))[-1]
    drawn, random = ("--temperature", "1.5"), ("--weights", "random:llama3-1b")
    others = [(), ("--dtype", "bfloat16"), ("--max-new-tokens", "9"), ("--model", "other.gguf"), drawn,
              ("--temperature", "1"), (*drawn, "--top-p", "0.5"), (*drawn, "--seed", "1"), random,
              (*random, "--seed", "1"), (*random, "--mesh", "tp=2")]
    assert len({known(*how) for how in others}) == len(others)
    assert {known(*how) for how in (("--seed", "1"), ("--top-p", "0.5"), ("--mesh", "tp=2"))} == {known()}
    assert known(rows=2) == known()
    assert known(*drawn) == known(*drawn, "--batch", "1", rows=2) != known(*drawn, rows=2)
