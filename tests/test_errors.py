"""Golden error messages: what a user reads for each mistake, whole;
and the code they offer, pasted and typed again.

Every function here holds a mistake that users of sharding APIs have made. `wrong(f, ...)` states the message.
Lines are counted from the function's decorator: `model.py:4` is its fourth line.
"""
import ast
import dataclasses
import inspect
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

import shardlib
from shardlib import (
    EXPLICIT,
    Layout,
    Mesh,
    Params,
    SpecError,
    all_reduce,
    cond,
    einsum,
    lower,
    owe,
    param,
    rearrange,
    reduce_scatter,
    reshard,
    scan,
    shard,
    sharded,
    stacked,
    value_and_grad,
)
from shardlib.compiler.completer import Completer
from shardlib.compiler.parser import parse_program
from shardlib.compiler.refusal import Refused, RuleRefuses
from shardlib.compiler.refusals.messages import worded
from shardlib.compiler.sizes import bind_sizes
from shardlib.distributed.launch import Launch
from shardlib.functions import argmax, exp, greater, greater_equal, max, mean, silu, softmax, where
from shardlib.language.moves import TABLE as MOVES
from shardlib.language.trace import Function, trace
from shardlib.lowering.emit import Emitter
from shardlib.ops import TABLE as OPS
from shardlib.ops import attention, causal_mask, rms_norm
from shardlib.placement import join, place
from shardlib.run.simulate import simulate
from shardlib.spec import parse

MESH = Mesh(dp=2, tp=4)
SIZES = dict(B=8, T=128, D=512, F=2048, K=8, G=4, V=1000, E=16)


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A sharded function with a mistake, where it is lowered, and what the message says."""
    f: Function
    says: str
    layout: Layout | None
    sizes: dict

    def lower(self, f=None):
        return lower(f or self.f, self.layout, mesh=MESH, sizes=self.sizes)

    def message(self):
        with pytest.raises(SpecError) as caught:
            self.lower()
        first = self.f.fn.__code__.co_firstlineno
        return re.sub(r"test_errors\.py:(\d+)", lambda m: f"model.py:{int(m[1]) - first + 1}",
                      str(caught.value))


CASES: dict[str, Wrong] = {}


def wrong(f, says, layout=None, **sizes):
    CASES[f.__name__] = Wrong(f, says.strip("\n"), layout,
                              SIZES if not sizes else {k: v for k, v in sizes.items() if v})


# -- sums that are owed --------------------------------------------------------------------------------------

@sharded("B F/tp, F/tp D -> B D", layout=EXPLICIT)
def silu_before_the_reduction(x, w):
    h = einsum("B F/tp, F/tp D -> B D +tp", x, w)
    return silu(h)


wrong(silu_before_the_reduction, """
silu: h owes a sum over tp, and silu of a sum is not the sum of silu          model.py:4

  h   B  D  +tp   owed since einsum at model.py:3, which contracts F/tp
            ^^^

  silu(all_reduce("B D +tp -> B D", h))     24.6 kB per rank
""")


@sharded("B F/tp, F/tp D -> B D", layout=EXPLICIT)
def silu_of_an_expression(x, w):
    return silu(einsum("B F/tp, F/tp D -> B D +tp", x, w))


wrong(silu_of_an_expression, """
silu: einsum(...) owes a sum over tp, and silu of a sum is not the sum of silu          model.py:3

  einsum(...)   B  D  +tp   owed since einsum at model.py:3, which contracts F/tp
                      ^^^

  silu(all_reduce("B D +tp -> B D", einsum("B F/tp, F/tp D -> B D +tp", x, w)))     24.6 kB per rank
""")


@sharded("B F/tp, F/tp D -> B D", layout=EXPLICIT)
def a_variable_bound_again(x, w):
    x = einsum("B F/tp, F/tp D -> B D +tp", x, w)
    x = silu(x)
    return x


wrong(a_variable_bound_again, """
silu: x owes a sum over tp, and silu of a sum is not the sum of silu          model.py:4

  x   B  D  +tp   owed since einsum at model.py:3, which contracts F/tp
            ^^^

  silu(all_reduce("B D +tp -> B D", x))     24.6 kB per rank
""")


@sharded("B T D, B T F, F D -> B T D")
def residual_plus_owed(x, a, down):
    y = einsum("B T F, F D -> B T D +tp", a, down)
    return x + y


wrong(residual_plus_owed, """
add: x is whole, y owes a sum over tp; the sum would count x once for every rank of tp          model.py:4

  x   B/dp  T  D
  y   B/dp  T  D  +tp   owed since einsum at model.py:3, which contracts F/tp
                  ^^^

  x + all_reduce("B/dp T D +tp -> B/dp T D", y)                                              1.6 MB per rank
  owe("B/dp T D -> B/dp T D +tp", x) + y                                                     free, then 1.6 MB later
  shard("B/dp T D -> B/dp T/tp D", x) + reduce_scatter("B/dp T D +tp -> B/dp T/tp D", y)     786.4 kB per rank, then 786.4 kB later
""", layout=Layout(B="dp", F="tp"))


@sharded("B E/tp, B E/tp D, B D -> B D", layout=EXPLICIT)
def shared_expert_reduced_with_the_others(weights, rows, shared):
    routed = einsum("B E/tp, B E/tp D -> B D +tp", weights, rows)
    return all_reduce("B D +tp -> B D", routed + shared)


wrong(shared_expert_reduced_with_the_others, """
add: shared is whole, routed owes a sum over tp; the sum would count shared once for every rank of tp          model.py:4

  routed   B  D  +tp   owed since einsum at model.py:3, which contracts E/tp
  shared   B  D
                 ^^^

  routed + owe("B D -> B D +tp", shared)     free
""")


@sharded("B F/tp, F/tp D, D -> B D", layout=EXPLICIT)
def bias_before_the_reduction(x, w, bias):
    return all_reduce("B D +tp -> B D", einsum("B F/tp, F/tp D -> B D +tp", x, w) + bias)


wrong(bias_before_the_reduction, """
add: bias is whole, einsum(...) owes a sum over tp; the sum would count bias once for every rank of tp          model.py:3

  einsum(...)   B  D  +tp   owed since einsum at model.py:3, which contracts F/tp
  bias             D
                      ^^^

  einsum("B F/tp, F/tp D -> B D +tp", x, w) + owe("D -> D +tp", bias)     free
