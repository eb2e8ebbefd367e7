"""Variables of generated code: the name of a value that is used no further goes to the next one.

So a value is let go when the next one of its block takes its name, mostly in the line after the last that
reads it, as in code written by hand; those of a loop's body keep theirs until the function ends. Lines come
in with every value under a name `vN` of its own, blocks indented by four spaces.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_VARIABLE = re.compile(r"""'[^']*'|"[^"]*"|\bv\d+\b""")
_TARGETS = re.compile(r"(for )?([v0-9, ]+?)( = |, in )")
Block = list[tuple[str, list]]         # lines, each with the block that it heads


def reuse(lines: Sequence[str]) -> list[str]:
    """The same lines with fewer variables.

    One that is assigned in several places, or by a loop's head, keeps its name for itself.
    """
    block, _ = _block(lines, 0, 0)
    assigned = Counter(name for line in lines for name in _targets(line))
    loops = {name for line in lines if line.lstrip().startswith("for ") for name in _targets(line)}
    return _renamed(block, {}, loops | {name for name, count in assigned.items() if count > 1})


def _block(lines: Sequence[str], at: int, indent: int) -> tuple[Block, int]:
    """The block that starts at line `at`, and the number of the line after it."""
    block: Block = []
    while at < len(lines) and len(lines[at]) - len(lines[at].lstrip()) >= indent:
        line = lines[at]
        inner, at = _block(lines, at + 1, indent + 4)
        block.append((line, inner))
    return block, at


def _renamed(block: Block, called: dict[str, str], pinned: set[str]) -> list[str]:
    """The block's lines. `called`: the name of each variable from outside; it gets those of this block."""
    last = {name: i for i, item in enumerate(block) for name in _mentioned(item)}
    mine: list[str] = []                # variables of this block that hold a value
    free: list[str] = []                # names of this block that hold none
    out = []

    def rename(text: str) -> str:
        return _VARIABLE.sub(lambda m: called.get(m[0], m[0]), text)
    for i, (line, inner) in enumerate(block):
        targets = [n for n in _targets(line) if n not in pinned]
        head, equals, reads = line.partition(" = ") if targets else ("", "", line)
        reads, body = rename(reads), _renamed(inner, called, pinned)
        free += [called[n] for n in mine if last[n] == i]
        mine = [n for n in mine if last[n] > i]
        for name in targets:
            called[name] = free.pop() if free else name
        mine += targets
        out += [rename(head) + equals + reads, *body]
    return out


def _mentioned(item: tuple[str, list]) -> set[str]:
    line, inner = item
    return {m for m in _VARIABLE.findall(line) if m[0] == "v"}.union(*map(_mentioned, inner))


def _targets(line: str) -> list[str]:
    """The variables that a line assigns."""
    found = _TARGETS.match(line.lstrip())
    return _VARIABLE.findall(found[2]) if found else []
