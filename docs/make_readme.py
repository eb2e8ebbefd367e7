"""Fill in what README.md and pages of docs/ show: outputs of their Python blocks, figures of the benchmarks.

Every ```python block runs, in order, in one namespace a page; the ```text block after it is what it printed.
Between <!-- tables --> marks stand the rows of benchmarks/results, between <!-- figures --> those of FIGURES,
between <!-- layers --> where the time of a layer goes.
`python docs/make_readme.py` rewrites the pages; a test checks that they are what this makes.
"""
from __future__ import annotations

import contextlib
import io
import json
import linecache
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", *(f"docs/{name}.md" for name in (
    "language", "your_model", "bugs", "distributed", "architecture", "benchmarks")))
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n(?:It prints:\n\n)?```text\n.*?```)?", re.S)
FIGURES = (
    ("collectives", "all_reduce, 4 GPUs, 65536 B"),
    ("collectives", "all_gather, 4 GPUs, 1048576 B"),
    ("collectives", "all_to_all, 4 GPUs, 1048576 B"),
    ("collectives", "all_reduce, 4 GPUs, 67108864 B"),
    ("decode", "llama3-8b, tp=4, batch 1"),
    ("decode", "llama3-70b, tp=4, batch 1"),
    ("decode", "llama3-8b, tp=1, batch 32"),
    ("compiled", "SmolLM2-135M decode, T=1, fp32"),
    ("decoding", "SmolLM2-135M greedy decoding, fp32, tp=1"),
    ("shared_memory", "all_reduce of 262.1 kB, 4 processes"),
    ("step_overhead", "add of 4 x 64, µs above plain torch (1.0)"),
)
"""What a first reader sees of the benchmarks: (file, case). Of each the fastest peer is shown."""


def render(page: str) -> str:
    """The text of a page with outputs, tables and figures as they are now."""
    text = (ROOT / page).read_text()
    module = sys.modules["page"] = types.ModuleType("page")

    def run(match: re.Match) -> str:
        whole, source = match.group(0), match.group(1)
        above = text[:match.start()].count("\n") + 1
        source = "\n" * above + source              # so that lines are those of the file
        linecache.cache[page] = (len(source), None, source.splitlines(True), page)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(source, page, "exec", dont_inherit=True), module.__dict__)
        if "```text" not in whole:
            return whole
        printed = "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
        return whole[:whole.index("```text")] + f"```text\n{printed}\n```"
    filled = between("tables", BLOCK.sub(run, text), lambda: tables(page))
    filled = between("layers", filled, layers)
    return between("figures", filled, figures)


def between(marks: str, text: str, made: Callable[[], str]) -> str:
    """The text with what is `made` between its marks, if it has any."""
    place = rf"(<!-- {marks} -->\n).*?(<!-- /{marks} -->)"
    return re.sub(place, lambda match: match[1] + made() + match[2], text, flags=re.S)


def found(name: str) -> dict:
    """What the benchmark `name` has written."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def figures() -> str:
    """The rows of FIGURES, each beside its fastest peer, with what it was measured on."""
    lines = ["| measured | on | unit | shardlib | fastest peer | ours / peer |", "|---|---|---|---|---|---|"]
    for name, case in FIGURES:
        row = figure(name, case)
        peer, value = fastest(row)
        ratio = row.get("paired_ratio") or row["ours"] / value
        times = (row["unit"], f"{row['ours']:g}", f"{peer} {value:g}", f"{ratio:.2f}")
        hardware = row.get("hardware", found(name)["hardware"])
        lines.append(f"| {name}: {case} | {hardware} | {' | '.join(times)} |")
    return "\n".join(lines) + "\n"


def figure(name: str, case: str) -> dict:
    """The row of one case."""
    return next(row for row in found(name)["rows"] if row["case"] == case)


def fastest(row: dict) -> tuple[str, float]:
    """A row's fastest peer, and what it takes."""
    return min(row["peers"].items(), key=lambda peer: peer[1])


def tables(page: str) -> str:
    """One table a benchmark, with links as `page` needs them."""
    folder = os.path.relpath(RESULTS, (ROOT / page).parent)
    return "\n" + "".join(table(path.stem, folder) for path in sorted(RESULTS.glob("*.json")))


def table(name: str, folder: str) -> str:
    """The rows of one benchmark that a page has room for, and its picture in `folder`, if it has one."""
    made = found(name)
    versions, run = f"torch {made['versions']['torch']}", f"{made['date']}, commit {made['commit']}"
    lines = [f"**{name}** ({made['hardware']}; {versions}; {run})", "",
             "| case | unit | shardlib | peers | ours / peer | floor |", "|---|---|---|---|---|---|"]
    lines += map(line, filter(shown, made["rows"]))
    if (RESULTS / f"{name}.svg").exists():
        lines += ["", f"![{name}]({folder}/{name}.svg)"]
    return "\n".join(lines) + "\n\n"


def layers() -> str:
    """Where the microseconds of a layer go, of each decode step that was profiled kernel after kernel."""
    rows = json.loads((RESULTS.parent / "profiles" / "decode.json").read_text())["rows"]
    lines = ["| step | kernel | µs | floor |", "|---|---|---|---|"]
    for row in (row for row in rows if "layer" in row):
        title = f"{row['case']} ({row['hardware']}, commit {row['commit']})"
        for name, us, floor in row["layer"]:
            lines.append(f"| {title} | {name} | {us:g} | {floor:g} |")
            title = ""
        sums = (round(sum(x[i] for x in row["layer"]), 1) for i in (1, 2))
        lines.append("|  | the layer | " + " | ".join(f"{x:g}" for x in sums) + " |")
    return "\n".join(lines) + "\n"


def line(row: dict) -> str:
    """A row of a table."""
    peers = "; ".join(f"{name} {value:g}" for name, value in row["peers"].items())
    ratios = "; ".join(f"{row['ours'] / value:.2f}" for value in row["peers"].values() if value)
    if paired := row.get("paired_ratio"):
        ratios = f"{paired:.3f} (paired)"
    floor = "" if row["floor"] is None else row["floor"]
    return f"| {row['case']} | {row['unit']} | {row['ours']:g} | {peers} | {ratios} | {floor} |"


def shown(row: dict) -> bool:
    """Of a benchmark over many sizes, some; the file and the picture have all."""
    return row.get("readme", True)


if __name__ == "__main__":
    for page in PAGES:
        while (made := render(page)) != (ROOT / page).read_text():      # outputs name lines, and move them
            (ROOT / page).write_text(made)
