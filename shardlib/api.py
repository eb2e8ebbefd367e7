"""The functions one calls on a sharded function: lower, compile, and calling it."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, overload

import torch

from shardlib.compiler.grad import REGATHER
from shardlib.compiler.passes import DEFAULT, Pass
from shardlib.compiler.pipeline import Gradients, lower_results, traced_function
from shardlib.compiler.sizes import bind_sizes
from shardlib.distributed.runtime import Runtime, shared_runtime
from shardlib.dtypes import value_dtypes
from shardlib.errors import SpecError
from shardlib.language.arguments import argument_trees
from shardlib.language.calls import check_given, check_layout, check_static, check_tensors, refuse_named, what
from shardlib.language.trace import Function
from shardlib.language.value import tracing
from shardlib.layout import Layout
from shardlib.mesh import Mesh, check_sizes, current_mesh
from shardlib.params import flat_leaves, leaf_dtypes, named_leaves, rebuild
from shardlib.placement import arg_types, join, place, shard_of
from shardlib.program import Program
from shardlib.run.compiled import Compiled
from shardlib.run.prepared import Prepared
from shardlib.run.scheduled import Scheduled
from shardlib.run.simulate import simulate as simulate_ranks
from shardlib.run.simulate import simulate_schedule
from shardlib.run.step import run_steps
from shardlib.schedules.folding import TIME, Fold
from shardlib.schedules.schedule import Schedule
from shardlib.tree import leaves

__all__ = ["Compiled", "Prepared", "Sharded", "ValueAndGrad", "arg_types", "compile", "lower", "shard_of",
           "sharded", "simulate", "step", "value_and_grad"]


class Sharded(Function):
    """What `@sharded` makes. Called on tensors it compiles itself for the mesh in force, and runs."""

    def outside(self, args: Sequence[Any], static: dict[str, Any]) -> Any:
        return _compiled_here(self, static)(*args)


def _compiled_here(f: Sharded | ValueAndGrad, static: dict[str, Any]) -> Compiled:
    """`f` compiled for the mesh in force, once."""
    check_static(traced_function("call", f), static)
    cache = f.__dict__.setdefault("_compiled", {})
    # 2 is not 2.0
    key = (current_mesh(), *((name, static[name], repr(static[name])) for name in sorted(static)))
    try:
        hash(key)
    except TypeError as error:
        raise SpecError(f"{f.__name__}: a static argument cannot be hashed: {error}; compile the function "
                        "with it") from None
    if key not in cache:
        cache[key] = compile(f, mesh=current_mesh(), **static)
    return cache[key]


def sharded(signature: str, *, layout: Layout | None = None) -> Callable[[Callable], Sharded]:
    """Decorator: the function takes and returns tensors with the specs of `signature`.

    A spec for each argument, `*` for a pytree of `Params`; what comes after `*,` is static: plain Python,
    part of the program. A `layout` here wins over the caller's. Called on tensors it runs, on the mesh in
    force; called in another sharded function it becomes part of that.

    >>> @sharded("B D, D -> B D")
    ... def scaled(x, w, *, times):
    ...     for _ in range(times):
    ...         x = x * w
    ...     return x
    >>> scaled(torch.ones(1, 2), torch.tensor([2.0, 3.0]), times=3)
    tensor([[ 8., 27.]])
    >>> scaled(torch.ones(1, 2), torch.ones(3), times=1)                # doctest: +ELLIPSIS
    Traceback (most recent call last):
    shardlib.errors.SpecError: scaled: D is 2 by x, and 3 by w ...
    """
    if not isinstance(signature, str):
        raise SpecError(
            f'sharded: the signature is {what(signature)}; it is text, as in @sharded("B T D, D F -> B T F")')
    check_layout("sharded", layout)

    def decorate(fn: Callable) -> Sharded:
        if not inspect.isfunction(fn):
            raise SpecError(
                f'@sharded("{signature}"): what it decorates is {what(fn)}, not a Python function')
        return Sharded(fn, signature, layout)
    return decorate


def lower(f: Function | ValueAndGrad, layout: Layout | None = None, *args: Any, mesh: Mesh | None = None,
          sizes: Mapping[str, int] | None = None, passes: Sequence[Pass | str] = DEFAULT,
          dtypes: Mapping[str, str] | None = None, schedule: Schedule | None = None,
          **static: Any) -> Program:
    """The explicit program of `f` under `layout`: what every rank will do. `print` it to read it.

    >>> from shardlib import einsum
    >>> f = sharded("B D, D F -> B F")(lambda x, w: einsum("B D, D F -> B F", x, w))
    >>> lower(f, Layout(B="dp", D="dp"), mesh=Mesh(dp=8))               # FSDP: weights are gathered at use
    @sharded("B/dp D, D/dp F -> B/dp F", layout=EXPLICIT)
    def f(x, w):
        w2 = all_gather("D/dp F -> D F", w)
        v1 = einsum("B/dp D, D F -> B/dp F", x, w2)
        return v1

    `args`: instances of the pytrees that `f` takes, where an annotation does not say enough (an optional
    field that is absent).
    dtypes: of arguments by path; gradients of arguments of several dtypes need casts, which are written where
    these are known.
    schedule: the one that it is to run under: it is then typed as if stages and microbatches were ranks,
    along the axes `pp` and `mb`, and sums over microbatches come last.
    """
    whole, late = (current_mesh(mesh), ()) if schedule is None else (
        Fold(schedule, current_mesh(mesh)).whole, (TIME,))
    return lower_results(f, layout, whole, sizes, args, static, passes, dtypes, late)[0]


class ValueAndGrad(Gradients):
    """A sharded function of the same arguments that returns the value, then the gradients.

    Made by `value_and_grad`.
    """

    def __call__(self, *args: Any, **static: Any) -> Any:
        if tracing():
            raise SpecError(f"value_and_grad: the gradients of {self.f.__name__} are a program of their own, "
                            "and no part of another")
        return _compiled_here(self, static)(*args)


def value_and_grad(f: Function, wrt: str | Sequence[str] | None = None, *, regather: str = "all",
                   has_aux: bool = False, remat: str | Sequence[str] = ()) -> ValueAndGrad:
    """What computes the scalar `f` and its gradients: it takes what `f` takes, and returns the value, then a
    gradient for each argument that `wrt` names, in the order of `wrt`. A gradient has the spec and the dtype
    of its argument, the one by a pytree is a pytree of its class. By default `wrt` is all pytrees of `f`, in
    the order of its signature.

    >>> import torch
    >>> from torch import Tensor
    >>> from shardlib import Params, param, sharded
    >>> from shardlib.functions import sum
    >>> class Weights(Params):
    ...     a: Tensor = param("D")
    >>> @sharded("D, * -> ()")
    ... def loss(x, w: Weights):
    ...     return sum("D -> ()", 2 * x + 3 * w.a)
    >>> value, of_w, of_x = value_and_grad(loss, wrt=["w", "x"])(torch.ones(2), Weights(a=torch.ones(2)))
    >>> of_w, of_x
    (Weights(a=tensor([3., 3.])), tensor([2., 2.]))

    regather: what backward gathers again instead of keeping it: "all", "weights" or "nothing". More memory,
    fewer all_gathers.
    has_aux: `f` returns more behind its scalar: constants to the gradients, returned between value and
    gradients.
    remat: names of functions that a `scan` runs over layers: backward runs their layers again and keeps the
    carry of each alone, in place of what is made within.
    Refused: a name that is no argument, or comes twice; no name; a tensor of integers; an `f` that returns
    more than one scalar; a name in `remat` that is no body of a scan.
    """
    if not isinstance(f, Function):
        raise SpecError(f"value_and_grad: it takes a @sharded function, not {what(f)}")
    if regather not in REGATHER:
        raise SpecError(f"value_and_grad: regather is {regather!r}; it is one of {', '.join(REGATHER)}")
    if not isinstance(remat, str | Iterable) or not isinstance(has_aux, bool):
        raise SpecError(f"value_and_grad: has_aux is True or False, and remat names functions; they are "
                        f"{has_aux!r} and {remat!r}")
    if not isinstance(wrt, str | Iterable | None):
        raise SpecError(f"value_and_grad: wrt is {wrt!r}; it names arguments: {', '.join(f.arg_names)}")
    pytrees = [n for n, spec in zip(f.arg_names, f.ins) if spec is None]
    names = tuple(pytrees) if wrt is None else (wrt,) if isinstance(wrt, str) else tuple(wrt)
    unknown = next((n for n in names if n not in f.arg_names), None)
    twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
    wrong = (f"{f.__name__} has no argument {unknown}" if unknown is not None else f"wrt names {twice} twice"
             if twice else
             f"{f.__name__} takes no pytree, by which gradients are where wrt is not given" if wrt is None
             else "wrt is empty")
    if unknown is not None or twice or not names:
        raise SpecError(f"value_and_grad: {wrong}; the arguments are {', '.join(f.arg_names)}").at(
            f.definition)
    return ValueAndGrad(f, names, regather, has_aux, (remat,) if isinstance(remat, str) else tuple(remat))


def step(f: Function | ValueAndGrad, layout: Layout | None = None, *, mesh: Mesh | None = None,
         runtime: Runtime | None = None, sizes: Mapping[str, int] | None = None, **static: Any) -> Callable:
    """`f` op by op on this rank, for a debugger: a breakpoint in it sees types (`x.spec`) and this
    rank's tensors (`x.local`).

    Called like what `compile` makes: with shards, giving shards. Of a `value_and_grad`, its function runs op
    by op, after all of it has run compiled.

    >>> from shardlib import einsum
    >>> @sharded("B F, F D -> B D")
    ... def f(x, w):
    ...     y = einsum("B F, F D -> B D +tp", x, w)
    ...     print(f"x is {x.spec}, y is {y.spec}; here y is {y.local}")         # or breakpoint()
    ...     return y
    >>> step(f, Layout(F="tp"), mesh=Mesh(tp=1))(torch.ones(1, 3), torch.ones(3, 2))
    x is B F/tp, y is B D +tp; here y is tensor([[3., 3.]])
    tensor([[3., 3.]])
    """
    check_static(traced_function("step", f), static)
    check_layout("step", layout)
    check_sizes(sizes or {})
    there = runtime or shared_runtime(current_mesh(mesh))
    if not isinstance(f, ValueAndGrad):
        return _lines(f, layout or Layout(), there, sizes or {}, static)
    whole, lines = (compile(f, layout, runtime=there, sizes=sizes, **static),
                    step(f.f, layout, runtime=there, sizes=sizes, **static))
    return torch.no_grad()(lambda *args, **named: (whole(*args, **named), lines(*args))[0])


def _lines(f: Function, layout: Layout, runtime: Runtime, sizes: Mapping[str, int],
           static: dict[str, Any]) -> Callable:
    likes: dict[Any, Any] = {}

    def run(*args: Any, **named: Any) -> Any:
        refuse_named(f, named)
        return run_steps(f, layout, runtime, args, sizes, static, likes)
    return run


def simulate(f: Function | ValueAndGrad, layout: Layout | None, *args: Any, mesh: Mesh | None = None,
             sizes: Mapping[str, int] | None = None, log: list | None = None,
             schedule: Schedule | None = None, **static: Any) -> Any:
    """`f` on all ranks of a mesh in this process: takes whole tensors, gives whole tensors,
    and checks that replicas agree.

    sizes: of dims that no argument has, as in `zeros("B T")` where T is in no other value.
    log: receives (ranks, collective, elements) of everything that was communicated.

    >>> from shardlib.functions import sum
    >>> log, f = [], sharded("B D -> D")(lambda x: sum("B D -> D", x))
    >>> simulate(f, Layout(B="x"), torch.ones(5, 2), mesh=Mesh(x=2, y=2), log=log)
    tensor([5., 5.])
    >>> log
    [((0, 2), 'all_reduce', 2), ((1, 3), 'all_reduce', 2)]
    """
    mesh = current_mesh(mesh)
    traced = traced_function("simulate", f)
    check_given(traced, args)
    argument_trees(traced, args)
    named = {path: v for name, arg in zip(f.arg_names, args) for path, v in named_leaves(name, arg)}
    check_tensors(traced, named.items())
    dtypes = leaf_dtypes(named.items())
    if isinstance(f, Gradients):
        f.check_dtypes(dtypes)
    fold = None if schedule is None else Fold(schedule, mesh)
    program, results = lower_results(f, layout, fold.whole if fold else mesh, sizes, args, static, DEFAULT,
                                     dtypes, (TIME,) if fold else (), quiet=True)
    whole = {path: v for (name, tree), arg in zip(program.args, args, strict=True)
             for (path, _), v in zip(leaves(name, tree), flat_leaves(arg))}
    sizes = bind_sizes(program, {p: tuple(v.shape) for p, v in whole.items()}, sizes or {}, mesh, None)
    value_dtypes(program, leaf_dtypes(whole.items()))
    with torch.no_grad() if isinstance(f, ValueAndGrad) else nullcontext():
        if fold is not None:
            return rebuild(_under_schedule(program, fold, whole, sizes, log), results)
        placed = {path: place(whole[path], kind, sizes, mesh) for path, kind in program.arg_leaves()}
        outs = simulate_ranks(program, mesh, [{p: shards[r] for p, shards in placed.items()}
                                              for r in range(mesh.world_size)], sizes, log)
    joined = [join([out[str(i)] for out in outs], kind, sizes, mesh, tolerance=1e-4)
              for i, (_, kind) in enumerate(program.result_leaves())]
    return rebuild(joined, results)


def _under_schedule(program: Program, fold: Fold, whole: Mapping[str, torch.Tensor], sizes: Mapping[str, int],
                    log: list | None) -> list[torch.Tensor]:
    """The result leaves, whole, of whole argument leaves."""
    placed = {path: fold.place_all(whole[path], kind, sizes) for path, kind in program.arg_leaves()}
    outs = simulate_schedule(program, fold, [{path: shards[r] for path, shards in placed.items()}
                                             for r in range(fold.mesh.world_size)], sizes, log)
    return [fold.join_all([out[str(i)] for out in outs], kind, sizes)
            for i, (_, kind) in enumerate(program.result_leaves())]


@overload
def compile(f: Function | ValueAndGrad, layout: Layout | None = ..., *, mesh: Mesh | None = ...,
            runtime: Runtime | None = ..., sizes: Mapping[str, int] | None = ..., donate: Sequence[str] = ...,
            graph: bool | str = ..., passes: Sequence[Pass | str] = ..., schedule: None = ...,
            **static: Any) -> Compiled: ...
@overload
def compile(f: Function | ValueAndGrad, layout: Layout | None = ..., *, mesh: Mesh | None = ...,
            runtime: Runtime | None = ..., sizes: Mapping[str, int] | None = ...,
            passes: Sequence[Pass | str] = ..., schedule: Schedule, **static: Any) -> Scheduled: ...
def compile(f: Function | ValueAndGrad, layout: Layout | None = None, *, mesh: Mesh | None = None,
            runtime: Runtime | None = None,
            sizes: Mapping[str, int] | None = None, donate: Sequence[str] = (), graph: bool | str = False,
            passes: Sequence[Pass | str] = DEFAULT, schedule: Schedule | None = None,
            **static: Any) -> Compiled | Scheduled:
    """`f` for the ranks of a mesh: all of them call it, each with its shards, and get their shards.

    sizes:  global sizes of dims that no argument holds whole.
    donate: arguments whose buffers the results may reuse (a KV cache); the caller does not use them again.
    graph:  on GPUs each call is the replay of a CUDA graph, recorded on first use for its shapes (see
            `captured`); "auto" leaves out functions that cannot be recorded.
    passes: the rewrites of the compiled program, in order, by name or as functions.
    schedule: the order in which each rank goes through stages and microbatches; the layout says what these
            are pieces of, as in `B=("dp", "mb")`.

    On a mesh of one rank shards are whole tensors; elsewhere `shard_of` cuts them.

    >>> from shardlib.functions import silu
    >>> gated = sharded("B F, B F -> B F")(lambda gate, up: silu(gate) * up)
    >>> run = compile(gated, Layout(F="tp"), mesh=Mesh(tp=1))
    >>> run(torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 10.0]]))
    tensor([[0.0000, 7.3106]])
    """
    if graph not in (True, False, "auto"):
        raise SpecError(f'compile: graph is {graph!r}; it is True, False or "auto"')
    runtime = runtime or shared_runtime(current_mesh(mesh))
    if schedule is not None:
        if graph or donate:
            raise SpecError(f"compile: under a schedule there is no {'graph' if graph else 'donate'} yet")
        return Scheduled(f, layout, runtime, Fold(schedule, runtime.mesh), sizes or {}, static, passes)
    return Compiled(f, layout, runtime, sizes or {}, donate, static, graph, passes)
