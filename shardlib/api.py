"""The functions one calls on a sharded function: lower, compile, and calling it."""
from __future__ import annotations

import inspect
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from shardlib import testing
from shardlib.calls import check_count, check_layout, check_static, check_tensors, check_tree, refuse_named, what
from shardlib.captured import Captures, conditional
from shardlib.complete import complete
from shardlib.distributed.runtime import Runtime, shared_runtime
from shardlib.dtypes import value_dtypes
from shardlib.emit import Emitter, load
from shardlib.errors import SpecError
from shardlib.failures import Lines, explain_failure
from shardlib.grad import REGATHER, value_and_grad_program
from shardlib.index_check import IndexFlags
from shardlib.layout import Layout
from shardlib.mesh import Mesh, check_sizes, current_mesh
from shardlib.passes import DEFAULT, rewrite
from shardlib.pack import pack, packings
from shardlib.params import Params, fill, flat, leaf_values, present, unflat
from shardlib.program import Program, Scan, Step, leaves
from shardlib.scan import SCAN
from shardlib.simulate import simulate as simulate_ranks
from shardlib.sizes import bind_sizes
from shardlib.spec import Spec
from shardlib.step import run_steps
from shardlib.surroundings import any_autocast, refuse_gradients, without_autocast
from shardlib.trace import Function, argument_trees, trace_results, tracing


class Sharded(Function):
    """What `@sharded` makes. Called on tensors it compiles itself for the mesh in force, and runs."""

    def outside(self, args: Sequence[Any], static: dict[str, Any]) -> Any:
        return _compiled_here(self, static)(*args)


def _compiled_here(f: Sharded | ValueAndGrad, static: dict[str, Any]) -> Compiled:
    """`f` compiled for the mesh in force, once."""
    check_static(_traced("call", f), static)
    cache = f.__dict__.setdefault("_compiled", {})
    key = (current_mesh(), *((name, static[name], repr(static[name])) for name in sorted(static)))      # 2 is not 2.0
    try:
        hash(key)
    except TypeError as error:
        raise SpecError(f"{f.__name__}: a static argument cannot be hashed: {error}; compile the function with it") from None
    if key not in cache:
        cache[key] = compile(f, mesh=current_mesh(), **static)
    return cache[key]


def sharded(signature: str, *, layout: Layout | None = None) -> Callable[[Callable], Sharded]:
    """Decorator: the function takes and returns tensors with the specs of `signature`. A `layout` here wins over the caller's."""
    if not isinstance(signature, str):
        raise SpecError(f'sharded: the signature is {what(signature)}; it is text, as in @sharded("B T D, D F -> B T F")')
    check_layout("sharded", layout)

    def decorate(fn: Callable) -> Sharded:
        if not inspect.isfunction(fn):
            raise SpecError(f'@sharded("{signature}"): what it decorates is {what(fn)}, not a Python function')
        return Sharded(fn, signature, layout)
    return decorate


def lower(f: Function | ValueAndGrad, layout: Layout | None = None, *args: Any, mesh: Mesh | None = None,
          sizes: Mapping[str, int] | None = None, passes: Sequence[str] = DEFAULT, dtypes: Mapping[str, str] | None = None,
          **static: Any) -> Program:
    """The explicit program of `f` under `layout`: what every rank will do. `print` it to read it.

    `args`: instances of the pytrees that `f` takes, where an annotation does not say enough (an optional field that is absent).
    dtypes: of arguments by path; gradients of arguments of several dtypes need casts, which are written where these are known.
    """
    return _lower(f, layout, current_mesh(mesh), sizes, args, static, passes, dtypes)[0]


def _lower(f: Function, layout: Layout | None, mesh: Mesh, sizes: Mapping[str, int] | None, args: Sequence[Any],
           static: Mapping[str, Any], passes: Sequence[str] = DEFAULT,
           dtypes: Mapping[str, str] | None = None) -> tuple[Program, tuple[Any, ...]]:
    _traced("lower", f)
    check_layout("lower", layout)
    check_sizes(sizes or {})
    if isinstance(f, ValueAndGrad):
        program, results = _lower(f.f, layout, mesh, sizes, args, static, passes)
        hints = f.f.hints()
        like = dict(zip(f.arg_names, [*args, *[None] * len(f.arg_names)]))
        grads = tuple(like[n] if isinstance(like.get(n), Params) else hints.get(n) if isinstance(hints.get(n), type) and issubclass(hints[n], Params)
                      else None for n in f.wrt)
        return rewrite(value_and_grad_program(program, f.wrt, mesh, f.regather, dtypes), mesh, passes), (*results, *grads)
    traced, results = trace_results(f, args, dict(static))
    program = complete(traced, f.layout if f.layout is not None else layout or Layout(), mesh, sizes)
    return rewrite(program, mesh, passes), results


