"""Every dim name has one size in a whole program: random chains of renames, rearranges and scans
against plain torch, from whatever binds them, and every contradiction."""
from __future__ import annotations

import linecache
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardlib import (
    EXPLICIT,
    Layout,
    Mesh,
    Params,
    SpecError,
    compile,
    cond,
    explain,
    lower,
    param,
    prove,
    rearrange,
    rename,
    scan,
    sharded,
    simulate,
    stacked,
    step,
    value_and_grad,
)
from shardlib.compiler.parser import parse_program
from shardlib.compiler.sizes import bind_sizes
from shardlib.functions import argmax, greater, max, mean, square, sum
from shardlib.ops import take

pytestmark = pytest.mark.usefixtures("one_thread")


def said(run: Callable, *args, **kwargs) -> str:
    """The first line of the error, without the line that it ends with;
    "at the rename" where it names a line that has one."""
    with pytest.raises(SpecError) as error:
        run(*args, **kwargs)
    first = str(error.value).split("\n")[0].split("          ")[0]
    return re.sub(r"at test_sizes.py:(\d+)", lambda m: "at "
                  f"{'the rename' if 'rename(' in linecache.getline(__file__, int(m[1])) else m[1]}", first)


# -- the issue's own -----------------------------------------------------------------------------------------

@sharded("B Y X D -> B D")
def pool(x):
    return mean("B N D -> B D", rename("B (Y X) D -> B N D", rearrange("B Y X D -> B (Y X) D", x)))


@sharded("B T D, B S D -> B D")
def beside(x, other):
    return mean("B S D -> B D", rename("B T D -> B S D", x)) + 0 * sum("B S D -> B D", other)


@pytest.mark.parametrize("layout",
                         (Layout(), Layout(N="tp"), Layout(Y="tp"), Layout(X="tp", Y="tp"), Layout(D="tp")))
def test_a_group_is_renamed_to_the_product_of_its_factors(layout):
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    assert torch.allclose(simulate(pool, layout, x, mesh=Mesh(tp=2)), x.mean((1, 2)), rtol=1e-12)


@pytest.mark.parametrize("run", (
    lambda x, y: simulate(beside, Layout(), x, y, mesh=Mesh(tp=2)), lambda x, y: compile(beside)(x, y),
    lambda x, y: step(beside)(x, y)))
def test_a_rename_that_contradicts_an_argument(run):
    x, other = torch.rand(2, 5, 3), torch.rand(2, 8, 3)
    assert said(run, x, other) == (
        'beside: S is 8 by other, and 5 by rename "B T D -> B S D" at the rename, since T is 5 by x')
    assert run(x, torch.rand(2, 5, 3)).shape == (2, 3)


# -- every pair of binders -----------------------------------------------------------------------------------

class Cells(Params):
    u: Tensor = param("N D")


class Stack(Params):
    layers: Cells = stacked("L", Cells)


@sharded("B Y X D, * -> B Y X D")
def cell(x, w: Cells):
    y = rename("B (Y X) D -> B N D", rearrange("B Y X D -> B (Y X) D", x)) * w.u
    return rearrange("B (Y X) D -> B Y X D", rename("B N D -> B (Y X) D", y))


@sharded("B Y X D, * -> B Y X D")
def net(x, w: Stack):
    return scan(cell, x, w.layers)


@sharded("B T -> B")
def long(x):
    return sum("B S -> B", rename("B T -> B S", x))


@sharded("B T -> B")
def short(x):
    return sum("B T -> B", x)


@sharded("B T, B S -> B")
def chosen(x, y):
    return cond(greater(sum("B T -> ()", x), than=0.0), long, short, x) + sum("B S -> B", y)


@sharded("B (K G), K -> B K G")
def apart(x, k):
    return rearrange("B (K G) -> B K G", x) * k


@sharded("B 4, B K -> B K")
def constant(x, y):
    return rename("B 4 -> B K", x) + y


def test_a_rename_in_the_body_of_a_scan_binds_the_program():
    x = torch.rand(2, 3, 4, 5)
    w = Stack(layers=Cells(u=torch.rand(2, 12, 5)))
    want = x * w.layers.u[0].view(3, 4, 5) * w.layers.u[1].view(3, 4, 5)
    for layout in (Layout(), Layout(Y="tp"), Layout(N="tp"), Layout(N="tp", Y="tp"), Layout(X="tp")):
        assert torch.allclose(simulate(net, layout, x, w, mesh=Mesh(tp=2)), want, rtol=1e-6)
    wrong = Stack(layers=Cells(u=torch.rand(2, 11, 5)))
    assert said(net, x, wrong) == (
        'net: N is 11 by w.layers.u, and 12 by rename "B (Y X) D -> B N D" at the rename, since Y is 3 by x '
        'and X is 4 by x')


