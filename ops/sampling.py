"""sample: draw an index from softmax(logits / temperature), among the likeliest that make up top_p.

`sample("B V, B -> B", logits, position, temperature=0.8, top_p=0.95, seed=0)`: V is whole. The draw for row b
is a function of (seed, position[b], b) alone, b counted over all ranks: the same on every mesh. `sample("B V,
B, B -> B", logits, position, row)` draws by the number row[b] in place of b: where rows change places, their
draws go with them.
"""
from __future__ import annotations

import itertools

import torch
from torch import Tensor

from shardlib.errors import SpecError
from shardlib.language.local_code import LocalCode
from shardlib.language.value import Operand, Value, apply
from shardlib.params import uniform
from shardlib.program import Op, Step, number
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import parse_signature


def places(logits: Tensor, first: int) -> Tensor:
    """The number of each row here, the first being `first`."""
    return torch.arange(first, first + logits.shape[0], device=logits.device)


def draw(logits: Tensor, position: Tensor, row: Tensor, temperature: float, top_p: float,
         seed: int) -> Tensor:
    """One index a row, int64."""
    # at most 0, so that a low temperature gives no infinities
    above = logits.float() - logits.float().amax(-1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny  # what is smaller is 0 beside float32
    p, order = (above / max(temperature, tiny)).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = p.cumsum(-1) - p
    p = p * (before < max(top_p, tiny))
    u = uniform(position * 0x100000 + row, seed)[:, None] * p.sum(-1, keepdim=True).double()
    chosen = (p.double().cumsum(-1) <= u).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return order.gather(-1, chosen)[:, 0]


def _emit(e: LocalCode, step: Step, args: list[str]) -> str:
    o, (rows, _) = step.options, step.ins[0].dims
    row = args[2] if len(args) == 3 else f"{e.use(places)}({args[0]}, {e.rows(rows)[0]})"
    return f"{e.use(draw)}({args[0]}, {args[1]}, {row}, {o['temperature']!r}, {o['top_p']!r}, {o['seed']!r})"


def likeliest(p: list[float], top_p: float) -> list[int]:
    """The fewest indices that make up `top_p` of `p`, the likeliest first,
    the lower one first among equals."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    below = itertools.accumulate((p[i] for i in order), initial=0.0)
    return [i for i, sum in zip(order, below) if sum < top_p]


def _reference(d: Dims, *operands: Tensor) -> Tensor:
    """The index at which the likeliest, one after the other,
    exceed a share u of what they make up together."""
    def one(logits: Tensor, position: Tensor, row: int) -> int:
        p = (logits.double() / d.options["temperature"]).softmax(-1).tolist()
        kept = likeliest(p, d.options["top_p"])
        u = float(uniform(position * 2 ** 20 + row, d.options["seed"])) * sum(p[i] for i in kept)
        return next((i for i, upto in zip(kept, itertools.accumulate(p[i] for i in kept)) if upto > u),
                    kept[-1])
    rows = zip(*(d.close(x, spec) for x, spec in zip(operands, d.step.ins)),
               *([] if len(operands) == 3 else [itertools.count()]))
    return d.open(torch.tensor([one(*row) for row in rows], dtype=torch.int64), d.step.outs[0])


SAMPLE = Op("sample", keywords={"temperature": number, "top_p": number, "seed": number},
            rule=lambda s: Rule(whole=s.ins[0].names[1:]), emit=_emit, index=(1, 2),
            takes=("float", "index", "index"), dtype=lambda d, o: ["int64"], constant=True,
            reference=_reference)


def sample(text: str, logits: Operand, position: Operand, row: Operand | None = None, *, temperature: float,
           top_p: float = 1.0, seed: int = 0) -> Value:
    """One index a row, of softmax(logits / temperature), drawn by (seed, position, row) alone, on every mesh.

    The draw is among the likeliest that make up `top_p` (Holtzman et al. 2020). Without `row` a row's
    number is its place. Refused: a temperature of 0 (that is `argmax`), a split V.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> @sharded("B V, B -> B")
    ... def draw(logits, position):
    ...     return sample("B V, B -> B", logits, position, temperature=0.8, top_p=0.95, seed=1)
    >>> logits = torch.tensor([[0.0, 5.0, 5.0, 5.0]]).expand(6, 4)
    >>> position = torch.zeros(6, dtype=torch.int64)
    >>> [simulate(draw, Layout(B="dp"), logits, position, mesh=Mesh(dp=n)).tolist() for n in (1, 3)]
    [[1, 2, 2, 2, 2, 3], [1, 2, 2, 2, 2, 3]]
    """
    ins, outs = parse_signature(text)
    if ([len(s.dims) if s else 0 for s in (*ins, *outs)] not in ([2, 1, 1], [2, 1, 1, 1])
        or (len(ins) == 3) != (row is not None)):
        raise SpecError(f'sample "{text}": the specs are those of "B V, B -> B", or with the rows\' numbers '
                        'of "B V, B, B -> B"')
    if not temperature > 0 or not 0 < top_p <= 1:
        raise SpecError(f"sample: temperature is {temperature}, top_p {top_p}; temperature is above 0, top_p "
                        "above 0 and at most 1")
    return apply(SAMPLE, (logits, position) if row is None else (logits, position, row), text,
                 temperature=float(temperature), top_p=float(top_p), seed=int(seed))


TABLE = {"sample": SAMPLE}
