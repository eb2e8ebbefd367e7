"""The one error of the language, and how it is laid out.

Every mistake in specs, layouts, meshes and programs is a `SpecError`: raised before any communication, with
the same text on every rank. First line: the op and the rule broken, in words. Then the specs aligned by dim
name, a caret, and code to paste with its cost.

>>> from shardlib.spec import parse
>>> rows = [("x", parse("B/dp T D"), ""), ("y", parse("B/dp T D +tp"), "owed since line 3")]
>>> print(aligned(rows, caret="+tp"))
  x   B/dp  T  D
  y   B/dp  T  D  +tp   owed since line 3
                  ^^^
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class SpecError(ValueError):
    """A program, spec, layout or mesh that means nothing, or not what its author hopes.

    >>> from shardlib import EXPLICIT, Mesh, einsum, lower, sharded
    >>> f = sharded("D/tp, D -> +tp", layout=EXPLICIT)(lambda x, y: einsum("D/tp, D -> +tp", x, y))
    >>> try:
    ...     lower(f, mesh=Mesh(tp=2))
    ... except SpecError as error:
    ...     print(error)                                                # doctest: +ELLIPSIS
    einsum: D is split over tp in x, whole in y ...
    <BLANKLINE>
      x   D/tp
      y   D
          ^^^^
    <BLANKLINE>
      einsum("D/tp, D/tp -> +tp", x, shard("D -> D/tp", y)) ... free
    ...
    """
    located = False

    def at(self, where: object) -> SpecError:
        """The same error with the user's line at the end of its first line;
        itself where it has one, or none is known."""
        if self.located or not where:
            return self
        first, *rest = str(self).split("\n")
        made = SpecError("\n".join([f"{first}          {where}", *rest]))
        made.located = True
        return made


class LayoutWarning(UserWarning):
    """An entry of a layout that is right, and costs what its author may not expect: one line for each, said
    when a program is lowered. Where it is meant: `warnings.simplefilter("ignore", LayoutWarning)`.

    >>> import warnings
    >>> from shardlib import Layout, Mesh, lower, sharded
    >>> from shardlib.functions import sort
    >>> f = sharded("T D -> T D, T D")(lambda x: sort(x, along="T"))
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     _ = lower(f, Layout(T="tp"), mesh=Mesh(tp=2))
    >>> print(caught[0].message)                                        # doctest: +ELLIPSIS
    layout T=tp: sort needs all of T, so x is gathered; ...
    """


class Itemized(Protocol):
    """What has its text item by item: a spec."""

    def items(self) -> list[str]: ...


def aligned(rows: Sequence[tuple[str, Itemized, str]], caret: str | None = None) -> str:
    """Rows of (name, spec, note), one column a dim name or owed axis,
    and a caret line under the column `caret`.

    `caret` is a dim's name, or an owed item; the name of a group's factor points at the group.
    """
    cells = [dict(zip(_keys(spec.items()), spec.items())) for _, spec, _ in rows]
    columns = _merge([list(cell) for cell in cells])
    width = {c: max(len(cell.get(c, "")) for cell in cells) for c in columns}
    left = max(len(name) for name, _, _ in rows)
    lines = []
    for (name, spec, note), cell in zip(rows, cells):
        body = "  ".join(cell.get(c, "").ljust(width[c]) for c in columns) if cell else "()"
        lines.append(f"  {name.ljust(left)}   {body}   {note}".rstrip())
    if (caret
        and (at := next((i for i, c in enumerate(columns) if caret in (c, *c.split())), None)) is not None):
        lines.append(" " * (2 + left + 3 + sum(width[c] + 2 for c in columns[:at]))
                     + "^" * width[columns[at]])
    return "\n".join(lines)


def _keys(items: Sequence[str]) -> list[str]:
    """What each item is aligned by; a constant that comes again is another column."""
    keys: list[str] = []
    for item in items:
        keys.append(_key(item) + "'" * sum(k.rstrip("'") == _key(item) for k in keys))
    return keys


def _key(item: str) -> str:
    """What an item is aligned by: a dim's name (of a group: its names), an owed item itself."""
    if item.startswith("("):
        return " ".join(name.split("/")[0] for name in item[1:-1].split())
    return item if item[0] in "+@" or item.startswith("max:") else item.split("/")[0].rstrip("~")


def _merge(orders: Iterable[Sequence[str]]) -> list[str]:
    """One order of columns that keeps each row's own order wherever the rows agree."""
    merged: list[str] = []
    for order in orders:
        at = 0
        for key in order:
            if key in merged:
                at = merged.index(key) + 1
            else:
                owed = key[0] in "+@" or key.startswith("max:")
                spot = len(merged) if owed else at
                merged.insert(spot, key)
                at = spot + 1
    return merged


def bytes_text(n: float) -> str:
    """A count of bytes for a person: 16.8 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError("unreachable")
