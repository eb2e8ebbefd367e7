"""docs/your_model.md: its blocks, in one process and in two, say the same; its optimizer is torch's."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from shardlib import Layout, Mesh, init, simulate, tree_map
from shardlib.params import flat

PAGE = (Path(__file__).parents[1] / "docs" / "your_model.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
PRINTED = "".join(re.findall(r"```text\n(.*?)```", PAGE, re.S)).splitlines()


def test_two_processes_print_what_one_does(tmp_path: Path) -> None:
    """The losses of each step, and of the checkpoint on another mesh; simulations on both."""
    (tmp_path / "train.py").write_text("\n".join(BLOCKS))
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 train.py".split()
    made = subprocess.run([sys.executable, *launch], cwd=tmp_path, capture_output=True, text=True,
                          timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert made.returncode == 0, made.stderr
    assert sorted(made.stdout.splitlines()) == sorted([*PRINTED, *PRINTED[:2]])


def test_the_optimizer_is_that_of_torch(tmp_path, monkeypatch) -> None:
    names: dict = {"__name__": "train"}
    path = tmp_path / "train.py"
    path.write_text("\n".join(BLOCKS[:2]))
    exec(compile(path.read_text(), str(path), "exec", dont_inherit=True), names)
    w = init(names["Net"], dict(V=5, D=4, F=3, L=2), dtype=torch.float64)
    zeros = tree_map(torch.zeros_like, w)
    s = names["State"](w=w, m=zeros, v=zeros)
    free = [x.clone().requires_grad_() for x in flat(w)]
    optimizer = torch.optim.AdamW(free, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        g = tree_map(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype), w)
        s = simulate(names["adamw"], Layout(D="dp", V="tp"), s, g, torch.tensor(i), mesh=Mesh(dp=2, tp=2))
        for x, grad in zip(free, flat(g)):
            x.grad = grad
        optimizer.step()
    for mine, theirs in zip(flat(s.w), free):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-6, atol=1e-8)     # t is float32
