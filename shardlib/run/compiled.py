"""Compiled programs: one plain Python function for every set of argument shapes,
called with this rank's shards."""
from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from shardlib.compiler.passes import DEFAULT, Pass, chosen
from shardlib.compiler.pipeline import Gradients, lower_results, traced_function
from shardlib.compiler.sizes import bind_sizes
from shardlib.compiler.stages import needed
from shardlib.distributed.runtime import Runtime
from shardlib.dtypes import value_dtypes
from shardlib.errors import SpecError
from shardlib.language.arguments import argument_trees
from shardlib.language.calls import check_given, check_layout, check_static, check_tensors, refuse_named
from shardlib.language.trace import Function
from shardlib.layout import Layout
from shardlib.lowering.emit import Emitter
from shardlib.lowering.load import load
from shardlib.mesh import Mesh, check_sizes
from shardlib.params import Params, flat, flat_leaves, leaf_dtypes, named_leaves, present, rebuild
from shardlib.placement import arg_types
from shardlib.program import Program, Step
from shardlib.run.captured import Captures, conditional
from shardlib.run.failures import Lines, explain_failure
from shardlib.run.index_flags import IndexFlags
from shardlib.run.kernels import Kernels
from shardlib.run.prepared import Prepared, prepare, whole
from shardlib.run.surroundings import any_autocast, refuse_gradients, without_autocast
from shardlib.spec import Spec
from shardlib.tree import leaves

Variant = tuple[Callable, Callable, Lines]
"""What runs a program for arguments of some shapes, what makes its results of the leaves that this returns,
and what its lines are."""


