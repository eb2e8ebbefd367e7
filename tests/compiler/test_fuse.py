"""Fusions: what is found of them in programs, what is like one and is none, and that nothing else changes."""
from __future__ import annotations

import re
from collections import Counter
from typing import Any

import llama_reference as reference
import pytest
import torch
from decoded import collectives, config, decoded
from simulated import execute, line, tree

from shardlib import (
    EXPLICIT,
    Mesh,
    SpecError,
    all_gather,
    all_reduce,
    explain,
    lower,
    prove,
    sharded,
    value_and_grad,
)
from shardlib.compiler.fusion import Fusion
from shardlib.compiler.parser import check, parse_program
from shardlib.compiler.passes import DEFAULT
from shardlib.compiler.passes.fuse import fuse, fusion_report, require_fusion
from shardlib.functions import clamp, cumsum, silu, softmax, sum, tanh
from shardlib.language.fused import FUSED, fused
from shardlib.language.scan import SCAN
from shardlib.models.layouts import named_layout
from shardlib.models.llama import loss, next_logits
from shardlib.ops import TABLE, embedding, rms_norm
from shardlib.ops.fusions import FUSIONS
from shardlib.params import leaf_values
from shardlib.placement import shard_of
from shardlib.program import Program, Step

ROTATED = (*DEFAULT, "rotate_scan")
FUSING = (*ROTATED, *fuse(FUSIONS))
PLACES = [("tp=2", "tp"), ("tp=3", "tp"), ("tp=2", "tp+sp"), ("dp=2,tp=2", "tp"), ("dp=2,tp=2", "tp+fsdp"),
          ("dp=2,tp=2", "tp+sp+fsdp"), ("tk=2,tg=2", "tp"), ("tk=2,tg=2", "tp+sp"), ("cp=2,tp=2", "tp+cp"),
          ("cp=2,tp=2", "tp+sp+cp"), ("dp=2,tk=2,tg=2", "tp+sp+fsdp")]


def sites(program: Program, layers: int) -> Counter[str]:
    """The fused steps of one run."""
    found: Counter[str] = Counter()
    for step in program.steps:
        if step.op is FUSED:
            found[step.bodies[0].name] += 1
        for body in step.bodies if step.op is SCAN else ():
            for name, count in sites(body, layers).items():
                found[name] += layers * count
    return found


def unfused(program: Program) -> list[str]:
    return [line for line in fusion_report(program) if not line.endswith(": fused")]


def lowered(mesh: str, layout: str, passes: Any, layers: int = 2) -> Program:
    here = Mesh.parse(mesh)
    return lower(next_logits, named_layout(layout, here), mesh=here, config=config(layers), passes=passes)


@pytest.mark.parametrize("mesh, layout", PLACES)
def test_all_sums_of_a_llama_fuse_with_their_norms(mesh: str, layout: str) -> None:
    here, of, layers = Mesh.parse(mesh), config(2), 2
    plain, made = lowered(mesh, layout, ROTATED), lowered(mesh, layout, FUSING)
    sums = "reduce_scatter_add_rms_norm" if "sp" in layout else "all_reduce_add_rms_norm"
    attends = {} if "cp" in layout else {"cached_attention": layers}    # cp gathers k and v in between
    assert sites(made, layers) == {sums: 2 * layers + 1, "gate_up": layers, **attends}
    assert collectives(made, layers) == collectives(plain, layers)
    assert parse_program(str(made), TABLE) == made == check(made, here)
    sizes = dict(of.sizes, B=4, T=5, S=6)
    assert prove(plain, here, sizes).collectives == prove(made, here, sizes).collectives
    one, other = explain(plain, here, sizes), explain(made, here, sizes)
    assert (one.received, one.collectives) == (other.received, other.collectives)


