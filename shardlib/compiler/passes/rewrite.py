"""What a pass is, and what passes share: how often values are used, and renaming."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shardlib.compiler.fusion import Fusion, Product
from shardlib.mesh import Mesh
from shardlib.program import Program, Step


@dataclass(frozen=True)
class Pass:
    """A rewrite by its name: `run` gives a program that denotes the same, its results in the same types.

    before_grad: whether it runs on a program before its gradient is made of it.  after_grad: whether it runs
    on the two together. A program without gradients sees all passes, once.
    fusions: what the fused steps that it makes mean, and which kernels there are for them.
    product: what is called with x and w in the place of a matmul; or why nothing is.
    """
    name: str
    run: Callable[[Program, Mesh], Program]
    before_grad: bool = True
    after_grad: bool = True
    fusions: tuple[Fusion, ...] = ()
    product: Callable[[Product], Callable | str] | None = None


def use_counts(program: Program) -> dict[str, int]:
    """How often each value is used, results included."""
    out = {name: 0 for name in program.types()}
    for name in (*(i for s in program.steps for i in s.inputs), *(n for n, _ in program.result_leaves())):
        out[name] += 1
    return out


def renamed(step: Step, alias: Mapping[str, str]) -> Step:
    """The step, taking other values in place of those in `alias`."""
    return (step.having(inputs=tuple(alias.get(i, i) for i in step.inputs))
            if alias and any(i in alias for i in step.inputs) else step)
