"""The language: what one writes programs with, an op or a family of ops a file.

`trace` runs a function on names; `moves` and `wires` say what a collective is.
"""