def _traced(who: str, f: Any) -> Function:
    """The function that is traced for `f`. SpecError where there is none."""
    if not isinstance(f, (Function, ValueAndGrad)):
        raise SpecError(f"{who}: it takes a @sharded function, not {what(f)}")
    return f.f if isinstance(f, ValueAndGrad) else f


def _check_arguments(f: Function, args: Sequence[Any]) -> None:
    """SpecError unless `f` takes as many arguments, and pytrees where these are."""
    check_count(f, args)
    for name, spec, arg in zip(f.arg_names, f.ins, args):
        if arg is None and spec is None:
            check_tree(f, name, arg, f.hints().get(name))
    argument_trees(f, [None if isinstance(arg, Prepared) else arg for arg in args])


class ValueAndGrad:
    """A sharded function of the same arguments that returns the value, then the gradients. Made by `value_and_grad`."""

    def __init__(self, f: Function, wrt: tuple[str, ...], regather: str) -> None:
        self.f, self.wrt, self.regather = f, wrt, regather
        self.__name__, self.layout, self.arg_names = f"{f.__name__}_and_grad", f.layout, f.arg_names

    def __call__(self, *args: Any, **static: Any) -> Any:
        if tracing():
            raise SpecError(f"value_and_grad: the gradients of {self.f.__name__} are a program of their own, and no part of another")
        return _compiled_here(self, static)(*args)

    def check_dtypes(self, dtypes: Mapping[str, str]) -> None:
        """SpecError where a gradient is wanted by a tensor that is not of floating point. `dtypes`: of the arguments' leaves, by path."""
        wrong = next((path for path, kind in dtypes.items() if path.split(".")[0] in self.wrt and not getattr(torch, kind).is_floating_point), None)
        if wrong:
            raise SpecError(f"value_and_grad: {wrong} is {dtypes[wrong]}; only floating-point tensors have gradients").at(self.f.definition)


def value_and_grad(f: Function, wrt: str | Sequence[str] | None = None, *, regather: str = "all") -> ValueAndGrad:
    """What computes the scalar `f` and its gradients: it takes what `f` takes, and returns the value, then a gradient for each
    argument that `wrt` names, in the order of `wrt`. A gradient has the spec and the dtype of its argument, the one by a pytree is
    a pytree of its class. By default `wrt` is all pytrees of `f`, in the order of its signature.

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

    regather: what backward gathers again instead of keeping it: "all", "weights" or "nothing". More memory, fewer all_gathers.
    Refused: a name that is no argument, or comes twice; no name; a tensor of integers; an `f` that returns more than one scalar.
    """
    if not isinstance(f, Function):
        raise SpecError(f"value_and_grad: it takes a @sharded function, not {what(f)}")
    if regather not in REGATHER:
        raise SpecError(f"value_and_grad: regather is {regather!r}; it is one of {', '.join(REGATHER)}")
    if not isinstance(wrt, str | Iterable | None):
        raise SpecError(f"value_and_grad: wrt is {wrt!r}; it names arguments: {', '.join(f.arg_names)}")
    pytrees = [n for n, spec in zip(f.arg_names, f.ins) if spec is None]
    names = tuple(pytrees) if wrt is None else (wrt,) if isinstance(wrt, str) else tuple(wrt)
    unknown = next((n for n in names if n not in f.arg_names), None)
    twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
    wrong = (f"{f.__name__} has no argument {unknown}" if unknown is not None else f"wrt names {twice} twice" if twice else
             f"{f.__name__} takes no pytree, by which gradients are where wrt is not given" if wrt is None else "wrt is empty")
    if unknown is not None or twice or not names:
        raise SpecError(f"value_and_grad: {wrong}; the arguments are {', '.join(f.arg_names)}").at(f.definition)
    return ValueAndGrad(f, names, regather)