def test_a_rename_in_a_branch_binds_the_program():
    x = torch.rand(2, 5)
    assert torch.allclose(chosen(x, x), 2 * x.sum(1))
    assert said(chosen, x, torch.rand(2, 6)) == (
        'chosen: S is 6 by y, and 5 by rename "B T -> B S" at the rename, since T is 5 by x')


def test_a_group_that_an_argument_holds():
    x, k = torch.rand(2, 12), torch.rand(3)
    assert torch.allclose(apart(x, k), x.view(2, 3, 4) * k[:, None])
    assert said(apart, x, torch.rand(5)) == (
        "apart: there are 12 rows by x, since K is 5 by k; no G makes (K G) of it")
    run = compile(apart, sizes=dict(G=3))
    assert said(run, x, k) == "apart: (K G) is 9, since K is 3 by k and G is 3 by sizes, and 12 by x"


def test_a_group_whose_factors_nobody_says():
    @sharded("B (K G) -> B")
    def total(x):
        return sum("B (K G) -> B", x)
    assert said(total, torch.rand(2, 12)) == (
        "total: x holds (K G) as one dim; say the size of K: sizes=dict(K=...)")
    assert compile(total, sizes=dict(K=3))(torch.ones(2, 12)).tolist() == [12, 12]


def test_a_constant_dim():
    x = torch.rand(2, 4)
    for layout in (Layout(), Layout(K="tp")):
        assert torch.allclose(simulate(constant, layout, x, x, mesh=Mesh(tp=3)), 2 * x)
    assert said(constant, x, torch.rand(2, 5)) == (
        'constant: K is 5 by y, and 4 by rename "B 4 -> B K" at the rename')
    assert said(constant, torch.rand(2, 5), x) == "constant: x has 5 rows where its spec B 4 says 4"
    other = sharded("B 4 -> B 5")(lambda x: rename("B 4 -> B 5", x))
    for call in (other, lambda x: simulate(other, Layout(B="tp"), x, mesh=Mesh(tp=2))):
        assert said(call, x) == 'f: 4 is 4, and 5 by rename "B 4 -> B 5" at the rename'


def test_sizes_that_a_program_is_asked_about():
    """`explain` and `prove` take what follows by a rename, and refuse what contradicts it."""
    @sharded("B T D -> B S/1 D")
    def named(x):
        return rename("B T D -> B S D", x)
    mesh = Mesh(tp=2)
    program = lower(named, Layout(S="tp"), mesh=mesh)
    assert (explain(program, mesh, dict(B=2, T=5, D=3)).bytes
            == explain(program, mesh, dict(B=2, T=5, D=3, S=5)).bytes > 0)
    for ask in (explain, prove):
        assert said(ask, program, mesh, dict(B=2, T=5, D=3, S=6)) == (
            'named: S is 6 by sizes, and 5 by rename "B T D -> B S D" at the rename, since T is 5 by sizes')


# -- the type of a renamed group -----------------------------------------------------------------------------

def test_explicit_text_cannot_relabel_the_pieces_of_a_group():
    def program(text: str):
        return sharded(text, layout=EXPLICIT)(lambda x: rename(text, x))
    assert said(lower, program("B (K/tp G) -> B N/tp"), mesh=Mesh(tp=2)) == (
        "rename: (K/tp G) is split over tp; its pieces are not those of N")
    assert said(lower, program("B N/tp -> B (K/tp G)"), mesh=Mesh(tp=2)) == (
        "rename: N/tp is split over tp; its pieces are not those of (K G)")
    assert str(lower(program("B (K/tp G) -> B (M/tp N)"), mesh=Mesh(tp=2)).results[0].tree) == "B (M/tp N)"


def test_explicit_text_is_given_no_gather_by_a_rename():
    @sharded("T/tp D -> S D", layout=EXPLICIT)
    def f(x):
        return rename("T D -> S D", x)
    assert said(lower, f, mesh=Mesh(tp=2)) == 'rename: x has T split over tp; the text takes "T D"'


# -- random chains -------------------------------------------------------------------------------------------

Steps = list[tuple[str, str]]
"""Renames and rearranges: the op, and its text."""


