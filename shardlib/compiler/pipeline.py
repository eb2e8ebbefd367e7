"""From a sharded function to its explicit program: traced, completed under a layout,
differentiated, rewritten."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from shardlib.compiler.complete import complete
from shardlib.compiler.grad import value_and_grad_program
from shardlib.compiler.passes import Pass, chosen, rewrite
from shardlib.compiler.reasons import warn
from shardlib.errors import SpecError
from shardlib.language.calls import check_layout, what
from shardlib.language.trace import Function, trace_results
from shardlib.layout import Layout
from shardlib.mesh import Mesh, check_sizes
from shardlib.params import Params
from shardlib.program import Program


class Gradients:
    """The value of `f`, a scalar, and its gradients by the arguments `wrt`,
    as a function of the same arguments."""

    def __init__(self, f: Function, wrt: tuple[str, ...], regather: str, has_aux: bool = False,
                 remat: tuple[str, ...] = ()) -> None:
        self.f, self.wrt, self.regather, self.has_aux, self.remat = f, wrt, regather, has_aux, remat
        self.__name__, self.layout, self.arg_names = f"{f.__name__}_and_grad", f.layout, f.arg_names

    def check_dtypes(self, dtypes: Mapping[str, str]) -> None:
        """SpecError where a gradient is wanted by a tensor that is not of floating point.

        `dtypes`: of the arguments' leaves, by path.
        """
        wrong = next((path for path, dtype in dtypes.items() if path.split(".")[0] in self.wrt
                      and not getattr(torch, dtype).is_floating_point), None)
        if wrong:
            raise SpecError(f"value_and_grad: {wrong} is {dtypes[wrong]}; only floating-point tensors have "
                            "gradients").at(self.f.definition)

    def likes(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """For each gradient what it is like: a pytree or its class, None for a tensor.

        args: instances, where these say more than annotations.
        """
        hints, given = self.f.hints(), dict(zip(self.arg_names, args))
        classes = {name: hint for name, hint in hints.items()
                   if isinstance(hint, type) and issubclass(hint, Params)}
        return tuple(given[n] if isinstance(given.get(n), Params) else classes.get(n) for n in self.wrt)


def lower_results(f: Function | Gradients, layout: Layout | None, mesh: Mesh, sizes: Mapping[str, int] | None,
                  args: Sequence[Any], static: Mapping[str, Any], passes: Sequence[Pass | str],
                  dtypes: Mapping[str, str] | None = None,
                  late: Sequence[str] = (), quiet: bool = False) -> tuple[Program, tuple[Any, ...]]:
    """The explicit program of `f`, and for each of its results what it is like:
    what the function returned, or a pytree's class. `late`: as `value_and_grad_program` has it;
    `quiet`: no LayoutWarning is said."""
    traced_function("lower", f)
    check_layout("lower", layout)
    check_sizes(sizes or {})
    run = chosen(passes)
    if isinstance(f, Gradients):
        program, results = lower_results(f.f, layout, mesh, sizes, args, static,
                                         [p for p in run if p.before_grad], quiet=quiet)
        program = value_and_grad_program(program, f.wrt, mesh, f.regather, dtypes, late, f.has_aux, f.remat)
        return rewrite(program, mesh, [p for p in run if p.after_grad]), (*results, *f.likes(args))
    traced, results = trace_results(f, args, dict(static))
    layout = f.layout if f.layout is not None else layout or Layout()
    program = complete(traced, layout, mesh, sizes)
    if not quiet:
        warn(program, layout.on(mesh))
    return rewrite(program, mesh, run), results


def traced_function(who: str, f: Any) -> Function:
    """The function that is traced for `f`. SpecError where there is none."""
    if not isinstance(f, (Function, Gradients)):
        raise SpecError(f"{who}: it takes a @sharded function, not {what(f)}")
    return f.f if isinstance(f, Gradients) else f
