"""Every communicator on the CPU does what `conformance` says, on groups of 1 to 4,
in both orders of a product."""
from __future__ import annotations

import functools
import random
from dataclasses import dataclass, replace

import pytest
import torch
from conformance import (
    COLLECTIVES,
    DTYPES,
    FLOATS,
    LAYOUTS,
    Case,
    check,
    draw,
    fixed_cases,
    reduction_failures,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pool import DEADLINE_S, Pool, World

from shardlib.distributed import connect
from shardlib.distributed.communicators.shared_memory import TAKES
from shardlib.distributed.segment import unsupported
from shardlib.mesh import Mesh

GLOO, SHARED = "torch.distributed (gloo)", "shared memory"


@dataclass(frozen=True)
class Setting:
    """A mesh, the products of axes whose groups are tried on it,
    and the communicator that takes all calls."""
    mesh: str
    products: tuple[tuple[str, ...], ...]
    communicator: str

    def size(self, axes: tuple[str, ...]) -> int:
        return Mesh.parse(self.mesh).size(axes)

    @property
    def collectives(self) -> tuple[str, ...]:
        return tuple(c for c in COLLECTIVES if c in TAKES) if self.communicator == SHARED else COLLECTIVES


MESHES = (("tp=2", (("tp",),)), ("tp=3", (("tp",),)),
          ("dp=2,tp=2", (("tp",), ("dp",), ("dp", "tp"), ("tp", "dp"))))
SETTINGS = (Setting("tp=1", (("tp",),), "alone"),
            *(Setting(*mesh, c) for mesh in MESHES for c in (GLOO, SHARED)))


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda s: f"{s.mesh} {s.communicator}")
def setting(request: pytest.FixtureRequest) -> Setting:
    if request.param.communicator == SHARED and unsupported():
        pytest.skip(unsupported())
    return request.param


@pytest.fixture(scope="module")
def world(setting: Setting, pool: Pool) -> World:
    return pool.connect(setting.mesh, setting.products, Mesh.parse(setting.mesh).world_size)


def test_fixed_cases(world: World, setting: Setting) -> None:
    for axes in setting.products:
        cases = [case for case in fixed_cases(axes, setting.size(axes))
                 if case.collective in setting.collectives]
        assert world.check(*cases, communicator=setting.communicator) == []


def test_it_takes_what_its_setting_says(world: World, setting: Setting) -> None:
    """What a communicator takes beyond that, nothing tries."""
    for axes in setting.products:
        assert world.run("taken", axes, setting.communicator) == [list(setting.collectives)] * world.size


def test_an_order_that_is_not_its_own_inverse(pool: Pool) -> None:
    world = pool.connect("tp=3", [("tp",)], 3)
    assert world.run("any_order", [1, 2, 0]) == [[]] * 3


SIZES = st.sampled_from((0, 1, 2, 3, 5, 7, 13))


@st.composite
def cases(draw: st.DrawFn, setting: Setting) -> Case:
    """Any call that has a meaning on one of the setting's groups."""
    axes = draw(st.sampled_from(setting.products))
    n = setting.size(axes)
    collective = draw(st.sampled_from(setting.collectives))
    shape = draw(st.lists(SIZES, min_size=collective not in ("all_reduce", "broadcast", "send"),
                          max_size=4).map(tuple))
    members = st.lists(SIZES, min_size=n, max_size=n).map(tuple)
    return Case(collective, axes, draw(st.sampled_from(DTYPES)), shape,
                dim=draw(st.integers(-len(shape), len(shape) - 1)) if shape else 0,
                sizes=draw(members), rows=tuple(draw(members) for _ in range(n)),
                op=draw(st.sampled_from(("sum", "max"))), layout=draw(st.sampled_from(LAYOUTS)),
                special=draw(st.booleans()), root=draw(st.integers(0, n - 1)),
                seed=draw(st.integers(0, 1000)))


