"""README and docs/language.md show what the code does now:
their blocks run, outputs and tables are what those print."""
from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_pages_are_what_their_blocks_and_the_benchmarks_make():
    spec = importlib.util.spec_from_file_location("make_readme", ROOT / "docs" / "make_readme.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    for page in maker.PAGES:
        assert maker.render(page) == (ROOT / page).read_text()


def test_the_commands_are_those_of_the_makefile():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target} " in readme and f"\n{target}:" in makefile
    assert ("-m pytest --import-mode=importlib -q tests --ignore=tests/gpu" in readme
            and "-m pytest --import-mode=importlib -q tests --ignore=tests/gpu" in makefile)
    for part in ("torchrun --nproc-per-node 3 -m shardlib.models.generate", "--model smollm2 --mesh tp=3",
                 "--max-new-tokens 48"):
        assert part in readme.replace("\\\n    ", "") and part in makefile
