"""The layouts of the reference models, by name.

>>> str(named_layout("tp", Mesh(dp=2, tp=2))), str(named_layout("sp", Mesh(tp=2)))
('B=dp,K=tp,F=tp,V=tp', 'K=tp,F=tp,V=tp,T=tp')
>>> str(named_layout("tp+ep", Mesh(dp=2, tp=2))), str(named_layout("tp", Mesh(ep=4, tp=2)))
('B=dp,E=dp/tp,K=tp,F=tp,V=tp', 'E=ep,K=tp,F=tp,V=tp')
>>> str(named_layout("tp+sp+fsdp", Mesh(dp=2, tk=2, tg=2)))
'B=dp,K=tk,G=tg,F=tk/tg,V=tk/tg,T=tk/tg,D=dp'

An axis pp of the mesh has the layers, as dp has the batch:

>>> str(named_layout("tp", Mesh(pp=3))), str(named_layout("tp", Mesh(pp=2, tp=2)))
('L=pp', 'L=pp,K=tp,F=tp,V=tp')

Names join with "+": tp (tensor parallel), sp (sequence parallel, on top of it), fsdp (weights split over dp),
cp (context parallel), ep (experts over an axis ep or, where there is none, over all ranks). An axis that the
mesh lacks is left out. More tensor-parallel ranks than kv heads: a mesh with axes tk and tg. A text with "="
is a layout of its own: "B=dp,K=tp,F=tp".
"""
from __future__ import annotations

from shardlib.errors import SpecError
from shardlib.layout import Layout
from shardlib.mesh import Mesh

NAMES = ("tp", "sp", "fsdp", "cp", "ep")
DIMS = ("B", "T", "S", "D", "L", "K", "G", "H", "E", "F", "V")


def named_layout(text: str, mesh: Mesh) -> Layout:
    """The layout that `text` names or writes, on `mesh`."""
    if "=" in text:
        layout = Layout.parse(text)
        for dim in layout.entries:
            if dim not in DIMS:
                raise SpecError(f"layout {text!r}: the models have no dim {dim}; they have {', '.join(DIMS)}")
        return layout
    parts = text.split("+")
    for part in parts:
        if part not in NAMES:
            raise SpecError(f"layout {text!r}: {part!r} is not one of {', '.join(NAMES)}, and no DIM=AXIS")
    wide = ("tk", "tg") if "tk" in mesh.axes else ("tp",)
    time = (("cp",) if "cp" in parts or "cp" in mesh.axes else ()) + (wide if "sp" in parts else ())
    experts = ("ep",) if "ep" in mesh.axes else ("dp", *wide) if "ep" in parts else ()
    wanted = {"L": ("pp",), "B": ("dp",), "E": experts, "K": wide[:1], "G": wide[1:], "F": wide, "V": wide,
              "T": time, "D": ("dp",) if "fsdp" in parts else ()}
    entries = {dim: tuple(a for a in axes if a in mesh.axes) for dim, axes in wanted.items()}
    return Layout({dim: axes for dim, axes in entries.items() if axes})