@pytest.mark.parametrize("mesh, layout", [("tp=2", "tp"), ("tp=2", "tp+sp"), ("dp=2,tp=2", "tp+fsdp")])
def test_the_llama_decodes_the_same_bits(mesh: str, layout: str) -> None:
    here = Mesh.parse(mesh)
    plain, made = (decoded(lowered(mesh, layout, passes, 1), here, config(1)) for passes in (ROTATED, FUSING))
    assert all(torch.equal(a, b) for a, b in zip(plain, made, strict=True))


# -- what is one, and what is like one -----------------------------------------------------------------------

MESH = Mesh(a=2, b=2)


@sharded("T D +x, T D, D -> T D, T D", layout=EXPLICIT)
def summed(y, residual, w, *, eps):
    x = residual + all_reduce("T D +x -> T D", y)
    return x, rms_norm(x, w, eps)


@sharded("T/x D, T/x D -> T D", layout=EXPLICIT)
def both_gathered(u, v):
    return all_gather("T/x D -> T D", u) * all_gather("T/x D -> T D", v)


@sharded("F, F -> F", layout=EXPLICIT)
def gated(gate, up):
    return silu(gate) * up


SMALL = (Fusion(summed), Fusion(both_gathered), Fusion(gated))


def lines(f: Any, *table: Fusion) -> list[str]:
    """The report, without the lines of this file."""
    program = lower(f, mesh=MESH, passes=fuse(table or SMALL))
    assert not any(s.bodies for p in program.bodies() for s in p.steps)
    assert parse_program(str(program), TABLE) == program == check(program, MESH)
    return [re.sub(r" at test_fuse.py:\d+", "", line) for line in fusion_report(program)]


@sharded("B T D/b +a, B T D/b, D/b -> B T D/b, B T D/b", layout=EXPLICIT)
def sum_of_a_gated_sum(y, r, w):
    p = all_reduce("B T D/b +a -> B T D/b", y)
    return silu(p) * r, silu(w) * w


@sharded("B Q +b +a, B Q, Q -> B Q", layout=EXPLICIT)
def other_letters_a_product_and_two_eps(y, r, w):
    first = all_reduce("B Q +a +b -> B Q", y) + r
    h = rms_norm(first, w, 0.125)
    return rms_norm(first + all_reduce("B Q +a +b -> B Q", y * 2), w, 0.25) * h


@sharded("B/b D +a, B/b D, D -> B/b D", layout=EXPLICIT)
def one_axis_rides_along(y, r, w):
    return rms_norm(all_reduce("B/b D +a -> B/b D", y) + r, w, 0.5)


@sharded("K G T D +a, K G T D, D -> K G T D", layout=EXPLICIT)
def more_dims(y, r, w):
    return rms_norm(all_reduce("K G T D +a -> K G T D", y) + r, w, 0.5)


@sharded("D +a, D, D -> D", layout=EXPLICIT)
def no_more_dims(y, r, w):
    return rms_norm(r + all_reduce("D +a -> D", y), w, 0.5)


@sharded("T D, T D -> T D, T D", layout=EXPLICIT)
def up_to_the_order(x, y):
    return silu(x) * y, y * silu(x)


@sharded("T D -> T D", layout=EXPLICIT)
def one_operand_twice(x):
    return silu(x) * x


@sharded("T/a/b D, T/a/b D -> T D", layout=EXPLICIT)
def of_a_product(u, v):
    return all_gather("T/a/b D -> T D", u) * all_gather("T/a/b D -> T D", v)


@pytest.mark.parametrize("f", [other_letters_a_product_and_two_eps, one_axis_rides_along, more_dims,
                               no_more_dims, up_to_the_order, one_operand_twice, of_a_product])
def test_what_is_one(f: Any) -> None:
    assert lines(f) and all(line.endswith(": fused") for line in lines(f))