class Compiled:
    """A program as each rank runs it: called with this rank's shards, it returns this rank's shards.

    One plain Python function is made for every set of argument shapes, and kept.
    """

    def __init__(self, f: Function | Gradients, layout: Layout | None, runtime: Runtime,
                 sizes: Mapping[str, int], donate: Sequence[str], static: Mapping[str, Any],
                 graph: bool | str = False, passes: Sequence[Pass | str] = DEFAULT) -> None:
        check_static(traced_function("compile", f), static)
        check_layout("compile", layout)
        check_sizes(sizes)
        if unknown := next((n for n in ((donate,) if isinstance(donate, str) else donate)
                            if n not in f.arg_names), None):
            raise SpecError(f"compile: donate names {unknown}, which is no argument of {f.__name__}; it has "
                            f"{', '.join(f.arg_names)}")
        self.f, self.layout, self.runtime, self.sizes, self.passes = (f, layout, runtime, dict(sizes),
                                                                      chosen(passes))
        self.donate, self.static = (donate,) if isinstance(donate, str) else tuple(donate), dict(static)
        self.program: Program | None = None
        self.sources: dict[tuple, str] = {}
        self.kernels: Kernels | None = None         # asked by the code that was made last
        self.graph, self._captures = graph, None
        self._variants: dict[tuple, Variant] = {}
        self._results: tuple[Any, ...] = ()
        self._flags = IndexFlags(runtime.device, lambda error: runtime.end_others(error))
        self._likes: dict[int, Params] = {}         # argument -> a pytree like the one it takes
        # torch.autograd would miss other ranks
        self._apart = runtime.mesh.world_size > 1 and not isinstance(f, Gradients)

    def at(self, **sizes: int) -> Compiled:
        """The same where dims have these global sizes; what has been made for some
        of them is made for all."""
        made = copy(self)
        made.sizes, made._likes = {**self.sizes, **sizes}, dict(self._likes)
        return made

    def lower(self, *args: Any) -> Program:
        """The explicit program; `args` say which pytrees it takes, as for `lower`. What an earlier call has
        said need not be said again; where this one says otherwise, it is the program of this one."""
        news = {i: a for i, a in enumerate(args)
                if isinstance(a, Params) and (i not in self._likes or present(a) != present(self._likes[i]))}
        if self.program is None or news:
            self._likes |= news
            self.program = self._lower()
            self._captures = (Captures(self.runtime)
                              if self.graph and not self._refuses(conditional(self.program)) else None)
        return self.program

    def types(self, name: str, like: Any = None) -> dict[str, Spec]:
        """path -> type of the leaves of the argument `name`; `like` says which pytree it is."""
        if name not in self.f.arg_names:
            raise SpecError(f"{self.f.__name__}: it has no argument {name}; it has "
                            f"{', '.join(self.f.arg_names)}")
        return arg_types(self.lower(*(like if n == name else None for n in self.f.arg_names)), name)

    def _lower(self, dtypes: Mapping[str, str] | None = None) -> Program:
        likes = [self._likes.get(i) for i in range(len(self.f.arg_names))]
        program, self._results = lower_results(self.f, self.layout, self.runtime.mesh, self.sizes, likes,
                                               self.static, self.passes, dtypes)
        return program

    def _refuses(self, branch: Step | None) -> bool:
        """Whether `branch` keeps the program from being captured. SpecError where it was to be."""
        if branch and self.graph is True:
            raise SpecError('cond: a graph is recorded once and cannot branch on data; compile '
                            f'{self.program.name} with graph="auto", '
                            "which runs it eagerly").at(branch.where)
        return branch is not None

    def prepare(self, name: str, weights: Params | dict[str, Tensor], like: Params | None = None) -> Prepared:
        """The argument `name`, in the form in which this program runs fastest; pass it in place of `weights`.

        Weights that multiply the same activation are packed into one matrix. What is packed is copied: drop
        `weights`. Given as a dict path -> tensor (with `like`, the pytree they are of), it is emptied on the
        way, and no two copies are held at once. A stacked cache is held layer by layer; where it is donated,
        the call returns this very form of it.
        """
        program = self.lower(*((like or weights) if n == name else None for n in self.f.arg_names))
        return prepare(program, name, weights)

    def __call__(self, *args: Any, **named: Any) -> Any:
        if named:
            refuse_named(self.f, named)
        if any_autocast():
            with without_autocast():
                return self._run(args)
        return self._run(args)

    def _run(self, args: Sequence[Any]) -> Any:
        (run, results, lines), values = self._variant(args)
        try:
            leaves_made = run(*values)
        except Exception as error:
            explain_failure(error, lines)
            raise
        return results(leaves_made, args)

    def requests(self, *args: Any) -> Generator[tuple, Any, Any]:
        """The call as a generator of what it asks of groups, (group, method, operand, ...), each answered by
        what the group gives; it returns what the call does. See `beside`, which drives several."""
        with without_autocast():
            (run, results, lines), values = self._variant(args, yields=True)
        try:
            leaves_made = yield from run(*values)
        except Exception as error:
            explain_failure(error, lines)
            raise
        return results(leaves_made, args)

    def _variant(self, args: Sequence[Any], yields: bool = False) -> tuple[Variant, list[Any]]:
        """What runs the program for arguments like these, and its operands."""
        if self._apart and torch.is_grad_enabled():
            refuse_gradients(self.f.__name__, self._leaves(args))
        # shards of equal shapes may be of wholes of different sizes
        values, key = [], [yields, *self.sizes.items()]
        try:
            for a in args:
                if type(a) is Prepared:
                    values += a.flat
                    key.append(a.number)
                elif isinstance(a, Params):
                    values += (parts := flat(a))
                    key += [present(a), *[v.shape for v in parts], *[v.dtype for v in parts]]
                else:
                    values.append(a)
                    key += (a.shape, a.dtype)
        except (AttributeError, RuntimeError):         # no tensor, or one that says no shape
            self._check(args)
            raise
        key = tuple(key)
        variant = self._variants.get(key)
        if variant is None:
            variant = self._variants[key] = self._build(args, key, yields)
        return variant, values

    def check(self) -> None:
        """SpecError if an index was out of range in any call so far. It waits for the device; each call looks
        by itself as far as it can without waiting. On the CPU every call raises at once."""
        self._flags.check()

    def _check(self, args: Sequence[Any]) -> None:
        """SpecError unless `args` are what the function takes."""
        f = traced_function("compile", self.f)
        check_given(f, args)
        argument_trees(f, [None if isinstance(arg, Prepared) else arg for arg in args])
        check_tensors(f, self._leaves(args), stages=True)

    def _leaves(self, args: Sequence[Any]) -> Iterator[tuple[str, Any]]:
        """The tensors of the arguments, and what each is called."""
        for name, arg in zip(self.f.arg_names, args):
            yield from zip(arg.parts, arg.flat) if isinstance(arg, Prepared) else named_leaves(name, arg)

    def _build(self, args: Sequence[Any], key: tuple, yields: bool) -> Variant:
        self._check(args)
        program = self.lower(*(None if isinstance(a, Prepared) else a for a in args))
        given: dict[str, Any] = {}
        dtypes: dict[str, str] = {}
        plain = [(p, v) for (name, tree), arg in zip(program.args, args) if not isinstance(arg, Prepared)
                 for (p, _), v in zip(leaves(name, tree), flat_leaves(arg))]
        for arg in args:
            given.update(arg.shapes if isinstance(arg, Prepared) else {})
            dtypes.update(arg.dtypes if isinstance(arg, Prepared) else {})
        dtypes |= leaf_dtypes(plain)
        given.update((p, tuple(v.shape)) for p, v in plain)
        used = needed(program, self.runtime.coordinate)
        check_tensors(traced_function("compile", self.f), ((p, v) for p, v in plain if p in used))
        if missing := [p for p, _ in program.arg_leaves() if p not in given]:
            raise SpecError(f"{program.name} is called without "
                            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}")
        if isinstance(self.f, Gradients):
            self.f.check_dtypes(dtypes)
            program = self.program = self._lower(dtypes)
        mesh, rank = self.runtime.mesh, self.runtime.rank
        sizes = bind_sizes(program, given, self.sizes, mesh, mesh.coordinate(rank))
        value_dtypes(program, dtypes)
        self.kernels = Kernels(self.runtime, self.passes, sizes)
        self.runtime.compare_plans(
            program.name, _plan_text(program, mesh, sizes, dtypes) + self.kernels.plan)
        self.kernels.meet(program)
        e = Emitter(mesh, rank, sizes, yields, donate=self.donate, given=dtypes,
                    prepared=[a.name for a in args if isinstance(a, Prepared)], kernels=self.kernels)
        source = self.sources[key] = e.program(program)
        for a in args:
            if (isinstance(a, Prepared) and a.parts
                != (parts := tuple(p for p in e.arguments(program) if p.split(".")[0] == a.name))):
                raise SpecError(f"{program.name}: {a.name} was prepared for a program that packs it "
                                f"otherwise: {', '.join(a.parts)}, and here "
                                f"{', '.join(parts)}; prepare it with this one")
        self.runtime.create_groups(list(e.groups))
        groups = {name: self.runtime.group(axes) for axes, name in e.groups.items()}
        run = load(source, e.space(self.runtime.device), groups, program.name)
        lines = {run.__code__.co_filename: e.lines}
        run = torch.no_grad()(run) if isinstance(self.f, Gradients) else run
        if self._captures is not None and not yields:
            copied = [isinstance(a, Tensor) for a in args
                      for _ in (a.flat if isinstance(a, Prepared) else flat_leaves(a))]
            run = self._captures.around(program.name, _sizes_text(sizes), key, run, copied)
        return self._flags.around(run, e.index_sites()), self._finish(program, e.returned, args), lines

    def _finish(self, program: Program, returned: Sequence[str | None], args: Sequence[Any]) -> Callable:
        """What puts result leaves together.

        A prepared argument that is updated in place, all of it, is returned as it came.
        """
        prepared = {tuple(p for p, _ in leaves(*program.args[i])): i for i, a in enumerate(args)
                    if isinstance(a, Prepared)}
        parts, at = [], 0
        for result, like in zip(program.results, self._results, strict=True):
            here = slice(at, at := at + len(result.leaves()))
            parts.append((here, like, prepared.get(tuple(returned[here]))))
        if not prepared and not any(isinstance(like, (Params, type)) for like in self._results):
            return (lambda out, args: out) if len(parts) > 1 else lambda out, args: out[0]

        def finish(out: Sequence[Any], args: Sequence[Any]) -> Any:
            made = tuple(args[same] if same is not None else rebuild(tuple(map(whole, out[here])), (like,))
                         for here, like, same in parts)
            return made if len(made) > 1 else made[0]
        return finish


def _sizes_text(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{n}={size}" for n, size in sorted(sizes.items()))


def _plan_text(program: Program, mesh: Mesh, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> str:
    """What must be equal on all ranks that run a program together: all but each rank's own pieces."""
    return f"mesh {mesh}\nsizes {_sizes_text(sizes)}\ndtypes {' '.join(dtypes.values())}\n{program}"