@dataclass
class Chain:
    """A random program of renames, rearranges and a scan of such, and what it means.

    dims: of the value so far, each a tuple of names.
    """
    sizes: dict[str, int]
    dims: list[tuple[str, ...]]
    first: str = ""                 # the specs of x, of the scan's carry, and of one layer
    carry: str = ""
    layer: str = ""
    before: Steps = field(default_factory=list)
    inner: Steps | None = None      # of the scan's body, which then multiplies by its layer, and goes back
    after: Steps = field(default_factory=list)

    @staticmethod
    def spec(dims) -> str:
        return " ".join(d[0] if len(d) == 1 else f"({' '.join(d)})" for d in dims)

    @property
    def stack(self) -> str:
        """The spec of what the scan runs over; without one it is an argument that nothing reads."""
        return f"L {self.layer}".strip()

    def rename(self, draw, fresh) -> tuple[str, str]:
        """One dim under another name; a group under one, or under as many."""
        i = draw(st.integers(0, len(self.dims) - 1))
        old = self.dims[i]
        new = tuple(next(fresh) for _ in old) if draw(st.booleans()) else (next(fresh),)
        total = math.prod(self.sizes[n] for n in old)
        self.sizes.update(zip(new, [self.sizes[n] for n in old] if len(new) == len(old) else [total]))
        return self._to("rename", [*self.dims[:i], new, *self.dims[i + 1:]])

    def rearrange(self, draw, fresh) -> tuple[str, str]:
        """All names in another order, some neighbours merged."""
        names, dims = draw(st.permutations([n for d in self.dims for n in d])), []
        while names:
            count = draw(st.integers(1, min(2, len(names))))
            dims, names = [*dims, tuple(names[:count])], names[count:]
        return self._to("rearrange", dims)

    def _to(self, op: str, dims: list[tuple[str, ...]]) -> tuple[str, str]:
        before, self.dims = self.dims, dims
        return op, f"{self.spec(before)} -> {self.spec(dims)}"

    def steps(self, draw, fresh, most: int) -> Steps:
        ops = st.sampled_from((self.rename, self.rearrange))
        return [draw(ops)(draw, fresh) for _ in range(draw(st.integers(0, most)))]

    def loop(self, draw, fresh) -> None:
        """A scan of layers, or of none.

        Its body has names of its own, and ends with those that it was given.
        """
        dims, self.carry = self.dims, self.spec(self.dims)
        self.inner = self.steps(draw, fresh, 3)
        self.layer, self.dims = self.spec(self.dims), dims

    def arguments(self) -> list[Tensor]:
        """x, the stack and y."""
        specs = self.first, self.stack, self.spec(self.dims)
        return [torch.randn(self.shape(spec), dtype=torch.float64) for spec in specs]

    def shape(self, text: str) -> list[int]:
        groups = re.findall(r"(?<=\()[^)]+|\w+", text)
        return [math.prod(self.sizes[n] for n in group.split()) for group in groups]

    def program(self):
        body = self.inner is not None and sharded(f"{self.carry}, {self.layer} -> {self.carry}")(
            lambda x, w: along(back(self.inner), along(self.inner, x) * w))

        @sharded(f"{self.first}, {self.stack}, {self.spec(self.dims)} -> ()")
        def program(x, w, y):
            x = along(self.before, x)
            x = scan(body, x, w) if body else x
            return sum(f"{self.spec(self.dims)} -> ()", square(along(self.after, x)) * y)
        return program

    def dense(self, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        """The same in plain torch, element by element of the names' grid."""
        x = self.walk(self.before, x)
        for layer in w if self.inner is not None else ():
            x = self.walk(self.inner, x)
            x = self.walk(back(self.inner), x * layer.reshape(x.shape))
        return (self.walk(self.after, x).reshape(y.shape).square() * y).sum()

    def walk(self, steps: Steps, x: Tensor) -> Tensor:
        for op, text in steps:
            left, right = (re.findall(r"\w+", side) for side in text.split("->"))
            if op == "rearrange":
                x = x.reshape([self.sizes[n] for n in left]).permute([left.index(n) for n in right])
            x = x.reshape([self.sizes[n] for n in right])
        return x


def along(steps: Steps, x):
    for op, text in steps:
        x = {"rename": rename, "rearrange": rearrange}[op](text, x)
    return x


def back(steps: Steps) -> Steps:
    """What undoes them."""
    return [(op, " -> ".join(reversed(text.split(" -> ")))) for op, text in reversed(steps)]


@st.composite
def chains(draw) -> Chain:
    fresh = (f"N{i}" for i in range(100))
    names = [next(fresh) for _ in range(draw(st.integers(2, 4)))]
    sizes = {n: draw(st.sampled_from((0, 1, 2, 3, 5))) for n in names}
    chain = Chain(sizes | {"L": draw(st.integers(0, 3))}, [(n,) for n in names], " ".join(names))
    chain.before = [chain.rearrange(draw, fresh), *chain.steps(draw, fresh, 3)]
    if draw(st.booleans()):
        chain.loop(draw, fresh)
    chain.after = chain.steps(draw, fresh, 2)
    return chain


@st.composite
def layouts(draw, names) -> Layout:
    names = draw(st.permutations(sorted({*names} - {"L"})))[:draw(st.integers(0, 4))]
    return Layout({n: draw(st.sampled_from((("x",), ("y",), ("x", "y"), ("y", "x")))) for n in names})


MESHES = st.sampled_from((Mesh(x=2, y=3), Mesh(x=2, y=2), Mesh(x=3, y=1), Mesh(x=1, y=2)))


@given(st.data())
def test_chains_of_renames_rearranges_and_scans(data):
    """Value and gradients are those of plain torch, under random layouts;
    arguments that contradict are refused."""
    chain, mesh = data.draw(chains()), data.draw(MESHES)
    layout, program, (x, w, y) = data.draw(layouts(chain.sizes)), chain.program(), chain.arguments()
    want = chain.dense(x.requires_grad_(), w.requires_grad_(), y)
    grads = torch.autograd.grad(want, (x, w), allow_unused=True)
    x, w = x.detach(), w.detach()
    value, of_x, of_w = simulate(value_and_grad(program, ["x", "w"]), layout, x, w, y, mesh=mesh)
    assert torch.allclose(value, want) and torch.allclose(of_x, grads[0])
    assert torch.allclose(of_w, torch.zeros_like(w) if grads[1] is None else grads[1])
    i = data.draw(st.integers(0, y.ndim - 1))
    wrong = torch.randn([n + (j == i) for j, n in enumerate(y.shape)], dtype=torch.float64)
    if len(chain.dims[i]) == 1:
        assert said(simulate, program, layout, x, w, wrong, mesh=mesh).startswith("program: ")


@given(st.data())
def test_sizes_follow_on_every_rank_from_what_its_pieces_leave_open(data):
    """Whatever is said at first: what an error asks for is not known, and all of it is enough.

    A wrong size is refused.
    """
    chain, mesh = data.draw(chains()), data.draw(MESHES)
    program = lower(chain.program(), data.draw(layouts(chain.sizes)), mesh=mesh)
    assert parse_program(str(program)) == program
    coordinate = mesh.coordinate(data.draw(st.integers(0, mesh.world_size - 1)))
    shapes = {path: mesh.local_shape(kind, chain.sizes, coordinate) for path, kind in program.arg_leaves()}
    whole = {path: mesh.local_shape(kind.whole(), chain.sizes, {}) for path, kind in program.arg_leaves()}
    known = {n: chain.sizes[n] for n in data.draw(st.sets(st.sampled_from(sorted(chain.sizes))))}
    while True:
        try:
            assert bind_sizes(program, shapes, known, mesh, coordinate) == chain.sizes
            break
        except SpecError as error:
            asked = re.search(r"; say (?:its global size|the size of \w+): sizes=dict\((\w+)=\.\.\.\)",
                              str(error))[1]
            assert asked not in known
            known[asked] = chain.sizes[asked]
    assert bind_sizes(program, whole, {}, mesh, None) == chain.sizes
    name = data.draw(st.sampled_from(sorted(chain.sizes)))
    wrong = chain.sizes[name] + 1
    for known in ({}, chain.sizes):
        told = said(bind_sizes, program, whole, {**known, name: wrong}, mesh, None)
        # of a merged dim without elements any size of one factor fits, and the other is said to differ
        assert f"{name} is {wrong}" in told or 0 in chain.sizes.values()


# -- ops over a group ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout",
                         (Layout(), Layout(Y="tp"), Layout(X="tp"), Layout(Y="tp", B="tp"), Layout(B="tp")))
