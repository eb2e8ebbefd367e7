"""Printed programs as what they are: Python."""
from __future__ import annotations

import linecache
from dataclasses import replace
from typing import Any

from shardlib import lower
from shardlib.api import Sharded
from shardlib.mesh import Mesh
from shardlib.program import Program


def pasted(program: Program, mesh: Mesh) -> Program:
    """What Python makes of the program's text."""
    text = f"from shardlib.ops.lowered import *\n{program}"
    linecache.cache["pasted"] = (len(text), None, text.splitlines(True), "pasted")
    made: dict[str, Any] = {"__name__": "pasted"}
    exec(compile(text, "pasted", "exec", dont_inherit=True), made)
    return lower([f for f in made.values() if isinstance(f, Sharded)][-1], mesh=mesh, passes=())


def numbered(program: Program) -> Program:
    """The program with the values that it makes numbered:
    Python does not know what it returns by the name in the return."""
    names = {name: f"n{i}" for i, name in enumerate(n for s in program.steps for n in s.outputs)}
    steps = tuple(replace(s, inputs=tuple(names.get(i, i) for i in s.inputs),
                          outputs=tuple(names[o] for o in s.outputs)).rewritten(numbered)
                  for s in program.steps)
    return replace(program, steps=steps, results=tuple(
        replace(r, values=tuple(names.get(v, v) for v in r.values)) for r in program.results))