""")


@sharded("B F/tp, F/tp D -> B D", layout=EXPLICIT)
def number_before_the_reduction(x, w):
    y = einsum("B F/tp, F/tp D -> B D +tp", x, w)
    return y + 1.0


wrong(number_before_the_reduction, """
add: y owes a sum over tp; 1.0 would be added once for every rank of tp          model.py:4

  y   B  D  +tp   owed since einsum at model.py:3, which contracts F/tp
            ^^^

  all_reduce("B D +tp -> B D", y) + 1.0     24.6 kB per rank
""")


@sharded("B F/tp, F/tp D, F/tp D -> B D", layout=EXPLICIT)
def product_of_two_owed(x, gate, up):
    g = einsum("B F/tp, F/tp D -> B D +tp", x, gate)
    u = einsum("B F/tp, F/tp D -> B D +tp", x, up)
    return g * u


wrong(product_of_two_owed, """
mul: g and u both owe a sum over tp; the product of two sums is not the sum of the products          model.py:5

  g   B  D  +tp   owed since einsum at model.py:3, which contracts F/tp
  u   B  D  +tp   owed since einsum at model.py:4, which contracts F/tp
            ^^^

  all_reduce("B D +tp -> B D", g) * all_reduce("B D +tp -> B D", u)     49.2 kB per rank
""")


@sharded("B F/tp, F/tp D, D V/tp -> B V/tp", layout=EXPLICIT)
def owed_times_split(x, down, head):
    h = einsum("B F/tp, F/tp D -> B D +tp", x, down)
    return einsum("B D +tp, D V/tp -> B V/tp", h, head)


wrong(owed_times_split, """
einsum: h owes a sum over tp, while V is split over tp; their pieces do not match          model.py:4

  h      B  D        +tp   owed since einsum at model.py:3, which contracts F/tp
  head      D  V/tp
                     ^^^

  einsum("B D, D V/tp -> B V/tp", all_reduce("B D +tp -> B D", h), head)     24.6 kB per rank
""")


@sharded("B V/tp -> B", layout=EXPLICIT)
def exp_of_an_owed_max(x):
    top = max("B V/tp -> B max:tp", x)
    return exp(top)


wrong(exp_of_an_owed_max, """
exp: top owes a max over tp; only all_reduce and reduce_scatter take one          model.py:4

  top   B  max:tp   owed since max at model.py:3, which runs over V/tp
           ^^^^^^

  exp(all_reduce("B max:tp -> B", top))     48 B per rank
""")


@sharded("B F/tp, F/tp D -> B D", layout=EXPLICIT)
def the_reduction_not_in_the_text(x, w):
    return einsum("B F/tp, F/tp D -> B D", x, w)


wrong(the_reduction_not_in_the_text, """
einsum: the result owes a sum over tp; the text says "B D"          model.py:3

  x        B  F/tp
  w           F/tp  D
  result   B        D  +tp   owed since F/tp is contracted
  text     B        D
                       ^^^

  all_reduce("B D +tp -> B D", einsum("B F/tp, F/tp D -> B D +tp", x, w))     24.6 kB per rank
""")


@sharded("B F/tp, F/tp D, D V -> B V", layout=EXPLICIT)
def the_text_takes_it_as_reduced(x, down, head):
    h = einsum("B F/tp, F/tp D -> B D +tp", x, down) * 2
    return einsum("B D, D V -> B V", h, head)


wrong(the_text_takes_it_as_reduced, """
einsum: h owes a sum over tp; the text takes "B D"          model.py:4

  h      B  D  +tp   owed since einsum at model.py:3, which contracts F/tp
  text   B  D
               ^^^

  einsum("B D, D V -> B V", all_reduce("B D +tp -> B D", h), head)             24.6 kB per rank
  all_reduce("B V +tp -> B V", einsum("B D +tp, D V -> B V +tp", h, head))     48.0 kB per rank
""")


@sharded("B F/tp, F/tp D -> B D", layout=EXPLICIT)
def returned_before_the_reduction(x, w):
    return einsum("B F/tp, F/tp D -> B D +tp", x, w)


wrong(returned_before_the_reduction, """
returned_before_the_reduction: the result owes a sum over tp; the signature says "B D"          model.py:1

  einsum(...)   B  D  +tp   owed since einsum at model.py:3, which contracts F/tp
  signature     B  D
                      ^^^

  return all_reduce("B D +tp -> B D", einsum("B F/tp, F/tp D -> B D +tp", x, w))     24.6 kB per rank
""")


# -- conversions that are not what they say ------------------------------------------------------------------

@sharded("B D -> B D", layout=EXPLICIT)
def all_reduce_of_a_whole_value(x):
    return all_reduce("B D +tp -> B D", x)


wrong(all_reduce_of_a_whole_value, """
all_reduce: x owes no sum over tp; reducing it would count it once for every rank of tp          model.py:3

  x      B  D
  text   B  D  +tp
  to     B  D
               ^^^

  x     free: nothing is owed
""")


@sharded("B F/tp, F/tp D -> B D", layout=EXPLICIT)
def reduced_twice(x, w):
    y = all_reduce("B D +tp -> B D", einsum("B F/tp, F/tp D -> B D +tp", x, w))
    z = y * 0.5
    return all_reduce("B D +tp -> B D", z)


wrong(reduced_twice, """
all_reduce: z owes no sum over tp; reducing it would count it once for every rank of tp          model.py:5

  z      B  D        paid since all_reduce at model.py:3
  text   B  D  +tp
  to     B  D
               ^^^

  z     free: nothing is owed
""")


@sharded("B T D -> B T/tp D", layout=EXPLICIT)
def reduce_scatter_of_a_whole_value(x):
    return reduce_scatter("B T D +tp -> B T/tp D", x)


wrong(reduce_scatter_of_a_whole_value, """
reduce_scatter: x owes no sum over tp; reducing it would count it once for every rank of tp          model.py:3

  x      B  T     D
  text   B  T     D  +tp
  to     B  T/tp  D
                     ^^^

  shard("B T D -> B T/tp D", x)     free
