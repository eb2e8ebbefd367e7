"""The functions of tensors that models are written with: pointwise ones, masks, and reductions along dims."""
from shardlib.language.along import cumsum, flip, roll
from shardlib.language.casts import cast, stop_gradient
from shardlib.language.constants import arange, full, ones, tril, zeros
from shardlib.language.draws import dropout, normal, uniform
from shardlib.language.extremes import all, any, argmax, argmin, max, min
from shardlib.language.masks import (
    equal,
    greater,
    greater_equal,
    less,
    less_equal,
    logical_and,
    logical_not,
    logical_or,
    maximum,
    minimum,
    not_equal,
    where,
)
from shardlib.language.meeting import add, div, mul, sub
from shardlib.language.pieces import concat, pad, slice, split, stack, unbind
from shardlib.language.pointwise import (
    abs,
    clamp,
    cos,
    erf,
    exp,
    expm1,
    gelu,
    log,
    log1p,
    log_sigmoid,
    pow,
    relu,
    rsqrt,
    sigmoid,
    silu,
    sin,
    softplus,
    sqrt,
    square,
    tanh,
)
from shardlib.language.reductions import mean, prod, sum
from shardlib.language.softmax import logsumexp, softmax
from shardlib.language.sorting import sort
from shardlib.language.topk import topk
from shardlib.language.variance import std, var
from shardlib.language.windows import windows

__all__ = ["abs", "add", "all", "any", "arange", "argmax", "argmin", "cast", "clamp", "concat", "cos",
           "cumsum", "div", "dropout", "equal", "erf", "exp", "expm1", "flip", "full", "gelu", "greater",
           "greater_equal", "less", "less_equal", "log", "log1p", "log_sigmoid", "logical_and",
           "logical_not", "logical_or", "logsumexp", "max", "maximum", "mean", "min", "minimum", "mul",
           "normal", "not_equal", "ones", "pad", "pow", "prod", "relu", "roll", "rsqrt", "sigmoid", "silu",
           "sin", "slice", "softmax", "softplus", "sort", "split", "sqrt", "square", "stack", "std",
           "stop_gradient", "sub", "sum", "tanh", "topk", "tril", "unbind", "uniform", "var", "where",
           "windows", "zeros"]
