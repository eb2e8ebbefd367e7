"""Step mode as a pipeline: a debugger on a stage sees its own layers, all ranks get the last one's result."""
from __future__ import annotations

import json
from pathlib import Path

from launching import ranks

STEPS = """
import json, sys
import torch
from torch import Tensor
from shardlib import (Layout, Mesh, Params, SpecError, compile, einsum, init, lower, param, scan, sharded,
                      stacked, step)
from shardlib.api import arg_types, shard_of
from shardlib.compiler.stages import needed
from shardlib.distributed.runtime import connect
from shardlib.functions import silu
from shardlib.ops import embedding
from shardlib.params import fill, leaf_values

class Layer(Params):
    up: Tensor = param("D F")
    down: Tensor = param("F D")

class Net(Params):
    embed: Tensor = param("V D")
    layers: Layer = stacked("L", Layer)
    head: Tensor = param("V D")

seen = []

@sharded("B D, *, D -> B D, B")
def layer(x, w: Layer, scale):
    h = silu(einsum("B D, D F -> B F", x * scale, w.up))
    seen.append(None if getattr(x, "local", None) is None else (str(x.spec), list(x.local.shape)))
    return x + einsum("B F, F D -> B D", h, w.down), einsum("B D, D -> B", x, scale)

@sharded("B, *, D -> B V/1, L B")
def net(ids, w: Net, scale):
    x, sums = scan(layer, embedding("B, V D -> B D", ids, w.embed), w.layers, scale)
    return einsum("B D, V D -> B V", x * scale, w.embed if w.head is None else w.head), sums

made, sizes = {}, dict(L=3, B=4, D=4, F=6, V=7)
whole, scale = init(Net, sizes, dtype=torch.float64), torch.arange(1, 5).double()
ids = torch.tensor([1, 6, 0, 3])
leaves = dict(leaf_values(whole, "w"))
with connect(Mesh(pp=2, tp=2), "cpu") as runtime:
    for tied in (False, True):
        w = Net(embed=whole.embed, layers=whole.layers, head=None if tied else whole.head)
        layout = Layout(L="pp", F="tp", V="tp")
        program = lower(net, layout, None, w, None, mesh=runtime.mesh)
        kinds, used = arg_types(program, "w"), needed(program, runtime.coordinate)
        mine = fill(w, "w", lambda p: shard_of(leaves[p].to("cpu" if p in used else "meta"), kinds[p],
                                               runtime.mesh, runtime.coordinate) if p in kinds else None)
        seen.clear()
        y, sums = step(net, layout, runtime=runtime, sizes=sizes)(ids, mine, scale)
        here = list(seen)
        exact = compile(net, mesh=Mesh(), runtime=type("Alone", (), dict(
            mesh=Mesh(), rank=0, coordinate={}, device=torch.device("cpu"), end_others=print,
            create_groups=staticmethod(lambda p: None),
            compare_plans=staticmethod(lambda *p: None))))(ids, w, scale)
        i = runtime.coordinate["pp"]
        torch.testing.assert_close(y, exact[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sums, exact[1][2 * i:2 + i], rtol=1e-12, atol=1e-12)
        made[str(tied)] = here
    try:
        step(net, Layout(L="pp"), runtime=runtime, sizes={**sizes, "L": 1})(ids, Net(
            embed=whole.embed, layers=Layer(up=whole.layers.up[:1 - runtime.coordinate["pp"]],
            down=whole.layers.down[:1 - runtime.coordinate["pp"]]), head=whole.head), scale)
    except SpecError as error:
        made["empty"] = str(error).splitlines()[0]
print(json.dumps({runtime.rank: made}))
"""


def test_each_stage_runs_its_own_layers(tmp_path: Path) -> None:
    """Two layers on the first stage and one on the second, beside tp; a table of one end, and of both."""
    (tmp_path / "steps.py").write_text(STEPS)
    finished = ranks(4, [tmp_path / "steps.py"])
    assert (finished.returncode, finished.stderr) == (0, "")
    found = {rank: made for line in finished.stdout.splitlines() for rank, made in json.loads(line).items()}
    assert sorted(found) == ["0", "1", "2", "3"]
    for rank, made in found.items():
        layers = 2 if rank in "01" else 1
        assert made["False"] == made["True"] == [["B D", [4, 4]]] * layers
        assert made["empty"].split("   ")[0] == (
            "scan: a stage of L/pp has no layer, and of none nothing is stacked here; "
            "compile and simulate do it")
