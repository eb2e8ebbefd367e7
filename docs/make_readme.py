"""Fill in what README.md and docs/language.md show: the output of their Python blocks,
and the tables of the benchmarks.

Every ```python block runs, in order, in one namespace; the ```text block that follows a block is what it
printed. Between <!-- tables --> marks stand the rows of benchmarks/results. `python docs/make_readme.py`
rewrites the files; a test checks that they are what this makes.
"""
from __future__ import annotations

import contextlib
import io
import json
import linecache
import re
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/language.md", "docs/distributed.md")
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n(?:It prints:\n\n)?```text\n.*?```)?", re.S)


def render(page: str) -> str:
    """The text of a page with outputs and tables as they are now."""
    text = (ROOT / page).read_text()
    module = sys.modules["page"] = types.ModuleType("page")

    def run(match: re.Match) -> str:
        whole, source = match.group(0), match.group(1)
        name = page
        source = "\n" * (text[:match.start()].count("\n") + 1) + source  # so that lines are those of the file
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
        if "```text" not in whole:
            return whole
        printed = "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
        return whole[:whole.index("```text")] + f"```text\n{printed}\n```"
    filled = BLOCK.sub(run, text)
    return re.sub(r"(<!-- tables -->\n).*?(<!-- /tables -->)", lambda m: m[1] + tables() + m[2], filled,
                  flags=re.S)


def tables() -> str:
    """One table a benchmark."""
    parts = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        found = json.loads(path.read_text())
        lines = [(f"**{path.stem}** ({found['hardware']}; torch {found['versions']['torch']}; "
                  f"{found['date']}, commit {found['commit']})"), "",
                 "| case | unit | shardlib | peers | ours / peer | floor |", "|---|---|---|---|---|---|"]
        for row in filter(shown, found["rows"]):
            peers = "; ".join(f"{name} {value:g}" for name, value in row["peers"].items())
            ratio = row.get("paired_ratio")
            ratios = (f"{ratio:.3f} (paired)" if ratio
                      else "; ".join(f"{row['ours'] / v:.2f}" for v in row["peers"].values() if v))
            lines.append(f"| {row['case']} | {row['unit']} | {row['ours']:g} | {peers} | {ratios} | "
                         f"{'' if row['floor'] is None else row['floor']} |")
        if path.with_suffix(".svg").exists():
            lines += ["", f"![{path.stem}](benchmarks/results/{path.stem}.svg)"]
        parts.append("\n".join(lines) + "\n\n")
    return "\n" + "".join(parts)


def shown(row: dict) -> bool:
    """Of a benchmark over many sizes, some; the file and the picture have all."""
    return row.get("readme", True)


if __name__ == "__main__":
    for page in PAGES:
        # outputs name lines, and outputs move lines
        while (made := render(page)) != (ROOT / page).read_text():
            (ROOT / page).write_text(made)
