"""A picture of a schedule: ranks down, time across, one box an action.

>>> from shardlib.schedules.clock import run
>>> from shardlib.schedules.generators import one_f_one_b
>>> picture = svg(run(one_f_one_b(2, 2)))
>>> picture.count("<rect"), picture.count("<text"), picture.startswith("<svg xmlns=")
(11, 13, True)

`page` puts several below each other, what was predicted and what was measured, say; a browser shows when an
action was where one points at it.

>>> page({"1F1B <by work>": run(one_f_one_b(2, 2))})[:66]
'<!doctype html><meta charset="utf-8"><h3>1F1B &lt;by work&gt;</h3>'
"""
from __future__ import annotations

from collections.abc import Mapping
from html import escape

from shardlib.schedules.clock import Timeline

COLORS = {"F": "#8fb8de", "B": "#f2b880", "I": "#f2b880", "W": "#9fd3a8"}
NAMES = {"F": "forward", "B": "backward", "I": "backward, the carry", "W": "backward, the weights"}
ROW, LEFT, TOP, WIDTH = 26, 62, 26, 900


def svg(made: Timeline) -> str:
    """The picture as SVG. A box says its stage where a rank has several, and its microbatch."""
    scale, ranks = WIDTH / max(made.length, 1e-9), len(made.schedule.ranks)
    several = made.schedule.stages > ranks
    height = TOP + ROW * ranks + 30
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 10} {height}" '
             'font-family="sans-serif" font-size="11">',
             f'<text x="{LEFT}" y="16">{made.idle:.1%} idle</text>',
             f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{ROW * ranks}" fill="#eeeeee"/>']
    lines += [f'<text x="4" y="{TOP + ROW * rank + 17}">rank {rank}</text>' for rank in range(ranks)]
    for span in made.spans:
        x, y, wide = LEFT + scale * span.start, TOP + ROW * span.rank + 1, scale * (span.end - span.start)
        said = f"{span.action.stage}.{span.action.microbatch}" if several else str(span.action.microbatch)
        lines.append(f'<rect x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{ROW - 2}" '
                     f'fill="{COLORS[span.action.kind]}" stroke="#ffffff"><title>{span.action}: '
                     f'{span.start:.4g} to {span.end:.4g}</title></rect>')
        if wide > 7 * len(said):
            lines.append(f'<text x="{x + wide / 2:.2f}" y="{y + 16}" text-anchor="middle">{said}</text>')
    for i, kind in enumerate(k for k in "FBIW" if any(s.action.kind == k for s in made.spans)):
        x, y = LEFT + 170 * i, height - 22
        lines += [f'<rect x="{x}" y="{y}" width="12" height="12" fill="{COLORS[kind]}"/>',
                  f'<text x="{x + 17}" y="{y + 10}">{NAMES[kind]}</text>']
    return "\n".join([*lines, "</svg>"]) + "\n"


def page(made: Mapping[str, Timeline]) -> str:
    """Pictures below each other, each under its name, as one HTML page."""
    return '<!doctype html><meta charset="utf-8">' + "".join(
        f"<h3>{escape(name)}</h3>\n{svg(timeline)}" for name, timeline in made.items())
