"""The layouts under which pages are tested, each on a mesh of its own; EXPERTS: two more, of those that have
some."""
from __future__ import annotations

from shardlib.layout import Layout
from shardlib.mesh import Mesh

TWO, FOUR = Mesh(x=2), Mesh(x=2, y=2)
LAYOUTS = {
    "tensor parallel": (TWO, Layout(K="x", F="x", V="x")),
    "sequence parallel": (TWO, Layout(K="x", F="x", V="x", T="x")),
    "data parallel": (TWO, Layout(B="x")),
    "FSDP": (TWO, Layout(B="x", D="x")),
    "context parallel": (TWO, Layout(T="x")),
    "a ring of keys": (TWO, Layout(T="x", S="x")),
    "d_model": (TWO, Layout(D="x")),
    "all of them": (FOUR, Layout(B="y", K="x", F="x", V="x", T="x", D="y")),
    "more ranks than kv heads": (FOUR, Layout(K="x", G="y", F=("x", "y"), V=("y", "x"))),
    "pipeline of tensor parallel stages": (FOUR, Layout(L="x", K="y", F="y", V="y")),
}
EXPERTS = {
    "experts over tensor parallel ranks": (TWO, Layout(K="x", E="x", V="x")),
    "experts over all ranks": (FOUR, Layout(B="x", E=("x", "y"), K="y", V="y")),
}
