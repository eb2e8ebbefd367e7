"""shardlib: write a model once, as math on named dims; say in one line where the dims live."""
from shardlib.api import Compiled, Sharded, arg_types, compile, lower, shard_of, sharded, simulate, step, value_and_grad
from shardlib.cond import cond
from shardlib.einsum import einsum
from shardlib.errors import SpecError
from shardlib.explain import explain
from shardlib.layout import EXPLICIT, Layout
from shardlib.local import check_local, local
from shardlib.mesh import Mesh
from shardlib.moves import all_gather, all_reduce, all_to_all, owe, permute, reduce_scatter, reshard, shard
from shardlib.params import Params, init, param, stacked
from shardlib.pointwise import cast, exp, gelu, greater, less, log, relu, rsqrt, sigmoid, silu, square, stop_gradient, tanh, where
from shardlib.rearrange import rearrange, rename
from shardlib.prove import prove
from shardlib.reductions import argmax, logsumexp, max, mean, softmax, sum
from shardlib.scan import scan
from shardlib.spec import Spec, parse

__version__ = "0.1.0"
