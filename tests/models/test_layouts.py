"""The layouts that have names: what each says on each mesh, whole."""
from __future__ import annotations

import pytest

from shardlib import Layout, Mesh, SpecError
from shardlib.models.layouts import DIMS, named_layout


@pytest.mark.parametrize("text, mesh, layout", [
    ("tp", "", ""), ("tp", "tp=2", "K=tp,F=tp,V=tp"), ("tp", "dp=2", "B=dp"),
    ("tp", "pp=2", "L=pp"), ("tp", "pp=2,tp=2", "L=pp,K=tp,F=tp,V=tp"), ("B=dp", "dp=2,pp=2", "B=dp"),
    ("tp", "dp=2,tp=2", "B=dp,K=tp,F=tp,V=tp"), ("tp", "tk=2,tg=2", "K=tk,G=tg,F=tk/tg,V=tk/tg"),
    ("tp", "tk=2", "K=tk,F=tk,V=tk"), ("tp", "tg=2", ""),
    ("tp", "cp=2", "T=cp"), ("tp", "ep=2", "E=ep"), ("tp", "ep=2,dp=2,tp=2", "B=dp,E=ep,K=tp,F=tp,V=tp"),
    ("sp", "tp=2", "K=tp,F=tp,V=tp,T=tp"), ("sp", "dp=2", "B=dp"), ("cp", "tp=2", "K=tp,F=tp,V=tp"),
    ("sp", "cp=2,tp=2", "K=tp,F=tp,V=tp,T=cp/tp"), ("cp+sp", "cp=2,tp=2", "K=tp,F=tp,V=tp,T=cp/tp"),
    ("cp", "cp=2,tp=2", "K=tp,F=tp,V=tp,T=cp"),
    ("sp", "tk=2,tg=2", "K=tk,G=tg,F=tk/tg,V=tk/tg,T=tk/tg"),
    ("fsdp", "dp=2,tp=2", "B=dp,K=tp,F=tp,V=tp,D=dp"), ("fsdp", "tp=2", "K=tp,F=tp,V=tp"),
    ("tp+sp+fsdp", "dp=2,tp=2", "B=dp,K=tp,F=tp,V=tp,T=tp,D=dp"),
    ("fsdp+sp", "dp=2,tp=2", "B=dp,K=tp,F=tp,V=tp,T=tp,D=dp"),
    ("ep", "dp=2,tp=2", "B=dp,E=dp/tp,K=tp,F=tp,V=tp"), ("ep", "tp=2", "E=tp,K=tp,F=tp,V=tp"),
    ("ep", "dp=2", "B=dp,E=dp"), ("ep", "dp=2,ep=2,tp=2", "B=dp,E=ep,K=tp,F=tp,V=tp"),
    ("ep", "dp=2,tk=2,tg=2", "B=dp,E=dp/tk/tg,K=tk,G=tg,F=tk/tg,V=tk/tg"),
    ("V=tp,B=dp", "dp=2,tp=2", "V=tp,B=dp"), ("S=cp", "cp=2", "S=cp"),
])
def test_named_layouts(text: str, mesh: str, layout: str) -> None:
    made = named_layout(text, Mesh.parse(mesh))
    assert str(made) == layout and (made == Layout.parse(layout) if layout else not made.entries)


@pytest.mark.parametrize("text, message", [
    ("", "layout '': '' is not one of tp, sp, fsdp, cp, ep, and no DIM=AXIS"),
    ("tp+zp", "layout 'tp+zp': 'zp' is not one of tp, sp, fsdp, cp, ep, and no DIM=AXIS"),
    ("B=dp,Q=tp", f"layout 'B=dp,Q=tp': the models have no dim Q; they have {', '.join(DIMS)}"),
])
def test_what_names_no_layout(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        named_layout(text, Mesh(dp=2, tp=2))
    assert str(caught.value) == message
