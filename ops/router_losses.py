"""What training adds to the loss so that a router keeps all experts at work, and its logits small.

    aux = load_balancing_loss("L B T E, L B T J -> ()", logits, experts)
    z = router_z_loss("L B T E -> ()", logits)

Both are means over all tokens of all ranks and, where there is one, over the dim of layers. They are written
in the language, so that sums over what is split are owed, and paid, like any others.
"""
from __future__ import annotations

from shardlib.errors import SpecError
from shardlib.functions import logsumexp, mean, ones, softmax, square, sum
from shardlib.language.casts import WIDEN
from shardlib.language.value import Operand, Value, apply
from shardlib.ops.take import take
from shardlib.spec import Spec, parse_specs


def _words(spec: Spec) -> tuple[str, str]:
    """The text of a spec's dims but for the last, and of that."""
    *tokens, last = map(str, spec.dims)
    return " ".join(tokens), last


def load_balancing_loss(text: str, logits: Operand, experts: Operand) -> Value:
    """E times the sum over experts of the share of tokens that chose it times its mean probability (Fedus et
    al. 2021, eq. 4 to 6): J where all experts are alike, more where few get most.

    logits: of the router, experts last.  experts: those that each token chose, J of them, as `route` gives
    them. Dims of layers are averaged over before the product, as those of tokens are, which is what
    transformers does; for a loss of each layer, call it in each layer. Float32 at least.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> @sharded("T E, T J -> ()")
    ... def aux(logits, experts):
    ...     return load_balancing_loss("T E, T J -> ()", logits, experts)
    >>> even, logits = torch.tensor([[0], [1], [2], [3]]), 9 * torch.eye(4)
    >>> simulate(aux, Layout(T="dp"), logits, even, mesh=Mesh(dp=2))
    tensor(1.)
    >>> simulate(aux, Layout(T="dp"), logits[[0, 0, 0, 0]], 0 * even, mesh=Mesh(dp=2))
    tensor(3.9985)
    """
    meant = f'load_balancing_loss "{text}": the specs are those of "B T E, B T J -> ()"'
    ins, outs = parse_specs(text, meant)
    if (len(ins), len(outs)) != (2, 1) or len(ins[0].dims) < 2 or outs[0].dims or (
            ins[0].labels[:-1] != ins[1].labels[:-1] or ins[1].labels[-1] in ins[0].labels):
        raise SpecError(meant)
    (tokens, e), (_, j) = map(_words, ins)
    odds = mean(f"{tokens} {e} -> {e}", softmax(apply(WIDEN, (logits,)), along=ins[0].labels[-1]))
    chosen = take(f"{e}, {tokens} {j} -> {tokens} {j}", odds, experts)
    return sum(f"{j} -> ()", mean(f"{tokens} {j} -> {j}", chosen)) * sum(f"{e} -> ()", ones(e))


def router_z_loss(text: str, logits: Operand) -> Value:
    """The mean of the square of logsumexp(logits): it keeps the router's logits small (Zoph et al. 2022,
    eq. 5). Float32 at least.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> z = sharded("T E -> ()")(lambda logits: router_z_loss("T E -> ()", logits))
    >>> simulate(z, Layout(T="dp"), torch.zeros(3, 4), mesh=Mesh(dp=2)), torch.tensor(4.0).log() ** 2
    (tensor(1.9218), tensor(1.9218))
    """
    meant = f'router_z_loss "{text}": the specs are those of "B T E -> ()"'
    ins, outs = parse_specs(text, meant)
    if (len(ins), len(outs)) != (1, 1) or len(ins[0].dims) < 2 or outs[0].dims:
        raise SpecError(meant)
    tokens, e = _words(ins[0])
    return mean(f"{tokens} -> ()", square(logsumexp(f"{tokens} {e} -> {tokens}", apply(WIDEN, (logits,)))))