""")


@sharded("D +tp @dp:0 -> D", layout=EXPLICIT)
def all_reduce_of_what_one_coordinate_holds(x):
    return all_reduce("D +tp @dp:0 -> D", x)


wrong(all_reduce_of_what_one_coordinate_holds, """
all_reduce: what one coordinate holds owes no sum: "D @dp:0 +tp -> D"          model.py:3

  x      D  @dp:0  +tp   owed in the signature of all_reduce_of_what_one_coordinate_holds
  text   D  @dp:0  +tp
  to     D

  reshard("D @dp:0 +tp -> D", x)     5.1 kB per rank
""")


@sharded("B F/dp/tp, F/dp/tp D -> B D", layout=EXPLICIT)
def reduced_over_one_of_two_axes(x, w):
    y = einsum("B F/dp/tp, F/dp/tp D -> B D +dp +tp", x, w)
    return all_reduce("B D +tp -> B D", y)


wrong(reduced_over_one_of_two_axes, """
all_reduce: y owes a sum over dp; the text takes "B D +tp"          model.py:4

  y      B  D  +dp  +tp   owed since einsum at model.py:3, which contracts F/dp/tp
  text   B  D       +tp
  to     B  D
               ^^^

  all_reduce("B D +dp +tp -> B D", y)     28.7 kB per rank
""")


# -- splits --------------------------------------------------------------------------------------------------

@sharded("B/tp D, D F/tp -> B F/tp", layout=EXPLICIT)
def one_axis_on_two_dims(x, w):
    return einsum("B/tp D, D F/tp -> B F/tp", x, w)


wrong(one_axis_on_two_dims, """
einsum: axis tp splits both B and F; a rank would hold only the pairs on the diagonal          model.py:3

  x   B/tp  D
  w         D  F/tp
               ^^^^

  einsum("B D, D F/tp -> B F/tp", all_gather("B/tp D -> B D", x), w)     12.3 kB per rank
""")


@sharded("B F/tp, F D -> B D", layout=EXPLICIT)
def split_on_one_side_only(x, w):
    return einsum("B F/tp, F D -> B D", x, w)


wrong(split_on_one_side_only, """
einsum: F is split over tp in x, whole in w          model.py:3

  x   B  F/tp
  w      F     D
         ^^^^

  all_reduce("B D +tp -> B D", einsum("B F/tp, F/tp D -> B D +tp", x, shard("F D -> F/tp D", w)))     24.6 kB per rank
  einsum("B F, F D -> B D", all_gather("B F/tp -> B F", x), w)                                        49.2 kB per rank
""")


@sharded("B T V/tp -> B T V", layout=EXPLICIT)
def softmax_over_a_split_dim(x):
    return softmax(x, "V")


wrong(softmax_over_a_split_dim, """
softmax: V is split over tp in x; softmax needs all of V on each rank          model.py:3

  x   B  T  V/tp
            ^^^^

  softmax(all_gather("B T V/tp -> B T V", x), along="V")     3.1 MB per rank
""")


@sharded("B T D/tp, D/tp -> B T D", layout=EXPLICIT)
def rms_norm_over_a_split_dim(x, w):
    return rms_norm(x, w)


wrong(rms_norm_over_a_split_dim, """
rms_norm: D is split over tp in x; rms_norm needs all of D on each rank          model.py:3

  x   B  T  D/tp
  w         D/tp
            ^^^^

  rms_norm(all_gather("B T D/tp -> B T D", x), all_gather("D/tp -> D", w), eps=1e-06)     1.6 MB per rank
""")


@sharded("B V/tp -> B", layout=EXPLICIT)
def argmax_over_a_split_dim(logits):
    return argmax("B V -> B", logits)


wrong(argmax_over_a_split_dim, """
argmax: logits has V split over tp; the text takes "B V"          model.py:3

  logits   B  V/tp
  text     B  V
              ^^^^

  argmax("B V -> B", all_gather("B V/tp -> B V", logits))     24.0 kB per rank
""")


@sharded("B T/tp K G H, B S/tp K H, B S/tp K H, B S/tp -> B T/tp K G H", layout=EXPLICIT)
def attention_in_a_ring_with_a_mask(q, k, v, mask):
    return attention("B T/tp K G H, B S/tp K H, B S/tp K H, B S/tp -> B T/tp K G H", q, k, v, mask)


wrong(attention_in_a_ring_with_a_mask, """
attention: axis tp splits both T and S; a rank would hold only the pairs on the diagonal          model.py:3

  q      B        T/tp  K  G  H
  k      B  S/tp        K     H
  v      B  S/tp        K     H
  mask   B  S/tp
            ^^^^

  shard("B T K G H -> B T/tp K G H", attention("B T K G H, B S/tp K H, B S/tp K H, B S/tp -> B T K G H", all_gather("B T/tp K G H -> B T K G H", q), k, v, mask))     1.6 MB per rank
""", B=2, T=128, S=128, K=8, G=4, H=64)


@sharded("B/tp T K G H, B/tp S K H, B/tp S K H, B -> B/tp T K G H", layout=EXPLICIT)
def attention_from_a_whole_start(q, k, v, start):
    return attention("B/tp T K G H, B/tp S K H, B/tp S K H, B -> B/tp T K G H", q, k, v, start)


wrong(attention_from_a_whole_start, """
attention: B is split over tp in q, whole in start          model.py:3

  q       B/tp     T  K  G  H
  k       B/tp  S     K     H
  v       B/tp  S     K     H
  start   B
          ^^^^

  attention("B/tp T K G H, B/tp S K H, B/tp S K H, B/tp -> B/tp T K G H", q, k, v, shard("B -> B/tp", start))     free
""", B=8, T=128, S=128, K=8, G=4, H=64)


@sharded("B T K G H, B S K H, B S K H, B +tp -> B T K G H", layout=EXPLICIT)
def attention_from_a_start_that_owes(q, k, v, start):
    return attention("B T K G H, B S K H, B S K H, B +tp -> B T K G H", q, k, v, start)


wrong(attention_from_a_start_that_owes, """
attention: start owes a sum over tp, and attention of a sum is not the sum of attention          model.py:3

  q       B     T  K  G  H
  k       B  S     K     H
  v       B  S     K     H
  start   B                 +tp   owed in the signature of attention_from_a_start_that_owes
                            ^^^

  attention("B T K G H, B S K H, B S K H, B -> B T K G H", q, k, v, all_reduce("B +tp -> B", start))     48 B per rank