class Compiled:
    """A program as each rank runs it: called with this rank's shards, it returns this rank's shards.

    One plain Python function is made for every set of argument shapes, and kept.
    """

    def __init__(self, f: Function, layout: Layout | None, runtime: Runtime, sizes: Mapping[str, int], donate: Sequence[str],
                 static: Mapping[str, Any], graph: bool | str = False) -> None:
        check_static(_traced("compile", f), static)
        check_layout("compile", layout)
        check_sizes(sizes)
        if unknown := next((n for n in ((donate,) if isinstance(donate, str) else donate) if n not in f.arg_names), None):
            raise SpecError(f"compile: donate names {unknown}, which is no argument of {f.__name__}; it has {', '.join(f.arg_names)}")
        self.f, self.layout, self.runtime, self.sizes = f, layout, runtime, dict(sizes)
        self.donate, self.static = (donate,) if isinstance(donate, str) else tuple(donate), dict(static)
        self.program: Program | None = None
        self.sources: dict[tuple, str] = {}
        self.graph, self._captures = graph, None
        self._variants: dict[tuple, tuple[Callable, Callable, Lines]] = {}
        self._results: tuple[Any, ...] = ()
        self._flags = IndexFlags(runtime.device, lambda error: runtime.end_others(error))
        self._likes: dict[int, Params] = {}         # argument -> a pytree like the one it takes
        self._apart = runtime.mesh.world_size > 1 and not isinstance(f, ValueAndGrad)       # torch.autograd would miss other ranks

    def at(self, **sizes: int) -> Compiled:
        """The same where dims have these global sizes; what has been made for some of them is made for all."""
        made = copy(self)
        made.sizes, made._likes = {**self.sizes, **sizes}, dict(self._likes)
        return made

    def lower(self, *args: Any) -> Program:
        """The explicit program; `args` say which pytrees it takes, as for `lower`. What an earlier call has said need not be said again;
        where this one says otherwise, it is the program of this one."""
        news = {i: a for i, a in enumerate(args) if isinstance(a, Params) and (i not in self._likes or present(a) != present(self._likes[i]))}
        if self.program is None or news:
            self._likes |= news
            self.program = self._lower()
            self._captures = Captures(self.runtime) if self.graph and not self._refuses(conditional(self.program)) else None
        return self.program

    def _lower(self, dtypes: Mapping[str, str] | None = None) -> Program:
        likes = [self._likes.get(i) for i in range(len(self.f.arg_names))]
        program, self._results = _lower(self.f, self.layout, self.runtime.mesh, self.sizes, likes, self.static, dtypes=dtypes)
        return program

    def _refuses(self, branch: Step | None) -> bool:
        """Whether `branch` keeps the program from being captured. SpecError where it was to be."""
        if branch and self.graph is True:
            raise SpecError(f'cond: a graph is recorded once and cannot branch on data; compile {self.program.name} with graph="auto", '
                            "which runs it eagerly").at(branch.where)
        return branch is not None

    def prepare(self, name: str, weights: Params | dict[str, Tensor], like: Params | None = None) -> Prepared:
        """The argument `name`, in the form in which this program runs fastest; pass it in place of `weights`.

        Weights that multiply the same activation are packed into one matrix. What is packed is copied: drop `weights`. Given as
        a dict path -> tensor (with `like`, the pytree they are of), it is emptied on the way, and no two copies are held at once.
        A stacked cache is held layer by layer; where it is donated, the call returns this very form of it.
        """
        program = self.lower(*((like or weights) if n == name else None for n in self.f.arg_names))
        given = weights if isinstance(weights, dict) else dict(leaf_values(weights, name))
        paths = list(arg_types(program, name))
        if set(paths) != set(given):
            raise SpecError(f"prepare: {name} has the leaves {', '.join(paths)}; given are {', '.join(given)}")
        leaves = {p: given.pop(p) for p in paths}
        shapes = {p: tuple(v.shape) for p, v in leaves.items()}
        dtypes = _dtypes(leaves.items())
        groups = packings(program, {name}, dtypes)
        packed = {path: group for group in groups for path in group.outer_paths}
        scanned = {n for s in program.steps if s.op is SCAN for _, n in Scan.of(s).stacked}
        made = {packed[p].name if p in packed else p: () for p in leaves}
        for key in made:
            group = next((g for g in groups if g.name == key), None)
            if group:
                made[key] = pack(group, leaves)
            else:
                leaf = leaves.pop(key)
                made[key] = leaf.unbind(0) if key in scanned else leaf
        return Prepared(name, tuple(made.values()), shapes, dtypes, tuple(made), _number_of((name, *made, *shapes.items(), *dtypes.items())))

    def __call__(self, *args: Any, **named: Any) -> Any:
        if named:
            refuse_named(self.f, named)
        if any_autocast():
            with without_autocast():
                return self._run(args)
        return self._run(args)

    def _run(self, args: Sequence[Any]) -> Any:
        if self._apart and torch.is_grad_enabled():
            refuse_gradients(self.f.__name__, self._leaves(args))
        values, key = [], [*self.sizes.items()]         # shards of equal shapes may be of wholes of different sizes
        try:
            for a in args:
                if type(a) is Prepared:
                    values += a.flat
                    key.append(a.number)
                else:
                    leaves_of = flat(a) if isinstance(a, Params) else (a,)
                    values += leaves_of
                    key += [v.shape for v in leaves_of]
                    if isinstance(a, Params):
                        key.append(present(a))
                    key += [v.dtype for v in leaves_of]
        except AttributeError:
            self._check(args)
            raise
        key = tuple(key)
        variant = self._variants.get(key)
        if variant is None:
            variant = self._variants[key] = self._build(args, key)
        run, results, lines = variant
        try:
            leaves_made = run(*values)
        except Exception as error:
            explain_failure(error, lines)
            raise
        return results(leaves_made, args)

    def check(self) -> None:
        """SpecError if an index was out of range in any call so far. It waits for the device; each call looks by itself as far as it can
        without waiting. On the CPU every call raises at once."""
        self._flags.check()

    def _check(self, args: Sequence[Any]) -> None:
        """SpecError unless `args` are what the function takes."""
        _check_arguments(f := _traced("compile", self.f), args)
        check_tensors(f, self._leaves(args))

    def _leaves(self, args: Sequence[Any]) -> Iterator[tuple[str, Any]]:
        """The tensors of the arguments, and what each is called."""
        for name, arg in zip(self.f.arg_names, args):
            yield from zip(arg.parts, arg.flat) if isinstance(arg, Prepared) else _named(name, arg)

    def _build(self, args: Sequence[Any], key: tuple) -> tuple[Callable, Callable, Lines]:
        """What runs the program for arguments like these, what makes its results of the leaves that this returns, and what its lines are."""
        self._check(args)
        program = self.lower(*(None if isinstance(a, Prepared) else a for a in args))
        given: dict[str, Any] = {}
        dtypes: dict[str, str] = {}
        plain = [(p, v) for (name, tree), arg in zip(program.args, args) if not isinstance(arg, Prepared)
                 for (p, _), v in zip(leaves(name, tree), _flat(arg))]
        for arg in args:
            given.update(arg.shapes if isinstance(arg, Prepared) else {})
            dtypes.update(arg.dtypes if isinstance(arg, Prepared) else {})
        dtypes |= _dtypes(plain)
        given.update((p, tuple(v.shape)) for p, v in plain)
        if missing := [p for p, _ in program.arg_leaves() if p not in given]:
            raise SpecError(f"{program.name} is called without {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}")
        if isinstance(self.f, ValueAndGrad):
            self.f.check_dtypes(dtypes)
            program = self.program = self._lower(dtypes)
        mesh, rank = self.runtime.mesh, self.runtime.rank
        sizes = bind_sizes(program, given, self.sizes, mesh, mesh.coordinate(rank))
        e = Emitter(mesh, rank, sizes, donate=self.donate, given=dtypes, prepared=[a.name for a in args if isinstance(a, Prepared)])
        value_dtypes(program, dtypes)
        self.runtime.compare_plans(program.name, _plan_text(program, mesh, sizes, dtypes))
        source = self.sources[key] = e.program(program)
        for a in args:
            if isinstance(a, Prepared) and a.parts != (parts := tuple(p for p in e.arguments(program) if p.split(".")[0] == a.name)):
                raise SpecError(f"{program.name}: {a.name} was prepared for a program that packs it otherwise: {', '.join(a.parts)}, "
                                f"and here {', '.join(parts)}; prepare it with this one")
        self.runtime.create_groups(list(e.groups))
        groups = {name: self.runtime.group(axes) for axes, name in e.groups.items()}
        run = load(source, e.space(self.runtime.device), groups, program.name)
        lines = {run.__code__.co_filename: e.lines}
        run = torch.no_grad()(run) if isinstance(self.f, ValueAndGrad) else run
        if self._captures is not None:
            copied = [isinstance(a, Tensor) for a in args for _ in (a.flat if isinstance(a, Prepared) else _flat(a))]
            run = self._captures.around(program.name, _sizes_text(sizes), key, run, copied)
        return self._flags.around(run, e.index_sites()), self._finish(program, e.returned, args), lines

    def _finish(self, program: Program, returned: Sequence[str | None], args: Sequence[Any]) -> Callable:
        """What puts result leaves together. A prepared argument that is updated in place, all of it, is returned as it came."""
        prepared = {tuple(p for p, _ in leaves(*program.args[i])): i for i, a in enumerate(args) if isinstance(a, Prepared)}
        parts, at = [], 0
        for result, like in zip(program.results, self._results, strict=True):
            here = slice(at, at := at + len(result.leaves()))
            parts.append((here, like, prepared.get(tuple(returned[here]))))
        if not prepared and not any(isinstance(like, (Params, type)) for like in self._results):
            return (lambda out, args: out) if len(parts) > 1 else lambda out, args: out[0]

        def finish(out: Sequence[Any], args: Sequence[Any]) -> Any:
            made = tuple(args[same] if same is not None else _rebuild(tuple(map(_whole, out[here])), (like,)) for here, like, same in parts)
            return made if len(made) > 1 else made[0]
        return finish


