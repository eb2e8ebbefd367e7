"""Signatures: what a function of tensors takes and gives, by its specs and its parameters.

>>> def f(x, w, *, eps=1e-5): ...
>>> s = Signature(f, "B T D, D -> B T D")
>>> s.arg_names, s.static_names, [str(spec) for spec in s.outs]
(['x', 'w'], {'eps': False}, ['B T D'])

Every tensor argument and result has a spec; `*`, None here, is a pytree. Keyword-only arguments are static.
Refused: "...", as many specs as the function has no arguments for, and names that no program can say.
"""
from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

from shardlib.errors import SpecError
from shardlib.source import Where
from shardlib.spec import nameable, parse_signature


class Signature:
    """A Python function and its specs.

    static_names: of its static arguments, each with whether it must be given.
    """

    def __init__(self, fn: Callable, signature: str) -> None:
        self.fn, self.signature = fn, signature
        try:
            self.ins, self.outs = parse_signature(signature)
            if any(s is not None and s.ellipsis for s in (*self.ins, *self.outs)):
                raise SpecError(
                    f'{fn.__name__}: the signature "{signature}" has "..."; a signature names every dim')
        except SpecError as error:
            raise error.at(self.definition) from None
        self.__name__, self.__doc__, self.__wrapped__ = fn.__name__, fn.__doc__, fn
        parameters = inspect.signature(fn).parameters.values()
        self.static_names = {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}
        self.arg_names = [p.name for p in parameters if p.kind not in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)]
        rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
        more = range(1, len(self.ins) - len(self.arg_names) + 1) if rest else ()
        self.arg_names += [f"{rest}{i}" for i in more]          # of *xs: xs1, xs2
        if bad := next((n for n in self.arg_names if not nameable(n)), None):
            raise SpecError(f"{fn.__name__}: {bad!r} is no name for an argument; use letters, digits and "
                            "_").at(self.definition)
        if len(self.arg_names) != len(self.ins):
            raise SpecError(f'{fn.__name__}: the signature "{signature}" names {len(self.ins)} arguments, '
                            'the function takes '
                            f'{len(self.arg_names)} ({", ".join(self.arg_names)}); static ones come after a '
                            '"*,"').at(self.definition)

    @property
    def definition(self) -> Where:
        """The line on which the function begins."""
        code = self.fn.__code__
        return Where(code.co_filename, code.co_firstlineno)

    def hints(self) -> dict[str, Any]:
        """The annotations, as far as their names are known."""
        try:
            return typing.get_type_hints(self.fn)
        except NameError:
            return {n: self.fn.__globals__.get(t) if isinstance(t, str) else t
                    for n, t in self.fn.__annotations__.items()}