""", B=8, T=128, S=128, K=8, G=4, H=64)


@sharded("B K G/tp -> B (K G)", layout=EXPLICIT)
def merge_that_needs_a_strided_shard(x):
    return rearrange("B K G/tp -> B (K G)", x)


wrong(merge_that_needs_a_strided_shard, """
rearrange: G is split over tp and is not the first factor of (K G); a rank's rows would be strided          model.py:3

  x   B  K  G/tp
            ^^^^

  rearrange("B K G -> B (K G)", all_gather("B K G/tp -> B K G", x))     768 B per rank
""")


@sharded("B T/tp D, D -> B T/tp D", layout=EXPLICIT)
def norm(x, w):
    return rms_norm(x, w)


@sharded("B T D, D -> B T/tp D", layout=EXPLICIT)
def called_with_another_split(x, w):
    return norm(x, w)


wrong(called_with_another_split, """
norm: x has T whole; the signature of norm takes "B T/tp D"          model.py:3

  x           B  T     D
  signature   B  T/tp  D
                 ^^^^

  shard("B T D -> B T/tp D", x)     free
""", B=8, D=512, T=128)


# -- sizes unknown, long programs ----------------------------------------------------------------------------

@sharded("B F/tp, F/tp D -> B D", layout=EXPLICIT)
def sizes_that_nobody_said(x, w):
    h = einsum("B F/tp, F/tp D -> B D +tp", x, w)
    return silu(h)


wrong(sizes_that_nobody_said, """
silu: h owes a sum over tp, and silu of a sum is not the sum of silu          model.py:4

  h   B  D  +tp   owed since einsum at model.py:3, which contracts F/tp
            ^^^

  silu(all_reduce("B D +tp -> B D", h))     1.5 x the size of h per rank
""", B=8, D=0)


@sharded("B F, F F2, F2 F -> B F", layout=Layout(F2="tp"))
def late_in_a_long_program(x, up, down):
    for _ in range(30):
        h = silu(einsum("B F, F F2 -> B F2", x, up))
        x = x + einsum("B F2, F2 F -> B F", h, down)
    y = einsum("B F2, F2 F -> B F +tp", h, down)
    return silu(x + y)


wrong(late_in_a_long_program, """
add: x is whole, y owes a sum over tp; the sum would count x once for every rank of tp          model.py:7

  x   B  F
  y   B  F  +tp   owed since einsum at model.py:6, which contracts F2/tp
            ^^^

  x + all_reduce("B F +tp -> B F", y)                                    24.6 kB per rank
  shard("B F -> B/tp F", x) + reduce_scatter("B F +tp -> B/tp F", y)     12.3 kB per rank, then 12.3 kB later
""", B=8, F=512, F2=2048)


@sharded("B D, D -> B D", layout=EXPLICIT)
def values_in_a_list(x, w):
    layers = [x]
    for _ in range(40):
        layers.append(layers[-1] + layers[-1] * w)
    return all_reduce("B D +tp -> B D", layers[-1])


wrong(values_in_a_list, """
all_reduce: layers[-1] owes no sum over tp; reducing it would count it once for every rank of tp          model.py:6

  layers[-1]   B  D
  text         B  D  +tp
  to           B  D
                     ^^^

  layers[-1]     free: nothing is owed
""")


# -- scan ----------------------------------------------------------------------------------------------------

class Mlp(Params):
    up: Tensor = param("D F")
    down: Tensor = param("F D")


class Model(Params):
    layers: Mlp = stacked("L", Mlp)


@sharded("B D, * -> B D")
def layer(x, w: Mlp):
    return x + einsum("B F, F D -> B D", silu(einsum("B D, D F -> B F", x, w.up)), w.down)


@sharded("B D, * -> B D +tp", layout=EXPLICIT)
def layer_that_owes(x, w: Mlp):
    return owe("B D -> B D +tp", x)


@sharded("B D, * -> B D")
def scan_over_a_split_dim(x, w: Model):
    return scan(layer, x, w.layers)


wrong(scan_over_a_split_dim, """
scan: L is split over dp/tp in w.layers.up; the stages of a pipeline are those of one axis          model.py:3

  w.layers.up   L/dp/tp  D  F
                ^^^^^^^
""", layout=Layout(L=("dp", "tp")))


class Gate(Params):
    gain: Tensor = param("D")
    up: Tensor = param("D F")


class Gates(Params):
    gates: Gate = stacked("L", Gate)


@sharded("B D, * -> B D")
def gated(x, w: Gate):
    return x * w.gain * einsum("D F -> D", w.up)


@sharded("B D, * -> B D")
def scan_over_a_dim_that_is_split_in_one_place(x, w: Gates):
    return scan(gated, x, w.gates)


wrong(scan_over_a_dim_that_is_split_in_one_place, """
scan: L is split over tp in w.gates.gain, whole in w.gates.up; a layout that begins with L splits it everywhere          model.py:3

  w.gates.gain   L/tp  D
  w.gates.up     L     D  F/tp
                 ^^^^
""", layout=Layout(F="tp", L="tp"))


@sharded("B D, * -> B D +tp", layout=EXPLICIT)
def carry_that_changes_type(x, w: Model):
    return scan(layer_that_owes, x, w.layers)


wrong(carry_that_changes_type, """
scan: the carry goes into layer_that_owes as "B D" and owes a sum over tp when it comes out; it must come out as it went in          model.py:3

  in    B  D
  out   B  D  +tp
              ^^^
