"""shardlib: write a model once, as math on named dims; say in one line where the dims live.

The names here are all that most programs need, in the order in which one learns them. Functions of tensors
(silu, mean, ...) are in `shardlib.functions`, operators of models (attention, rms_norm, ...) in
`shardlib.ops`.
"""
from shardlib.api import compile, lower, sharded, simulate, step, value_and_grad
from shardlib.distributed.runtime import connect
from shardlib.errors import SpecError
from shardlib.language.cond import cond
from shardlib.language.einsum import einsum
from shardlib.language.local import local
from shardlib.language.rearrange import rearrange, rename
from shardlib.language.scan import scan
from shardlib.language.verbs import (
           all_gather,
           all_reduce,
           all_to_all,
           owe,
           permute,
           reduce_scatter,
           reshard,
           shard,
)
from shardlib.layout import EXPLICIT, Layout
from shardlib.mesh import Mesh
from shardlib.params import Params, init, nested, param, stacked, tree_map
from shardlib.placement import arg_types, shard_of
from shardlib.reports.explain import explain
from shardlib.reports.prove import prove
from shardlib.run.shards import gather, place

__version__ = "0.1.0"
__all__ = ["sharded", "einsum", "Mesh", "Layout", "lower", "SpecError", "Params", "param", "stacked",
           "nested", "init", "scan", "compile", "value_and_grad", "tree_map", "connect", "place", "gather",
           "arg_types", "shard_of", "explain", "prove", "simulate", "step", "rearrange", "rename", "cond",
           "local", "EXPLICIT", "all_gather", "all_reduce", "reduce_scatter", "all_to_all", "permute",
           "shard", "owe", "reshard"]
