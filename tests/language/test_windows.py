"""windows: what a convolution of torch sees, in several dims, strides and dilations; and its transpose."""
from __future__ import annotations

import builtins
import warnings

import pytest
import torch
import torch.nn.functional as F

from shardlib import (
    EXPLICIT,
    Layout,
    Mesh,
    SpecError,
    einsum,
    explain,
    lower,
    prove,
    sharded,
    simulate,
    step,
    value_and_grad,
)
from shardlib.functions import sum, windows

pytestmark = pytest.mark.usefixtures("one_thread")
MESH = Mesh(x=2, y=2)


def values(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


@sharded("B Y X C, P Q C D, B Y X D -> ()")
def same_size(x, kernel, by):
    seen = windows("B Y X C -> B Y P X C", x, before=1, after=1)
    seen = windows("B Y P X C -> B Y P X Q C", seen, before=2, after=2, dilation=2)
    y = einsum("B Y P X Q C, P Q C D -> B Y X D", seen, kernel)
    return sum("B Y X D -> ()", by * y * y)


@sharded("B Y X C, P Q C D, B Z X D -> ()")
def with_stride(x, kernel, by):
    seen = windows("B Y X C -> B Z P X C", x, before=1, stride=2)
    seen = windows("B Z P X C -> B Z P X Q C", seen, before=1, after=1)
    y = einsum("B Z P X Q C, P Q C D -> B Z X D", seen, kernel)
    return sum("B Z X D -> ()", by * y * y)


def by_torch(x: torch.Tensor, kernel: torch.Tensor, stride: int) -> torch.Tensor:
    x = x.permute(0, 3, 1, 2)
    kernel = kernel.permute(3, 2, 0, 1)
    if stride == 1:
        return F.conv2d(x, kernel, padding=(1, 2), dilation=(1, 2)).permute(0, 2, 3, 1)
    return F.conv2d(F.pad(x, (1, 1, 1, 0)), kernel, stride=(2, 1)).permute(0, 2, 3, 1)


@pytest.mark.parametrize("layout", (Layout(B="x"), Layout(C="x", D="y"), Layout(Y="x", X="y"), Layout(P="x")),
                         ids=str)
@pytest.mark.parametrize("f, stride", ((same_size, 1), (with_stride, 2)), ids=("same", "stride"))
def test_convolutions_are_those_of_torch(f, stride: int, layout: Layout) -> None:
    g = torch.Generator().manual_seed(0)
    x, kernel = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((2, 6, 4, 3), (3, 3, 3, 2)))
    asked = [x.clone().requires_grad_(), kernel.clone().requires_grad_()]
    y = by_torch(*asked, stride)
    by = torch.randn(y.shape, generator=g, dtype=torch.float64)
    want = (by * y * y).sum()
    got = simulate(value_and_grad(f, wrt=("x", "kernel")), layout, x, kernel, by, mesh=MESH)
    for made, exact in zip(got, (want.detach(), *torch.autograd.grad(want, asked)), strict=True):
        torch.testing.assert_close(made, exact)


@pytest.mark.parametrize("run", (simulate, lambda f, layout, *args, mesh: step(f, mesh=Mesh())(*args)),
                         ids=("simulate", "step"))
def test_how_many_windows_there_are_follows(run) -> None:
    """Of their size, which an argument says, the stride, and the dim; for the next ones too."""
    @sharded("B Y, P -> B U")
    def twice(x, kernel):
        x = einsum("B Z P, P -> B Z", windows("B Y -> B Z P", x, before=1, after=1, stride=2), kernel)
        return einsum("B U P, P -> B U", windows("B Z -> B U P", x, dilation=2), kernel)
    x, kernel = values((2, 11), (3,))
    got = run(twice, Layout(Y="x", Z="x", U="y"), x, kernel, mesh=MESH)
    want = F.conv1d(F.conv1d(x[:, None], kernel[None, None], padding=1, stride=2), kernel[None, None],
                    dilation=2)
    torch.testing.assert_close(got, want[:, 0])
    with pytest.raises(SpecError, match="windows: U is 0; of Z=2 with .* there are 0 windows of P=3"):
        run(twice, None, x[:, :3], kernel, mesh=Mesh())


def said(text: str, **more: int) -> str:
    ins = text.split(" -> ")[0]
    with pytest.raises(SpecError) as error:
        lower(sharded(f"{ins} -> {ins}")(lambda x: windows(text, x, **more)), mesh=MESH)
    return str(error.value)


