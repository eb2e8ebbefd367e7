"""What fails in generated code, said in the user's words:
the op, what torch said, and the line that asked for it.

    einsum: The size of tensor a (3) must match the size of tensor b (4) at dimension 1     model.py:12

torch's own error is the cause. What a function in `local` raises, and a lack of memory, stay what they are,
for who catches them, with the line as a note; what a collective raises passes as it is, since it names the
step itself.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from shardlib.compiler.refusals.user_source import WORDS
from shardlib.distributed.rank_error import RankError
from shardlib.errors import SpecError
from shardlib.language.exchanges import meets_over
from shardlib.program import Step
from shardlib.source import Where

Lines = Mapping[str, Sequence[Step | None]]
"""By the file of generated code, the step that each of its lines is of."""


def explain_failure(error: Exception, lines: Lines, where: Where | None = None) -> None:
    """Raises the SpecError that says where in a program `error` was raised;
    returns where `error` itself is to be raised.

    where: the user's line, for code that was made for another one.
    """
    step = _step(error, lines)
    if step is None or step.op.wire or meets_over(step) or isinstance(error, RankError):
        return
    where = where or step.where
    if isinstance(error, SpecError):
        raise error.at(where) from error.__cause__
    if step.op.function or _no_memory(error):
        error.add_note(f"in {WORDS.get(step.op.name, step.op.name)}{f' at {where}' if where else ''}")
        return
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    raise SpecError(f"{WORDS.get(step.op.name, step.op.name)}: {said}").at(where) from error


def _step(error: Exception, lines: Lines) -> Step | None:
    """The step whose line was running, in the innermost generated code."""
    found, at = None, error.__traceback__
    while at is not None:
        if (steps := lines.get(at.tb_frame.f_code.co_filename)) is not None:
            found = steps[at.tb_lineno - 1]
        at = at.tb_next
    return found


def _no_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
