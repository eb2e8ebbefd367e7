"""Writes docs/gallery.md: the pages of the gallery, their lines, and the layouts that they are tested under.

    python docs/make_gallery.py
"""
from __future__ import annotations

import sys
from pathlib import Path

from shardlib.models.gallery import EXPERTS, LAYOUTS, PAGES
from shardlib.models.gallery.page import Page

PAGE = Path(__file__).with_name("gallery.md")
HEAD = """# The gallery

Made by `python docs/make_gallery.py`. Models that people have, on one page each. No line of a page names an axis of a mesh;
a Hugging Face folder's weights are read by a table of its tensors' names and dims, each rank its own shards
(`config_of` and `load` of [models/gallery/page.py](../models/gallery/page.py)).

`tests/models/test_gallery.py` holds logits and gradients of small random models against transformers, and those under every
layout below against one rank; the last two are of models with experts.
`generate` continues prompts with those whose last column says so: `tests/models/test_gallery_generate.py` holds greedy tokens
against transformers.

| model | page | lines | of these code | what it is | `generate` |
|---|---|---|---|---|---|
"""  # noqa: E501
LAYOUT_HEAD = """
| layout | | ranks |
|---|---|---|
"""


def row(page: Page) -> str:
    """A model's row: its first line says what it is."""
    module = sys.modules[page.params.__module__]
    path = Path(str(module.__file__))
    text = path.read_text()
    code = text.split('"""', 2)[2]
    said = (module.__doc__ or "").split("\n")[0].split(": ", 1)[1].rstrip(".")
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("from ", "import "))]
    return (f"| {page.name} | [{path.name}](../models/gallery/{path.name}) | {len(text.splitlines())} | "
            f"{len(lines)} | {said} | {'yes' if page.lm else ''} |\n")


def page() -> str:
    """The text of docs/gallery.md."""
    layouts = (f"| {name} | `{layout}` | {mesh.world_size} |\n"
               for name, (mesh, layout) in {**LAYOUTS, **EXPERTS}.items())
    return HEAD + "".join(map(row, PAGES.values())) + LAYOUT_HEAD + "".join(layouts)


if __name__ == "__main__":
    PAGE.write_text(page())