""")


# -- at the line that traces ---------------------------------------------------------------------------------

@sharded("B T/tq D -> B T D", layout=EXPLICIT)
def unknown_axis(x):
    return x


wrong(unknown_axis, """
spec "B T/tq D": unknown axis tq; the mesh has dp, tp          model.py:1
""")


@sharded("B T D -> B T D")
def unknown_axis_in_a_step(x):
    y = silu(x)
    return reshard("B T D -> B T/tq D", y)


wrong(unknown_axis_in_a_step, """
spec "B T/tq D": unknown axis tq; the mesh has dp, tp          model.py:4
""")


@sharded("B T D -> B T D")
def unknown_axis_in_the_layout(x):
    return x


wrong(unknown_axis_in_the_layout, """
layout, dim T: unknown axis tq; the mesh has dp, tp
""", layout=Layout(T="tq"))


@sharded("B T D -> B T D")
def dim_twice(x):
    return einsum("B T D -> B T D D", x)


wrong(dim_twice, """
spec "B T D D": dim D appears twice; give the second one its own letter          model.py:3
""")


@sharded("B T D -> B T D")
def axis_twice(x):
    return shard("B T D -> B/tp T/tp D", x)


wrong(axis_twice, """
spec "B/tp T/tp D": axis tp is used twice; an axis splits one dim, or is owed, once          model.py:3
""")


@sharded("B T D, D F -> B T F")
def too_few_operands(x, w):
    return einsum("B T D, D F, F -> B T F", x, w)


wrong(too_few_operands, """
einsum "B T D, D F, F -> B T F": the text has 3 operand specs, 2 operands were given          model.py:3
""")


@sharded("B T D, D F -> B T F")
def dims_of_something_else(x, w):
    return einsum("B T F, F D -> B T D", x, w)


wrong(dims_of_something_else, """
einsum "B T F, F D -> B T D": x has dims B T D, not B T F          model.py:3
""")


@sharded("B T F -> B T D")
def result_of_other_dims(x):
    return silu(x)


wrong(result_of_other_dims, """
result_of_other_dims: the result has dims B T F, not B T D          model.py:1
""")


@sharded("B T -> B T, B")
def too_few_results(x):
    return silu(x)


wrong(too_few_results, """
too_few_results: it returns 1, its signature "B T -> B T, B" names 2 results          model.py:1
""")


@sharded("B D, T D -> B T D")
def dims_of_which_either_may_come_first(x, w):
    return x + w


wrong(dims_of_which_either_may_come_first, """
add: either of B and T may come first; add("B D, T D -> B T D", x, y) says the order          model.py:3
""")


@sharded("B T -> B T")
def branch_on_data(x):
    if mean("B T -> ()", x):
        x = silu(x)
    return x


wrong(branch_on_data, """
if: a traced value has no truth; a branch on data would let ranks part ways; use where(mask, a, b)          model.py:3
""")


@sharded("B F/tp, F/tp D, B D -> B D", layout=EXPLICIT)
def comparison_of_a_sum(x, w, bar):
    return where(greater_equal(einsum("B F/tp, F/tp D -> B D +tp", x, w), bar), bar, bar)


wrong(comparison_of_a_sum, """
compare: einsum(...) owes a sum over tp, and compare of a sum is not the sum of compare          model.py:3

  einsum(...)   B  D  +tp   owed since einsum at model.py:3, which contracts F/tp
  bar           B  D
                      ^^^

  greater_equal(all_reduce("B D +tp -> B D", einsum("B F/tp, F/tp D -> B D +tp", x, w)), bar)     24.6 kB per rank
""")


@sharded("B T -> B T")
def comparison(x):
    return where(x == 0, x, x)


wrong(comparison, """
==: a traced value has no numbers yet; equal(x, y) and not_equal(x, y) make masks          model.py:3
""")


@sharded("B D, D F -> B F")
def matmul_sign(x, w):
    return x @ w


wrong(matmul_sign, """
matmul: "@" does not say which dims it contracts; write einsum("B T D, D F -> B T F", x, w)          model.py:3
""")


@sharded("B T -> B T")
def function_of_torch(x):
    return torch.exp(x)


wrong(function_of_torch, """
torch.exp: it is called on a traced value; the ops of shardlib know what a split and an owed sum are, those of torch do not          model.py:3
""")


CAPTURED = torch.ones(4)


@sharded("B T -> B T")
def captured_tensor(x):
    return x + CAPTURED


wrong(captured_tensor, """
add: the other operand is a Tensor, no traced value; make it an argument of the @sharded function          model.py:3
""")


@sharded("B T -> B T")
def captured_tensor_in_a_call(x):
    return where(CAPTURED, x, x)


wrong(captured_tensor_in_a_call, """
where: operand 1 is a Tensor, no traced value; make it an argument of the @sharded function          model.py:3
""")



# -- what nobody has written ---------------------------------------------------------------------------------

@sharded("T/tp S, B/tp T S, B/tp T S -> B/tp T S", layout=EXPLICIT)
def a_narrow_operand_first(seen, scores, other):
    return where(greater(seen, 0.0), scores, other)


wrong(a_narrow_operand_first, """
where: T is split over tp in greater(...), whole in scores          model.py:3

  greater(...)         T/tp  S
  scores         B/tp  T     S
  other          B/tp  T     S
                       ^^^^

  where(all_gather("T/tp S -> T S", greater(seen, 0.0)), scores, other)     0.75 x the size of greater(...) per rank
""")


@sharded("T D, D -> T D", layout=EXPLICIT)
def expressions_that_look_alike(x, w):
    return silu(x) * silu(shard("D -> D/tp", w))


wrong(expressions_that_look_alike, """
mul: D is whole in silu(x), split over tp in silu(shard("D -> D/tp", w))          model.py:3

  silu(x)                       T  D
  silu(shard("D -> D/tp", w))      D/tp
                                   ^^^^

  silu(x) * all_gather("D/tp -> D", silu(shard("D -> D/tp", w)))     1.5 kB per rank
""")


@sharded("B/dp D -> B/dp D", layout=EXPLICIT)
def of_pieces(x):
    return x * 2.0


@sharded("B D -> B D", layout=EXPLICIT)
def of_all(x):
    return x * 2.0


@sharded("B D, () -> B D", layout=EXPLICIT)
def an_expression_for_a_branch(x, s):
    return cond(s, of_pieces, of_pieces, silu(x))


wrong(an_expression_for_a_branch, """
cond: silu(...) has B whole; the signature of of_pieces takes "B/dp D"          model.py:3

  silu(...)   B     D
  signature   B/dp  D
              ^^^^
