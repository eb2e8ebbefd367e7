"""README.md and docs/ show what the code does now: their blocks run, and print what stands there."""
from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXTS = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))
MADE = re.compile(r"^(```python|<!-- (tables|figures) -->)$", re.M)


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_readme", ROOT / "docs" / "make_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_what_their_blocks_and_the_benchmarks_make(maker):
    for page in maker.PAGES:
        assert maker.render(page) == (ROOT / page).read_text(), "python docs/make_readme.py"


def test_every_page_with_a_block_or_a_figure_is_made(maker):
    marked = [page for page in TEXTS if MADE.search((ROOT / page).read_text())]
    assert sorted(set(marked) - set(maker.PAGES)) == []


def test_a_first_reader_sees_a_dozen_figures_at_most_and_of_each_benchmark_what_a_peer_wins(maker):
    figures = [(name, maker.figure(name, case)) for name, case in maker.FIGURES]
    assert len(figures) <= 12

    def where_a_peer_wins(slower: float) -> tuple[set[str], set[str]]:
        """The benchmarks, and those of the figures."""
        def wins(row):
            return slower * row["ours"] > 1.05 * maker.fastest(row)[1]
        all_rows = {name: filter(maker.shown, maker.found(name)["rows"]) for name, _ in figures}
        return ({name for name, rows in all_rows.items() if any(map(wins, rows))},
                {name for name, row in figures if wins(row)})
    won, shown = where_a_peer_wins(1)
    assert won == shown
    won, shown = where_a_peer_wins(100)                     # were we so slow, it would be seen
    assert won == shown != set()


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    files = [target.partition("#")[0] for target in targets]
    assert [file for file in files if file and not ((ROOT / page).parent / file).exists()] == []
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    anchors = ["#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
    assert [target for target in targets if target.startswith("#") and target not in anchors] == []


def test_the_commands_are_those_of_the_makefile():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target} " in readme and f"\n{target}:" in makefile
    pytest_of_all = "-m pytest --import-mode=importlib -q tests --ignore=tests/gpu"
    assert pytest_of_all in readme and pytest_of_all in makefile
    launched = "torchrun --nproc-per-node 3 -m shardlib.models.generate"
    for part in (launched, "--model smollm2 --mesh tp=3", "--max-new-tokens 48"):
        assert part in readme.replace("\\\n    ", "") and part in makefile


def test_the_targets_that_contributing_names_are_there():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`make ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert named and [target for target in sorted(named) if f"\n{target}:" not in makefile] == []