def test_argmax_and_take_over_a_group(layout):
    @sharded("B Y X, B -> B, B")
    def best(x, at):
        merged = rearrange("B Y X -> B (Y X)", x)
        return argmax("B (Y X) -> B", merged), take("B (Y X), B -> B", merged, at)
    x, at = torch.randn(2, 5, 3), torch.tensor([14, 7])
    x[0, 1, 2] = x[0, 4, 0] = 9.0
    first, taken = simulate(best, layout, x, at, mesh=Mesh(tp=3))
    assert first.tolist() == [5, int(x[1].flatten().argmax())]
    assert taken.tolist() == [x[0, 4, 2].item(), x[1, 2, 1].item()]


def test_argmax_of_nothing():
    @sharded("B V -> B")
    def best(x):
        return argmax("B V -> B", x)
    for layout in (Layout(), Layout(V="tp")):
        assert said(simulate, best, layout, torch.ones(2, 0), mesh=Mesh(tp=2)) == (
            "argmax: V is 0; nothing is the largest of nothing")


def test_max_of_bool_on_an_empty_piece():
    @sharded("B Y -> B")
    def some(x):
        return max("B Y -> B", greater(x, than=0.0))
    x = torch.tensor([[-1.0, 1.0], [-1.0, -1.0]])
    for tp in (1, 2, 3):
        assert simulate(some, Layout(Y="tp"), x, mesh=Mesh(tp=tp)).tolist() == [True, False]