""")


@sharded("B/dp D, () -> B/dp D", layout=EXPLICIT)
def branches_of_other_types(x, s):
    return cond(s, of_pieces, of_all, x)


wrong(branches_of_other_types, """
cond: of_pieces takes x as "B/dp D", of_all "B D"; both take and return the same types          model.py:3
""")


@sharded("B D, D -> B")
def a_max_that_nothing_took(x, w):
    return einsum("B D max:tp, D -> B", x, w)


wrong(a_max_that_nothing_took, """
einsum: x cannot be made what is wanted: there is no way from "B D" to "B D max:tp"; a maximum is owed only by what took it          model.py:3
""")


@pytest.mark.parametrize("name", CASES)
def test_the_message_is(name):
    case = CASES[name]
    assert case.message() == case.says


@pytest.mark.parametrize("name", CASES)
def test_a_message_is_short_and_in_the_users_words(name):
    text = CASES[name].message()
    assert len(text.split("\n")) <= 12
    assert not re.search(r"\bv\d+\b|\boffered\b|\brank \d", text)


# -- the offered code, pasted --------------------------------------------------------------------------------

def offers(message):
    """The lines of code that a message offers."""
    found = [re.fullmatch(r"  (\S.*?) {5,}(?:free|[\d.]+ [kMG]?B per rank|[\d.]+ x the size).*", line)
             for line in message.split("\n")[1:]]
    return [m[1] for m in found if m]


def bare(node):
    """The text of an expression without its conversions, spec strings and options: what it computes."""
    class Strip(ast.NodeTransformer):
        def visit_Call(self, call):
            self.generic_visit(call)
            if getattr(call.func, "id", "") in MOVES:
                return call.args[1]
            return ast.Call(call.func, [a for a in call.args
                                        if not (isinstance(a, ast.Constant) and isinstance(a.value, str))],
                            [])
    return ast.unparse(Strip().visit(ast.parse(ast.unparse(node), mode="eval").body))


def pasted(f, message, code):
    """The function with `code` in place of the expression that the message complains about."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(f.fn)))
    op = message.split(":")[0].split(" ")[0]
    line = int(re.search(r"model\.py:(\d+)", message.split("\n")[0])[1])
    if code.startswith("return "):
        spot = next(n for n in ast.walk(tree) if isinstance(n, ast.Return)).value
        new = ast.parse(code).body[0].value
    else:
        new = ast.parse(code, mode="eval").body
        same = [n for n in ast.walk(tree)
                if isinstance(n, ast.expr) and getattr(n, "lineno", 0) == line and bare(n) == bare(new)]
        signs = {"add": ast.Add, "mul": ast.Mult}
        called = [n for n in same if isinstance(n, ast.Call) and n.func.id == op or isinstance(n, ast.BinOp)
                  and isinstance(n.op, signs.get(op, ()))]
        spot = (called or same)[0]

    class Paste(ast.NodeTransformer):
        def visit(self, node):
            return new if node is spot else self.generic_visit(node)
    space = {**vars(shardlib.functions), **vars(shardlib), **f.fn.__globals__}
    exec(compile(ast.fix_missing_locations(Paste().visit(tree)), "<pasted>", "exec"), space)
    return space[f.__name__]


PASTES = [(name, code) for name, case in CASES.items() for code in offers(case.says)]


def test_most_messages_offer_code():
    assert len({name for name, _ in PASTES}) >= 25


@pytest.mark.parametrize("name, code", PASTES)
def test_offered_code_types(name, code):
    case = CASES[name]
    program = case.lower(pasted(case.f, case.says, code))
    assert parse_program(str(program), ops=OPS) == program


@pytest.mark.parametrize("name, code", PASTES)
def test_offered_code_means_the_same_on_one_rank_and_on_eight(name, code):
    case = CASES[name]
    fixed = pasted(case.f, case.says, code)
    sizes = {k: 5 for k in (*SIZES, *case.sizes, "H", "S", "F2")}
    results = []
    for mesh in (Mesh(dp=1, tp=1), MESH):
        program = lower(fixed, case.layout, mesh=mesh)
        draw = torch.Generator().manual_seed(0)
        whole = {path: torch.randn(mesh.local_shape(kind.whole(), sizes, {}), generator=draw,
                                   dtype=torch.float64) / 5
                 for path, kind in program.arg_leaves()}
        whole |= {path: (10 * x).round().long() for path, x in whole.items() if path == "start"}
        whole |= {path: x > 0 for path, x in whole.items() if path == "mask"}
        shards = {path: place(whole[path], kind, sizes, mesh) for path, kind in program.arg_leaves()}
        outs = simulate(program, mesh, [{path: s[rank] for path, s in shards.items()}
                                        for rank in range(mesh.world_size)], sizes)
        results.append(join([out["0"] for out in outs], program.result_leaves()[0][1], sizes, mesh))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


# -- mistakes that are not in one function -------------------------------------------------------------------

def said(call, *args, **kwargs):
    """The message of the SpecError that a call raises, its lines counted from the enclosing test's."""
    first = inspect.currentframe().f_back.f_code.co_firstlineno
    with pytest.raises(SpecError) as caught:
        call(*args, **kwargs)
    return re.sub(r"test_errors\.py:(\d+)", lambda m: f"model.py:{int(m[1]) - first + 1}", str(caught.value))


@pytest.mark.parametrize("seen, dims", [(", ()", "()"), (", B T", "B T")])
def test_attention_of_a_mask_without_keys(seen, dims):
    text = f"B T K G H, B S K H, B S K H{seen} -> B T K G H"

    @sharded("B T K G H, B S K H, B S K H, B -> B T K G H")
    def f(q, k, v, start):
        return attention(text, q, k, v, start)
    assert said(lower, f, mesh=MESH) == (
        f'attention "{text}": a mask has S, and any of B, K, G, T, not {dims}          model.py:7')


@pytest.mark.parametrize("seen", ["", ", *", ", B, B"])
def test_attention_of_other_specs(seen):
    text = f"B T K G H, B S K H, B S K H{seen} -> B T K G H"

    @sharded("B T K G H, B S K H, B S K H, B -> B T K G H")
    def f(q, k, v, start):
        return attention(text, q, k, v, start)
    assert said(lower, f, mesh=MESH) == (
        f'attention "{text}": the specs are those of "B T K G H, B S K H, B S K H -> B T K G H", with a fourth, '
        '"B" of a start or "B T S" of a mask, where one is given          model.py:7')


def test_attention_of_a_fourth_spec_without_a_fourth_operand():
    text = "B T K G H, B S K H, B S K H, B -> B T K G H"

    @sharded("B T K G H, B S K H, B S K H -> B T K G H")
    def f(q, k, v):
        return attention(text, q, k, v)
    assert said(lower, f, mesh=MESH) == (
        f'attention "{text}": the specs are those of "B T K G H, B S K H, B S K H -> B T K G H", with a fourth, '
        '"B" of a start or "B T S" of a mask, where one is given          model.py:6')