def test_each_site_keeps_its_own_attributes_and_types() -> None:
    program = lower(other_letters_a_product_and_two_eps, mesh=MESH, passes=fuse(SMALL))
    assert "    x = v1 + residual\n" in str(program).split("\n\n\n")[0]
    assert str(program).split("\n\n\n")[1:] == ['''\
@sharded("B Q +a +b, B Q, Q -> B Q, B Q", layout=EXPLICIT)
def summed__2(y, residual, w):
    v1 = all_reduce("B Q +a +b -> B Q", y)
    x = residual + v1
    v2 = rms_norm(x, w, eps=0.25)
    return x, v2''', '''\
@sharded("B Q +a +b, B Q, Q -> B Q", layout=EXPLICIT)
def other_letters_a_product_and_two_eps(y, r, w):
    first, h = fused(summed, y, r, w)
    v2 = y * 2
    v4, v5 = fused(summed__2, v2, first, w)
    v6 = v5 * h
    return v6
''']


@sharded("T D +a, T D, D -> T D, T D", layout=EXPLICIT)
def used_elsewhere(y, r, w):
    paid = all_reduce("T D +a -> T D", y)
    return rms_norm(r + paid, w, 0.5), paid * 2


@sharded("T D +a, T D, D -> T D, T D", layout=EXPLICIT)
def returned(y, r, w):
    paid = all_reduce("T D +a -> T D", y)
    return rms_norm(r + paid, w, 0.5), paid


@sharded("T D +a, T D -> T D", layout=EXPLICIT)
def cyclic(y, r):
    x = r + all_reduce("T D +a -> T D", y)
    return rms_norm(x, sum("T D -> D", x), 0.5)


@sharded("T D +a, T D, D -> T D", layout=EXPLICIT)
def no_norm(y, r, w):
    return silu(r + all_reduce("T D +a -> T D", y))


@sharded("T D +a, T D, D -> T D, T D", layout=EXPLICIT)
def used_between(y, r, w):
    x = r + all_reduce("T D +a -> T D", y)
    z = silu(x)
    return z, rms_norm(x, w, 0.5)


@sharded("T D +a, D, D -> T D", layout=EXPLICIT)
def broadcast(y, r, w):
    return rms_norm(all_reduce("T D +a -> T D", y) + r, w, 0.5)


@sharded("T/a/b D, T/b/a D -> T D", layout=EXPLICIT)
def in_two_orders(u, v):
    return all_gather("T/a/b D -> T D", u) * all_gather("T/b/a D -> T D", v)


@sharded("T/a D, T/b D -> T D", layout=EXPLICIT)
def over_two_axes(u, v):
    return all_gather("T/a D -> T D", u) * all_gather("T/b D -> T D", v)


@sharded("T/a D, T D/a -> T D", layout=EXPLICIT)
def of_another_dim(u, v):
    return all_gather("T/a D -> T D", u) * all_gather("T D/a -> T D", v)


@sharded("T D -> T D", layout=EXPLICIT)
def its_own_gate(x):
    g = silu(x)
    return g * g


@sharded("T D +a, T D +a, T D, T D, D -> T D, T D", layout=EXPLICIT)
def each_needs_the_other(y, z, r, s, w):
    """Either is one step, and both are not: each would wait for the other."""
    x = r + all_reduce("T D +a -> T D", y)
    u = s + all_reduce("T D +a -> T D", z)
    return rms_norm(x, sum("T D -> D", u), 0.5), rms_norm(u, sum("T D -> D", x), 0.5)


@pytest.mark.parametrize("f, report", [
    (used_elsewhere, ["summed: paid is used by scale, too"]),
    (returned, ["summed: paid is used by the result, too"]),
    (cyclic, ["summed: its operand v2 is made from what it makes"]),
    (no_norm, ["summed: v2 goes into silu, not into rms_norm",
               "gated: v3 goes into the result, not into mul"]),
    (broadcast, ['summed: add has "D", which is no "T D"']),
    (used_between, ["summed: fused", "gated: z goes into the result, not into mul"]),
    (its_own_gate, ["gated: its operand g is made from what it makes"]),
    (each_needs_the_other, ["summed: fused", "summed: its operand v5 is made from what it makes"]),
    (in_two_orders, [f"both_gathered: x is {one} and {other}, a product in two orders"
                     for one, other in (("a/b", "b/a"), ("b/a", "a/b"))]),
    (over_two_axes, ["both_gathered: all_gather is over a, and a is not throughout what x is in the "
                     "function"] * 2),
    (of_another_dim, ["both_gathered: all_gather is over a, and a is not throughout what x is in the "
                      "function"] * 2)])
