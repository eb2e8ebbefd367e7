"""The functions of tensors that models are written with: pointwise ones, and reductions along dims."""
from shardlib.language.pointwise import (
           cast,
           exp,
           gelu,
           greater,
           less,
           log,
           relu,
           rsqrt,
           sigmoid,
           silu,
           square,
           stop_gradient,
           tanh,
           where,
)
from shardlib.language.reductions import argmax, logsumexp, max, mean, softmax, sum

__all__ = ["cast", "exp", "gelu", "greater", "less", "log", "relu", "rsqrt", "sigmoid", "silu", "square",
           "stop_gradient", "tanh", "where", "argmax", "logsumexp", "max", "mean", "softmax", "sum"]