def test_attention_from_a_start_of_another_dim():
    @sharded("B T K G H, B S K H, B S K H, T -> B T K G H")
    def f(q, k, v, start):
        return attention("B T K G H, B S K H, B S K H, T -> B T K G H", q, k, v, start)
    assert said(lower, f, mesh=MESH) == (
        'attention "B T K G H, B S K H, B S K H, T -> B T K G H": a start says where the queries of each B '
        'stand; its dim is B, not T          model.py:4')


def test_axis_twice_in_a_signature():
    def decorate():
        @sharded("B/tp T/tp -> B T")
        def f(x):
            return x
    assert said(decorate) == ('spec "B/tp T/tp": axis tp is used twice; an axis splits one dim, or is owed, '
                              'once          model.py:3')


def test_dim_twice_in_a_signature():
    def decorate():
        @sharded("D D -> D")
        def f(x):
            return x
    assert said(decorate) == (
        'spec "D D": dim D appears twice; give the second one its own letter          model.py:3')


def test_signature_of_another_number_of_arguments():
    def decorate():
        @sharded("B T -> B T")
        def f(x, eps):
            return x
    assert said(decorate) == ('f: the signature "B T -> B T" names 1 arguments, the function takes 2 (x, '
                              'eps); static ones come after a "*,"'
                              '          model.py:3')


@pytest.mark.parametrize("text, message", [
    ("", 'an empty string is no spec; the scalar is written "()"'),
    ("B  T/",
     "spec 'B  T/': 'T/' is neither a dim (D, D/tp, D/1, 4, (K G H), (E B T)~J) nor owed (+tp, max:tp, @pp:0)"),
    ("B +tp T", "spec 'B +tp T': T stands after +tp; dims come before what is owed"),
    ("B (K G/tp)", "spec 'B (K G/tp)': in the group (K G/tp) only the first factor may be split"),
    ("B (K", "spec 'B (K': items are separated by blanks, and each parenthesis has its partner"),
    ("B +tp max:dp",
     'spec "B max:dp +tp": an owed max beside an owed sum has no meaning; reduce one of them first'),
])
def test_specs(text, message):
    assert said(parse, text) == message


def test_layouts_and_meshes():
    assert said(Layout, B=("dp", "dp")) == "layout: B is split over dp/dp; an axis splits a dim once"
    assert said(Layout.parse, "B=dp,B=tp") == "layout 'B=dp,B=tp': dim B is given twice"
    assert said(Mesh, dp=2, ep=("dp", "tp")) == (
        "mesh: alias ep names dp, tp; it may name each of the axes dp once")
    assert said(Mesh.parse, "dp=2;tp=4") == "mesh 'dp=2;tp=4': 'dp=2;tp=4' is not NAME=SIZE"


def test_too_few_ranks_for_the_mesh():
    launched = Launch(rank=0, world_size=4, local_rank=0, local_world_size=4, launched=True)
    assert said(launched.check, MESH) == ("mesh dp=2,tp=4 has 8 ranks, but torchrun started 4 processes; "
                                          "start torchrun --nproc-per-node 8, or change the mesh")
    assert said(Launch().check,
                MESH) == ("mesh dp=2,tp=4 has 8 ranks, but this process was started without torchrun; "
                          "start torchrun --nproc-per-node 8, or change the mesh")


def test_op_outside_of_a_sharded_function():
    assert said(silu, torch.ones(3)) == (
        "silu was called outside of a @sharded function; put the computation into one, and call that")


def test_value_of_another_trace():
    kept = []

    @sharded("B T -> B T")
    def f(x):
        kept.append(x)
        old = kept[0]
        return x + old
    lower(f, mesh=MESH)
    assert said(lower, f, mesh=MESH) == (
        "add: old belongs to another trace; a function takes all it uses as arguments          model.py:8")


@sharded("B D, D F -> B F")
def project(x, w):
    return einsum("B D, D F -> B F", x, w)


def first(call, *args, **kwargs):
    """The message without the line that it ends with, which is the function's own."""
    text, where = said(call, *args, **kwargs).rsplit("          ", 1)
    assert where.startswith("model.py:")
    return text


def test_sizes_that_conflict():
    program = lower(project, mesh=Mesh(tp=1))
    assert first(bind_sizes, program, {"x": (2, 3), "w": (4, 5)}, {}, Mesh(tp=1), {"tp": 0}) == (
        "project: D is 3 by x, and 4 by w")
    assert first(bind_sizes, program, {"x": (2, 3), "w": (3, 5)}, {"D": 4}, Mesh(tp=1), {"tp": 0}) == (
        "project: D is 4 by sizes, and 3 by x")
    assert first(bind_sizes, program, {"x": (2, 3, 4), "w": (3, 5)}, {}, Mesh(tp=1), {"tp": 0}) == (
        "project: x has 3 dims, its spec B D has 2")


def test_tensors_whose_sizes_conflict():
    assert first(project, torch.ones(2, 3), torch.ones(4, 5)) == "project: D is 3 by x, and 4 by w"


def test_size_that_only_an_op_needs():
    @sharded("B -> B T S")
    def mask(start):
        return causal_mask("B -> B T/1 S/1", start)
    program = lower(mask, mesh=MESH)
    assert said(Emitter(MESH, 0, dict(B=2, T=3)).program, program) == (
        "causal_mask: no argument holds all of S; say its global size: sizes=dict(S=...)          model.py:4")


@pytest.mark.parametrize("size", ["__import__('os')", 1.5, -1, True, None])
def test_sizes_are_integers(size):
    program = lower(project, mesh=MESH)
    assert said(bind_sizes, program, {"x": (2, 3), "w": (3, 5)}, {"D": size}, MESH, {"tp": 0}) == (
        f"sizes: D is {size!r}; a size is an integer of at least 0")


def test_size_that_no_argument_holds():
    mesh = Mesh(tp=2)
    program = lower(project, Layout(F="tp"), mesh=mesh)
    assert first(bind_sizes, program, {"x": (2, 3), "w": (3, 5)}, {}, mesh, {"tp": 0}) == (
        "project: w holds only a piece of F; say its global size: sizes=dict(F=...)")