def test_what_is_like_one(f: Any, report: list[str]) -> None:
    assert lines(f) == report


# -- attributes, and axes that no move is over ---------------------------------------------------------------

@sharded("T D, D -> T D", layout=EXPLICIT)
def twice_normed(x, w, *, eps):
    return softmax(rms_norm(tanh(rms_norm(x, w, eps)) * 2.0, w, eps), along="D")


@sharded("T/x, T/x -> T/x", layout=EXPLICIT)
def of_pieces(a, b):
    return tanh(a) * b


@sharded("B Q, Q -> B Q", layout=EXPLICIT)
def other_letters_in_an_attribute(x, w):
    return softmax(rms_norm(tanh(rms_norm(x, w, 0.75)) * 2.0, w, 0.75), along="Q")


@sharded("Q/b/a, Q/b/a -> Q/b/a", layout=EXPLICIT)
def pieces(x, y):
    return tanh(x) * y


def normed(first: float, second: float, by: float, along: str) -> Any:
    @sharded("T D, D -> T D", layout=EXPLICIT)
    def f(x, w):
        return softmax(rms_norm(tanh(rms_norm(x, w, first)) * by, w, second), along=along)
    return f


@sharded("T, T -> T", layout=EXPLICIT)
def whole(x, y):
    return tanh(x) * y


def test_attributes_are_the_same_but_for_names_of_dims_and_static_arguments() -> None:
    table = Fusion(twice_normed)
    assert lines(other_letters_in_an_attribute, table) == ["twice_normed: fused"]
    for site, why in (((0.5, 0.25, 2.0, "D"), "rms_norm has eps=0.25, and eps is 0.5 already"),
                      ((0.5, 0.5, 3.0, "D"), "scale has by=3.0, not 2.0"),
                      ((0.5, 0.5, 2.0, "T"), "softmax has along='T', not 'D'")):
        assert lines(normed(*site), table)[0] == f"twice_normed: {why}"


def test_an_attribute_that_the_program_alone_has_is_one_more() -> None:
    def made(**more: bool) -> Any:
        @sharded("T D -> T D", layout=EXPLICIT)
        def running(x):
            return tanh(cumsum(x, along="D", **more))
        return running
    assert lines(made(), Fusion(made())) == ["running: fused"]
    assert lines(made(reverse=True), Fusion(made())) == ["running: cumsum has reverse=True, not None"]


def test_an_axis_of_the_function_is_there() -> None:
    assert lines(pieces, Fusion(of_pieces)) == ["of_pieces: fused"]
    assert lines(whole, Fusion(of_pieces)) == ["of_pieces: no axis does what x does in the function"]


# -- gradients -----------------------------------------------------------------------------------------------

def trained(passes: Any, mesh: Mesh, layout: str) -> Program:
    return lower(value_and_grad(loss), named_layout(layout, mesh), mesh=mesh, config=config(1), passes=passes)


@pytest.mark.parametrize("mesh, layout", [("tp=2", "tp"), ("tk=2,tg=2", "tp"), ("dp=2,tp=2", "tp+sp+fsdp")])
def test_a_llama_that_learns_fuses_on_both_sides_of_its_gradient(mesh: str, layout: str) -> None:
    """The products in two passes; its sums after the gradient, but for the last one of a round."""
    here = Mesh.parse(mesh)
    plain, made = (trained(passes, here, layout) for passes in (DEFAULT, (*DEFAULT, *fuse(FUSIONS))))
    sums = "reduce_scatter_add_rms_norm" if "sp" in layout else "all_reduce_add_rms_norm"
    assert sites(made, 2) == {sums: 2, "gate_up": 2, "gate_up_vjp": 2}
    assert collectives(made, 2) == collectives(plain, 2)
    assert parse_program(str(made), TABLE) == made == check(made, here)
    kept = [len(next(s for s in p.steps if s.op is SCAN).outs) for p in (plain, made)]
    assert kept[1] == kept[0] - 1                               # silu(gate) is made again