def test_what_it_refuses() -> None:
    for text in ("B Y D -> B Y D", "B Y D -> B D Y P", "B Y D -> P B Y D", "B Y D -> B Z P",
                 "B Y D -> Z B P D", "B Y D -> B (Y Z) P D"):
        assert said(text).split("          ")[0] == (
            f'windows "{text}": the specs are those of "B Y D -> B Y P D", or of "B Y D -> B Z P D": a new '
            'dim behind the one that is looked along')
    text = "B Y -> B Y P"
    assert said(text, stride=0).startswith("windows: stride is 0; it is a whole number, 1 or more")
    assert said(text, after=-1).startswith("windows: after is -1; it is a whole number, 0 or more")
    f = sharded("B Y, P -> B Y")(lambda x, kernel: einsum("B Y P, P -> B Y", windows(text, x), kernel))
    with pytest.raises(SpecError, match="windows: Y is 3; of Y=3 with after=0, before=0, dilation=1, "
                                        "stride=1 there are 2 windows of P=2"):
        simulate(f, None, torch.ones(1, 3), torch.ones(2), mesh=Mesh())


HALO = dict(before=2, after=1, dilation=3, stride=1)


@pytest.mark.parametrize("ranks, length, made", ((4, 8, "Y"), (4, 2, "Y"), (3, 7, "Z"), (4, 9, "Z")))
def test_over_a_split_dim_the_halo_is_sent_and_no_more(ranks: int, length: int, made: str) -> None:
    """Rows that a rank's windows see of other pieces, beyond the neighbour where these are short, or empty;
    in the derivative as many come back. That is what explain, the proof and the ranks say."""
    count, mesh, log = (length, Mesh(x=ranks), [])
    how = HALO if made == "Y" else dict(HALO, stride=2)
    if made == "Z":
        count = (2 + length + 1 - 4) // 2 + 1
    f = sharded(f"B Y D, B {made} P D -> ()")(lambda x, by: sum(
        f"B {made} P D -> ()", by * windows(f"B Y D -> B {made} P D", x, **how)))
    g, layout, sizes = value_and_grad(f, "x"), Layout(Y="x", Z="x"), dict(B=2, Y=length, Z=count, P=2, D=3)
    x, by = values((2, length, 3), (2, count, 2, 3))
    found = simulate(g, layout, x, by, mesh=mesh, log=log)
    wanted = simulate(g, None, x, by, mesh=Mesh())
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1])
    program, kinds = lower(g, layout, mesh=mesh), dict(x="float64", by="float64")
    assert [name for _, name, _ in log] == ["all_to_all", "all_reduce", "all_to_all"]
    assert prove(program, mesh, sizes, kinds).collectives == 3
    seen = []
    for rank in range(ranks):
        first, n = mesh.extent(count, ("x",), dict(x=rank))
        start, size = mesh.extent(length, ("x",), dict(x=rank))
        at = how["stride"] * first - 2
        every = range(max(0, at), min(length, at + how["stride"] * (n - 1) + 4)) if n else ()
        seen.append(len({*every} - {*range(start, start + size)}) * 2 * 3 * 8)
    there, _, back = explain(program, mesh, sizes, kinds).traffic
    assert there.received == tuple(seen) and builtins.sum(back.received) == builtins.sum(seen)


def test_windows_of_another_name_take_halos_where_the_layout_splits_both_alike() -> None:
    f = sharded("B Y D -> B Z P D")(lambda x: windows("B Y D -> B Z P D", x, before=1, stride=2))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = [[f"{s.op.name} {s.text}" for s in lower(f, Layout.parse(layout), mesh=MESH).steps]
                for layout in ("Y=x,Z=x", "Y=x,B=x", "Z=x", "Y=x")]
    assert made == [["windows B Y/x D -> B Z/x P D"],
                    ["all_to_all B Y/x D -> B/x Y D", "windows B/x Y D -> B/x Z P D"],
                    ["windows B Y D -> B Z/x P D"],
                    ["all_gather B Y/x D -> B Y D", "windows B Y D -> B Z P D"]]
    assert [str(w.message).split(",")[0] for w in said] == ["layout Y=x: windows needs all of Y"]


def test_over_a_split_dim_the_gather_is_named() -> None:
    f = sharded("B Y/x D -> B Z P D", layout=EXPLICIT)(
        lambda x: windows("B Y/x D -> B Z P D", x, before=1))
    with pytest.raises(SpecError) as error:
        lower(f, mesh=MESH)
    first, *_, offer = str(error.value).split("\n")
    assert first.startswith("windows: Y is split over x in x; windows needs all of Y on each rank")
    assert 'all_gather("B Y/x D -> B Y D", x)' in offer


def test_one_window_may_be_all_there_is() -> None:
    @sharded("B T, P -> B Z")
    def convolved(x, kernel):
        return einsum("B Z P, P -> B Z", windows("B T -> B Z P", x), kernel)
    x, kernel = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    assert torch.allclose(simulate(convolved, None, x, kernel, mesh=Mesh()), x @ kernel[:, None])