@pytest.mark.parametrize("rows", [1, 3])
def test_piece_that_is_not_as_large_as_the_sizes_say(rows):
    """F is told by another argument: too few rows, and too many, of each rank's piece."""
    @sharded("B D, D F, F/1 -> B F, F/1")
    def beside(x, w, bias):
        return einsum("B D, D F -> B F", x, w), bias
    mesh = Mesh(tp=2)
    program = lower(beside, Layout(F="tp"), mesh=mesh)
    for rank, here in ((0, 3), (1, 2)):
        given = {"x": (2, 3), "w": (3, here), "bias": (5,)}
        assert bind_sizes(program, given, {}, mesh, {"tp": rank}) == dict(B=2, D=3, F=5)
        wrong = here - 2 + rows
        assert first(bind_sizes, program, {**given, "w": (3, wrong)}, {}, mesh, {"tp": rank}) == (
            f"beside: w has {wrong} rows of F/tp; with F=5 this rank holds {here}")


def test_gradient_of_something_else_than_a_scalar():
    @sharded("B D, D F -> B F")
    def scores(x, w):
        return einsum("B D, D F -> B F", x, w)
    assert said(lower, value_and_grad(scores, ("w",)), mesh=MESH) == (
        "value_and_grad: scores returns B F; it must return one scalar, ()          model.py:2")


def test_gradient_of_an_op_without_one():
    @sharded("D, D F -> ()")
    def best(x, w):
        return argmax("F -> ()", einsum("D, D F -> F", x, w))
    assert said(lower, value_and_grad(best, ("w",)), mesh=MESH) == (
        "value_and_grad: argmax has no derivative; stop_gradient makes its operand a constant          "
        "model.py:4")


def test_gradient_by_no_argument():
    @sharded("B D -> ()")
    def loss(x):
        return mean("B D -> ()", x)
    assert said(value_and_grad, loss, ("v",)) == (
        "value_and_grad: loss has no argument v; the arguments are x          model.py:2")


def test_pytree_without_a_type():
    @sharded("* -> ()")
    def f(w):
        return w
    assert said(lower, f, mesh=MESH).split(";")[0] == 'f: w is "*" in "* -> ()", a pytree'


# -- facts, and their words ----------------------------------------------------------------------------------

@sharded("B D, * -> B D", layout=EXPLICIT)
def layer_with_a_mistake(x, w: Mlp):
    partial = owe("B D -> B D +tp", x)
    return silu(partial)


@sharded("B D, * -> B D", layout=EXPLICIT)
def scan_of_a_mistake(x, w: Model):
    y = silu(x)
    return scan(layer_with_a_mistake, y, w.layers)


def test_a_mistake_in_a_body_is_told_by_what_the_body_knows():
    with pytest.raises(SpecError) as caught:
        lower(scan_of_a_mistake, mesh=MESH, sizes=SIZES)
    first = layer_with_a_mistake.fn.__code__.co_firstlineno
    assert str(caught.value) == f"""
silu: partial owes a sum over tp, and silu of a sum is not the sum of silu          test_errors.py:{first + 3}

  partial   B  D  +tp   owed since owe at test_errors.py:{first + 2}
                  ^^^

  silu(all_reduce("B D +tp -> B D", partial))     24.6 kB per rank
""".strip("\n")


def test_completion_raises_a_fact_and_the_state_of_the_body():
    with pytest.raises(Refused) as caught:
        Completer(trace(scan_of_a_mistake), EXPLICIT, MESH).run()
    fact, state = caught.value.fact, caught.value.state
    assert (isinstance(fact, RuleRefuses) and fact.step in state.program.steps
            and str(fact.typed.ins[0]) == "B D +tp")
    assert state.program.name == "layer_with_a_mistake" and str(state.type_of("x")) == "B D"
    assert str(worded(caught.value)).startswith("silu: partial owes a sum over tp")


# -- every rank says the same, before it communicates --------------------------------------------------------

def test_every_rank_says_the_same():
    """Two processes with other hash seeds: nothing in a message depends on the order of a set."""
    code = ("import importlib.util, sys; spec = importlib.util.spec_from_file_location('test_errors', "
            "sys.argv[1]);"
            "m = importlib.util.module_from_spec(spec); sys.modules['test_errors'] = m; "
            "spec.loader.exec_module(m);"
            "print('\\n'.join(c.message() for c in m.CASES.values()))")
    started = [subprocess.Popen([sys.executable, "-c", code, __file__],
                                env={**os.environ, "PYTHONHASHSEED": seed, "RANK": rank}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for seed, rank in (("1", "0"), ("2", "3"))]
    outs = [process.communicate(timeout=60) for process in started]
    assert outs[0][0] == outs[1][0] == "\n".join(c.says for c in CASES.values()) + "\n", outs[0][1]


def test_a_mistake_is_found_before_any_communication():
    class Silent:
        """A runtime on which nothing can be communicated."""
        mesh, rank, coordinate, device = MESH, 0, MESH.coordinate(0), torch.device("cpu")

        def create_groups(self, products):
            raise AssertionError("a group was made")

        group = create_groups
    for name in ("silu_before_the_reduction", "residual_plus_owed", "reduced_twice"):
        case = CASES[name]
        compiled = shardlib.compile(case.f, case.layout, runtime=Silent(), sizes=case.sizes)
        with pytest.raises(SpecError):
            compiled(*(torch.ones([1] * len(spec.dims)) for spec in case.f.ins))


PROGRAM = """
@sharded("B F/tp, F/tp D -> B D", layout=EXPLICIT)
def f(x, w):
    y = einsum("B F/tp, F/tp D -> B D +tp", x, w)
    z = all_reduce("B D +tp -> B D", y)
    return silu(z)
""".replace("return silu(z)", "u = silu(z)\n    return u")


@pytest.mark.parametrize("was, now, message", [
    ("silu(z)", "silu(y)",
     "silu: y owes a sum over tp, and silu of a sum is not the sum of silu          line 6"),
    ("return u", "return y", 'this is no program: "B D +tp" stands where "B D" is said, line 7'),
    ('D +tp", x', 'D", x', 'this is no program: "B D +tp" stands where "B D" is said, line 3'),
    ("all_reduce", "all_gather", 'all_gather: it does not lead from "B D +tp" to "B D"          line 5'),
    ("silu", "os.system", "this is no program: line 6 is not of the printed form"),
    ("silu", "system", "this is no program: unknown op 'system', line 6"),
])
def test_a_changed_program_is_refused_as_it_is_read(was, now, message):
    assert parse_program(PROGRAM).name == "f"
    assert said(parse_program, PROGRAM.replace(was, now)) == message
