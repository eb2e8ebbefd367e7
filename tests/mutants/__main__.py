"""`python tests/mutants`: break the code one line at a time, and see whether its tests notice.

    python tests/mutants                     every mutant of the table
    python tests/mutants moves.py "uses =="  those whose file or text contains one of the words
    --jobs 4         as many at a time
    --timeout 900    seconds for one; a mutant that takes longer is killed

Each runs in a copy of the tree of its own. What survives is printed, and makes the exit status 1; so do a
mutant whose text is no longer in the file exactly once (it is to be written anew), and tests that fail
without any mutant.
"""
from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from table import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("ops", "triton_kernels", "models")
"""Folders that are imported from below shardlib: a copy has links to them there,
which come before an installed shardlib."""
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "benchmarks")
PASSES, KILLED, SURVIVES, ANEW, BROKEN = ("passes", "killed", "SURVIVES", "TO BE WRITTEN ANEW",
                                          "FAILS WITHOUT A MUTANT")


def copy(root: Path, tree: Path) -> None:
    """The files of `root`, importable as shardlib where PYTHONPATH says `tree`."""
    shutil.copytree(root, tree, ignore=NOT_COPIED)
    for floor in FLOORS:
        if (tree / floor).is_dir():
            (tree / "shardlib" / floor).symlink_to(tree / floor)


def break_it(tree: Path, mutant: Mutant) -> bool:
    """Writes the mutant into the tree; False where its old text is not there exactly once."""
    file = tree / mutant.file
    text = file.read_text() if file.is_file() else ""
    if text.count(mutant.old) != 1:
        return False
    file.write_text(text.replace(mutant.old, mutant.new))
    return True


def passes(tree: Path, tests: str, timeout_s: float) -> bool:
    """Whether the tests pass, in time, with the same random examples every time."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1",
                   "OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "same"}
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-x", "-p",
               "no:cacheprovider", *tests.split()]
    process = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait(timeout_s) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def trial(root: Path, mutant: Mutant | None, tests: str, timeout_s: float) -> str:
    """What becomes of one mutant; of None, of the code as it is."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy(root, tree)
        if mutant and not break_it(tree, mutant):
            return ANEW
        passed = passes(tree, tests, timeout_s)
        return {(True, True): SURVIVES, (True, False): KILLED, (False, True): PASSES,
                (False, False): BROKEN}[mutant is not None, passed]


def outcomes(root: Path, mutants: Sequence[Mutant], jobs: int, timeout_s: float) -> Iterator[tuple[str, str]]:
    """(what became of it, what it is): first of the code as it is, which all the tests must pass,
    then of each mutant, in order."""
    for tests in dict.fromkeys(mutant.tests for mutant in mutants):
        if (found := trial(root, None, tests, timeout_s)) != PASSES:
            yield found, tests
            return
    yield PASSES, "the code as it is"
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda mutant: trial(root, mutant, mutant.tests, timeout_s), mutants)
        yield from zip(found, (f"{m.file}: {m.old!r} -> {m.new!r}" for m in mutants))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="run the mutants whose file or text contains one of these")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds")
    asked = parser.parse_args()
    chosen = [m for m in MUTANTS
              if not asked.words or any(word in f"{m.file} {m.old} {m.new}" for word in asked.words)]
    count: dict[str, int] = {}
    for outcome, what in outcomes(ROOT, chosen, asked.jobs, asked.timeout):
        print(f"{outcome:8} {what}", flush=True)
        count[outcome] = count.get(outcome, 0) + 1
    print(", ".join(f"{n} {outcome}" for outcome, n in sorted(count.items())))
    return int(set(count) != {PASSES, KILLED})


if __name__ == "__main__":
    sys.exit(main())