@settings(max_examples=3 * settings.default.max_examples, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_drawn_cases(world: World, setting: Setting, data: st.DataObject) -> None:
    assert world.check(data.draw(cases(setting)), communicator=setting.communicator) == []


# -- the kit itself: it must see what is wrong ---------------------------------------------------------------

class Wrong:
    """A group of one whose results are spoiled."""

    def __init__(self, spoil: str) -> None:
        self.runtime = connect(Mesh(tp=1), device="cpu")
        self.group, self.spoil = self.runtime.group(("tp",)), spoil

    def __getattr__(self, name: str) -> object:
        return getattr(self.group, name)

    def all_reduce(self, x: torch.Tensor, op: str) -> torch.Tensor:
        if self.spoil == "argument":
            x.add_(1)
        good = self.group.all_reduce(x, op)
        return {"alias": x, "value": good + 1, "dtype": good.double(), "shape": good[:1],
                "stride": good.t().contiguous().t(), "argument": self.group.all_reduce(x, op)}[self.spoil]


@pytest.mark.parametrize("spoil", ("alias", "value", "dtype", "shape", "stride", "argument"))
def test_the_kit_sees_what_is_wrong(spoil: str) -> None:
    assert check(Case("all_reduce", ("tp",), "float32", (3, 2)), Wrong(spoil))


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_order_of_eight_terms_is_right_and_a_lost_or_doubled_term_is_not(dtype: str) -> None:
    case = Case("all_reduce", ("tp",), dtype, (64,))
    pieces = [draw(case.shape, case, member) for member in range(8)]

    def wrong(terms: list[torch.Tensor]) -> list[str]:
        return list(reduction_failures(case, functools.reduce(add, terms), pieces, deterministic=False))
    assert not any(wrong(random.Random(seed).sample(pieces, 8)) for seed in range(20))
    if "float8" not in dtype:                           # of which eight terms may lose one to rounding
        assert wrong(pieces[1:]) and wrong([*pieces, pieces[0]])


def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.double() + b.double()).to(a.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_what_they_say(layout: str) -> None:
    x = draw((4, 3), Case("all_reduce", ("tp",), "float32", (4, 3), layout=layout), 0)
    assert x.shape == (4, 3) and x.is_contiguous() == (layout in ("contiguous", "offset", "grad"))
    assert (x.storage_offset() > 0) == (layout == "offset") and x.requires_grad == (layout == "grad")
    assert (x.stride(0) == 0) == (layout == "expanded")


BATCHED = "differs from sample to sample of torch.vmap; call the collective outside of it"
FAKE = "is a FakeTensor; only plain tensors can be sent"


def test_nothing_flows_through_a_collective_and_no_transform_stays_in_it(pool: Pool) -> None:
    assert pool.connect("tp=2", [], 2).run("transformed", ["tp"]) == [
        [*(f"{name} over tp: the tensor {BATCHED}" for name in ("all_reduce", "all_gather", "all_to_all")),
         f"broadcast_tensors over tp: 'x' {BATCHED}",
         "all_reduce over tp: make_fx cannot trace a collective"]] * 2


def test_compiled_code_calls_collectives_as_they_stand(pool: Pool) -> None:
    assert pool.connect("tp=2", [("tp",)], 2).run("compiled", ["tp"]) == [["a collective is not traced"]] * 2


def test_fake_tensors_are_refused_and_leave_nothing_behind(pool: Pool) -> None:
    told = [*(f"{name} over tp: the tensor {FAKE}"
              for name in ("all_reduce", "all_gather", "broadcast", "all_to_all")),
            f"broadcast_tensors over tp: 'x' {FAKE}"]
    assert pool.connect("tp=2", [], 2).run("faked", ["tp"]) == [told * 2] * 2


@pytest.mark.parametrize("mesh, size", [("tp=1", 1), ("tp=3", 3)])
def test_dtypes_that_torch_does_not_copy_are_moved(mesh: str, size: int, pool: Pool) -> None:
    text = "sum of uint1 over ranks: not defined; convert it to another dtype first"
    assert pool.connect(mesh, [("tp",)], size).run("uncopied_dtypes", ["tp"]) == [[text]] * size


@pytest.mark.parametrize("made", ["inference", "no grad", "autocast", "meta", "plain"])
def test_calls_in_any_surroundings(made: str, pool: Pool) -> None:
    """Nothing that a group keeps from one call to the next is of the mode,
    or of the default dtype and device, that it was made in."""
    assert pool.connect("tp=2", [], 2).run("surroundings", ["tp"], made) == [[]] * 2


def test_cases_differ_between_members_and_groups() -> None:
    case = Case("all_reduce", ("tp",), "float32", (3,))
    drawn = {tuple(draw(case.shape, replace(case, seed=seed), key).tolist()) for seed in range(3)
             for key in range(3)}
    assert len(drawn) == 9


def test_a_rank_that_hangs_ends_the_test_and_not_the_suite() -> None:
    with Pool(1) as pool:
        world = pool.connect("tp=1", [], 1)
        pool.deadline_s = 0.5
        with pytest.raises(AssertionError, match="^rank 0: no answer"):
            world.run("hang")
        pool.deadline_s = DEADLINE_S
        assert world.run("barrier", ["tp"]) == [True]