def test_gradients_of_a_llama_are_the_same_bits() -> None:
    here, of, got = Mesh(tp=2), config(1), []
    whole = {"ids": torch.arange(6).view(2, 3), "labels": torch.arange(3, 9).view(2, 3),
             "start": torch.zeros(2, dtype=torch.int64),
             **dict(leaf_values(tree(reference.random_weights(of, 0), of), "w"))}
    for passes in (DEFAULT, (*DEFAULT, *fuse(FUSIONS))):
        program = trained(passes, here, "tp")
        placed = [{path: shard_of(whole[path], spec, here, c) for path, spec in program.arg_leaves()}
                  for c in here.coordinates()]
        got.append(execute(program, here, placed, dict(of.sizes, B=2, T=3, S=3)).results)
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))


# -- what is told, and insisted on ---------------------------------------------------------------------------

def test_where_nothing_is_owed_the_addition_fuses_with_the_norm() -> None:
    program = lowered("dp=2", "tp", FUSING)
    assert sites(program, 2) == {"add_rms_norm": 5, "gate_up": 2, "cached_attention": 2}
    assert unfused(program) == []


def test_where_no_scan_is_rotated_half_of_them_lie_across_its_border() -> None:
    program = lowered("dp=2", "tp", (*DEFAULT, *fuse(FUSIONS)))
    assert sites(program, 2) == {"add_rms_norm": 2, "gate_up": 2, "cached_attention": 2}
    assert [re.sub(r"\.py:\d+", ".py", line) for line in unfused(program)] == [
        "add_rms_norm at llama.py: x is an argument, not made by add",
        "add_rms_norm at causal.py: x2 is made by scan at causal.py, not by add"]


def test_explain_tells_of_each_candidate() -> None:
    program, sizes = lowered("tp=2", "tp+sp", FUSING), dict(config(2).sizes, B=4, T=5, S=6)
    told = explain(program, Mesh(tp=2), sizes)
    assert told.fusions == tuple(dict.fromkeys(fusion_report(program))) == tuple(told.to_json()["fusions"])
    assert str(told).endswith("".join(f"{line}\n" for line in told.fusions))
    assert unfused(program) == [
        f"all_reduce_add_rms_norm at {line('take(')}: h2 goes into einsum, not into add"]


def test_a_fusion_may_be_insisted_on() -> None:
    """They are counted in the text: three sums, whatever the number of layers."""
    made = lowered("tp=2", "tp", (*FUSING, require_fusion("all_reduce_add_rms_norm", 3)))
    assert made == lowered("tp=2", "tp", FUSING)
    for count, passes in ((4, FUSING), (2, FUSING), (3, (*DEFAULT, *fuse(FUSIONS)))):
        with pytest.raises(SpecError) as error:
            lowered("tp=2", "tp", (*passes, require_fusion("all_reduce_add_rms_norm", count)))
        program = lowered("tp=2", "tp", passes)
        found = 3 if passes is FUSING else 1
        assert str(error.value) == "\n  ".join([
            f"require_fusion: next_logits has {found} fused all_reduce_add_rms_norm, not {count}",
            *fusion_report(program)])


def test_a_fusion_has_a_side_condition() -> None:
    def when(step: Step) -> str | None:
        return None if step.ins[1].split_axes else f"its residual is whole, {step.ins[1]}"
    table = (Fusion(summed, when=when),)
    assert lines(one_axis_rides_along, *table) == ["summed: fused"]
    assert lines(more_dims, *table) == ["summed: its residual is whole, K G T D"]


# -- what can be a fusion ------------------------------------------------------------------------------------

@sharded("F, F -> F")
def declarative(a, b):
    return a * b


@sharded("F, F -> F, F", layout=EXPLICIT)
def gives_what_it_takes(a, b):
    return a, silu(a) * b


