"""Tensors by name, as one member hands them to another:
what goes ahead of them, so that the receiver knows what comes.

>>> given = {"x": torch.ones(2, 3), "carry": (torch.ones(4), "D @pp:1")}
>>> labels, tensors = label("send_tensors over pp", given, torch.device("cpu"))
>>> labels[0].name, labels[0].dtype, labels[0].shape, labels[1].spec
('x', 'float32', (2, 3), 'D @pp:1')
>>> labels[1].value(tensors[1])
(tensor([1., 1., 1., 1.]), 'D @pp:1')

A value is a tensor, or a pair of a tensor and its spec, and arrives as what it was. The spec is the
receiver's: what goes to the next stage says "@pp:1" already. It is text for the reader of the other end, and
checked for its grammar and its number of dims.

Labels travel as one typed message, then the tensors one after another, each whole: that members of another
group hold the same tensor is nothing that a sender can know. Refused with a `SpecError` which is raised on
the receiver, too: dicts in dicts, whatever is no tensor, tensors that are sparse, nested, quantized, fake or
on some other device, specs that do not fit.
"""
from __future__ import annotations

from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor

from shardlib.distributed import messages
from shardlib.distributed.eager import bare, fault
from shardlib.errors import SpecError
from shardlib.spec import parse

Value = Tensor | tuple[Tensor, str]
"""A tensor, or a pair of a tensor and its spec."""

_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


class Label(msgspec.Struct, frozen=True, array_like=True):
    """What a receiver knows of a tensor before it comes."""
    name: str
    dtype: str
    shape: tuple[int, ...]
    on_cpu: bool
    spec: str | None = None

    def room(self, device: torch.device) -> Tensor:
        """An empty tensor of this shape and dtype, on the CPU, or else on `device`."""
        if self.dtype not in _DTYPES:
            raise SpecError(
                f"{self.name!r} is of dtype {self.dtype}, which this torch {torch.__version__} does not have")
        return torch.empty(self.shape, dtype=_DTYPES[self.dtype], device="cpu" if self.on_cpu else device)

    def value(self, x: Tensor) -> Value:
        """x, with the spec if there is one."""
        return x if self.spec is None else (x, self.spec)


def label(what: str, tensors: Mapping[str, Value], device: torch.device) -> tuple[list[Label], list[Tensor]]:
    """The labels of `tensors`, and the tensors, in the order of the dict.

    `what` begins the text of a refusal.
    """
    if not isinstance(tensors, Mapping):
        raise SpecError(f"{what}: a {type(tensors).__name__} is no dict of tensors by name")
    labels, given = [], []
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise SpecError(f"{what}: a tensor's name is a string, not {name!r}")
        x, spec = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
        x = bare(x) if isinstance(x, Tensor) else x
        wrong = _fault(x, device) or _spec_fault(x, spec)
        if wrong:
            raise SpecError(f"{what}: {name!r} {wrong}")
        labels.append(
            Label(name, str(x.dtype).removeprefix("torch."), tuple(x.shape), x.device.type == "cpu", spec))
        given.append(x)
    return labels, given


def _fault(x: object, device: torch.device) -> str | None:
    """Why x cannot be sent."""
    if isinstance(x, Mapping):
        return 'is a dict; give its tensors names of their own in the dict that is sent, as "x.y"'
    if not isinstance(x, Tensor):
        return f"is a {type(x).__name__}, not a tensor, nor a pair of a tensor and its spec"
    able = tuple(dict.fromkeys(("cpu", device.type)))
    return fault(x) or (None if x.device.type in able
                        else f"is on {x.device.type}; this group sends tensors on {' and '.join(able)}")


def _spec_fault(x: Tensor, spec: object) -> str | None:
    if spec is None:
        return None
    if not isinstance(spec, str):
        return f"has a spec of type {type(spec).__name__}, not a string"
    try:
        parsed = parse(spec)
    except SpecError as error:
        return f"comes with {error}"
    fits = x.ndim >= len(parsed.dims) if parsed.ellipsis else x.ndim == len(parsed.dims)
    return None if fits else f'has {x.ndim} dims; its spec "{spec}" has {len(parsed.dims)}'


def labelled(where: str, tensors: Mapping[str, Value], device: torch.device) -> tuple[bytes, list[Tensor]]:
    """The frame that goes ahead of `tensors`, or says why they do not come; and the tensors."""
    try:
        labels, given = label(where, tensors, device)
    except SpecError as error:
        return messages.refusal(str(error)), []
    return messages.frame(labels), given