def _sizes_text(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{n}={size}" for n, size in sorted(sizes.items()))


def _plan_text(program: Program, mesh: Mesh, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> str:
    """What must be equal on all ranks that run a program together: all but each rank's own pieces."""
    return f"mesh {mesh}\nsizes {_sizes_text(sizes)}\ndtypes {' '.join(dtypes.values())}\n{program}"


def step(f: Function | ValueAndGrad, layout: Layout | None = None, *, mesh: Mesh | None = None, runtime: Runtime | None = None,
         sizes: Mapping[str, int] | None = None, **static: Any) -> Callable:
    """`f` op by op on this rank, for a debugger: a breakpoint in it sees types (`x.spec`) and this rank's tensors (`x.local`).

    Called like what `compile` makes: with shards, giving shards. Of a `value_and_grad`, its function runs op by op, after all of it has run compiled.
    """
    check_static(_traced("step", f), static)
    check_layout("step", layout)
    check_sizes(sizes or {})
    there, recipes = runtime or shared_runtime(current_mesh(mesh)), {}
    if not isinstance(f, ValueAndGrad):
        return lambda *args, **named: refuse_named(f, named) or run_steps(f, layout or Layout(), there, args, sizes or {}, static, recipes)
    whole, lines = compile(f, layout, runtime=there, sizes=sizes, **static), step(f.f, layout, runtime=there, sizes=sizes, **static)
    return torch.no_grad()(lambda *args, **named: (whole(*args, **named), lines(*args))[0])


def simulate(f: Function | ValueAndGrad, layout: Layout | None, *args: Any, mesh: Mesh | None = None, log: list | None = None, **static: Any) -> Any:
    """`f` on all ranks of a mesh in this process: takes whole tensors, gives whole tensors, and checks that replicas agree.

    `log` receives (ranks, collective, elements) of everything that was communicated.
    """
    mesh = current_mesh(mesh)
    _check_arguments(_traced("simulate", f), args)
    named = {path: v for name, arg in zip(f.arg_names, args) for path, v in _named(name, arg)}
    check_tensors(_traced("simulate", f), named.items())
    if isinstance(f, ValueAndGrad):
        f.check_dtypes(_dtypes(named.items()))
    program, results = _lower(f, layout, mesh, None, args, static, dtypes=_dtypes(named.items()))
    whole = {path: v for (name, tree), arg in zip(program.args, args, strict=True) for (path, _), v in zip(leaves(name, tree), _flat(arg))}
    sizes = bind_sizes(program, {p: tuple(v.shape) for p, v in whole.items()}, {}, mesh, None)
    value_dtypes(program, _dtypes(whole.items()))
    placed = {path: testing.place(whole[path], kind, sizes, mesh) for path, kind in program.arg_leaves()}
    with torch.no_grad() if isinstance(f, ValueAndGrad) else nullcontext():
        outs = simulate_ranks(program, mesh, [{p: shards[r] for p, shards in placed.items()} for r in range(mesh.world_size)], sizes, log)
    joined = [testing.join([out[str(i)] for out in outs], kind, sizes, mesh, tolerance=1e-4) for i, (_, kind) in enumerate(program.result_leaves())]
    return _rebuild(joined, results)


def _dtypes(leaves: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    return {path: str(v.dtype).removeprefix("torch.") for path, v in leaves}


def _rebuild(flat: Sequence[Tensor], results: Sequence[Any]) -> Any:
    """Leaves put back into the pytrees that the function returned."""
    it = iter(flat)
    made = tuple(unflat(r, it) if isinstance(r, Params) else fill(r, "", lambda _: next(it)) if isinstance(r, type) else next(it) for r in results)
    return made if len(made) > 1 else made[0]


@dataclass(frozen=True)
class Prepared:
    """A pytree argument as `Compiled.prepare` made it.

    flat: its leaves; stacked ones as a tuple of layers.  shapes, dtypes: of the leaves it was made from, by path.
    parts: what each of `flat` is: a path, or the paths that are packed in it.
    number: equal for arguments of one name, equal parts, dtypes and shapes.
    """
    name: str
    flat: tuple[Any, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    parts: tuple[str, ...]
    number: int


_NUMBERS: dict[tuple, int] = {}


def _number_of(kind: tuple) -> int:
    return _NUMBERS.setdefault(kind, len(_NUMBERS))


def _whole(leaf: Any) -> Tensor:
    return leaf if isinstance(leaf, Tensor) else torch.stack(leaf)


def _named(name: str, arg: Any) -> Iterable[tuple[str, Any]]:
    return leaf_values(arg, name) if isinstance(arg, Params) else [(name, arg)]


def _flat(arg: Any) -> list[Any]:
    return flat(arg) if isinstance(arg, Params) else [arg]


def compile(f: Function | ValueAndGrad, layout: Layout | None = None, *, mesh: Mesh | None = None, runtime: Runtime | None = None,    # noqa: A001
            sizes: Mapping[str, int] | None = None, donate: Sequence[str] = (), graph: bool | str = False, **static: Any) -> Compiled:
    """`f` for the ranks of a mesh. `sizes`: global sizes of dims that no argument holds whole. `donate`: arguments whose
    buffers the results may reuse (a KV cache); the caller does not use them again. `graph=True`: on GPUs each call is the replay of a
    CUDA graph, recorded on first use for its shapes (see `captured`); "auto" leaves out functions that cannot be recorded."""
    if graph not in (True, False, "auto"):
        raise SpecError(f'compile: graph is {graph!r}; it is True, False or "auto"')
    runtime = runtime or shared_runtime(current_mesh(mesh))
    return Compiled(f, layout, runtime, sizes or {}, donate, static, graph)


def arg_types(program: Program, name: str) -> dict[str, Spec]:
    """path -> type of the leaves of the argument `name`."""
    return dict(leaves(name, dict(program.args)[name]))


def shard_of(x: Tensor, kind: Spec, mesh: Mesh, coordinate: Mapping[str, int]) -> Tensor:
    """The piece of the global tensor `x` that `coordinate` holds as type `kind` (nothing owed)."""
    for i, dim in enumerate(kind.dims):
        if dim.axes:
            if len(dim.factors) > 1:
                raise SpecError(f"shard_of: {dim} is a group; take it apart first")
            start, size = mesh.extent(x.shape[i], dim.axes, coordinate)
            x = x.narrow(i, start, size)
    return x