@sharded("F, F -> F, F", layout=EXPLICIT)
def gives_one_twice(a, b):
    c = silu(a) * b
    return c, c


@sharded("F, F -> F", layout=EXPLICIT)
def takes_more(a, b):
    return silu(a)


@sharded("F, F -> F, F", layout=EXPLICIT)
def apart(a, b):
    return silu(a), silu(b)


@sharded("F -> F", layout=EXPLICIT)
def made_of_static(a, *, by):
    return silu(a * (by * 2))


@sharded("F -> F", layout=EXPLICIT)
def forked(a, *, by):
    return silu(a) if by < 0.6 else a * by


@sharded("F, F -> F", layout=EXPLICIT)
def around_another(a, b):
    return fused(gated, a, b)


@pytest.mark.parametrize("f, problem", [
    (declarative, "it is a function of tensors, with layout=EXPLICIT"),
    (gives_what_it_takes, "it gives what its steps make, each once"),
    (gives_one_twice, "it gives what its steps make, each once"),
    (takes_more, "no step takes b"),
    (apart, "each of its steps shares a value with another"),
    (made_of_static, "a static argument becomes an attribute as it is"),
    (forked, "its steps depend on a static argument"),
    (around_another, "its steps have no bodies")])
def test_what_cannot_be_one(f: Any, problem: str) -> None:
    with pytest.raises(SpecError) as error:
        lines(up_to_the_order, Fusion(f))
    assert str(error.value).split("    ")[0] == f"fusion {f.__name__}: {problem}"


# -- found by reading adversarially --------------------------------------------------------------------------

@sharded("F, F -> F, F, F", layout=EXPLICIT)
def both_silu(x, y):
    g, h = silu(x), silu(y)
    return g, h, g * h


def test_a_step_that_is_fused_already_is_not_fused_again() -> None:
    """Its value is one of the fused step's results: another search must not begin there."""
    @sharded("F, F, F -> F, F")
    def chain(x, y, z):
        a, b, c = silu(x), silu(y), silu(z)
        return a * b, b * c
    program = lower(chain, mesh=MESH, passes=fuse((Fusion(both_silu),)))
    made = [o for step in program.steps for o in step.outputs]
    assert len(made) == len({*made}) and parse_program(str(program), TABLE) == program


@sharded("T, V D -> T D", layout=EXPLICIT)
def scaled_embedding(ids, table, *, by):
    return embedding("T, V D -> T D", ids, table) * by


def test_an_axis_rides_along_where_no_step_does_otherwise_for_it() -> None:
    """Of a split table an embedding gives some rows and owes: a kernel that is given the piece would look up
    others."""
    @sharded("T, V/a D -> T D", layout=EXPLICIT)
    def split(ids, table):
        return all_reduce("T D +a -> T D", embedding("T, V/a D -> T D +a", ids, table) * 8.0)

    @sharded("T/a, V D/b -> T/a D/b", layout=EXPLICIT)
    def rides(ids, table):
        return embedding("T/a, V D/b -> T/a D/b", ids, table) * 8.0
    assert lines(rides, Fusion(scaled_embedding)) == ["scaled_embedding: fused"]
    assert lines(split, Fusion(scaled_embedding)) == [
        "scaled_embedding: embedding does over a what it does not in the function"]


@sharded("F, F -> F", layout=EXPLICIT)
def bounded(x, y, *, lo, hi):
    return clamp(x, min=lo, max=hi) * y


@sharded("F, F -> F", layout=EXPLICIT)
def powered(x, y, *, by):
    return tanh(x ** by) * y


def test_static_arguments_are_there_and_may_be_exponents() -> None:
    @sharded("F, F -> F")
    def f(x, y):
        return clamp(x, max=3.0) * y

    @sharded("F, F -> F")
    def g(x, y):
        return tanh(x ** 3.5) * y
    assert lines(f, Fusion(bounded)) == ["bounded: clamp has no min"]
    assert lines(g, Fusion(powered)) == ["powered: fused"]
