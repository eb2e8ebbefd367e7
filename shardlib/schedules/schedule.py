"""A schedule: for each rank a list of actions, and nothing else. A user's own is a file, a line a rank.

>>> schedule = Schedule.parse('''
... 0F0 0F1 0B0 0B1        # rank 0: stage 0, microbatches 0 and 1
... 1F0 1B0 1F1 1B1
... ''')
>>> schedule.stages, schedule.microbatches, schedule.rank_of[1]
(2, 2, 1)
>>> print(schedule)
0F0 0F1 0B0 0B1
1F0 1B0 1F1 1B1

An action is (stage, kind, microbatch), and is written as torch.distributed.pipelining writes it. Kinds: F
forward; B backward; or, where backward is in two, I what the stage before waits for, the cotangent of the
carry, and W the rest, the gradients of the weights. A rank may have several stages. Stages have
as many layers each, or those of a first line "layers 5 3". Refused with a `SpecError`: a list that is not
this, an action that is missing or comes twice, a stage on two ranks.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from shardlib.errors import SpecError

_ACTION = re.compile(r"([0-9]{1,6})([FBIW])([0-9]{1,6})")
MAX_ACTIONS = 1 << 20


class Action(NamedTuple):
    """What a rank does at once."""
    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @property
    def goes(self) -> int:
        """In which direction its result is sent: 1 to the next stage, -1 to the one before, 0 nowhere."""
        return {"F": 1, "W": 0}.get(self.kind, -1)


@dataclass(frozen=True)
class Schedule:
    """The actions of each rank, in order.

    after: of decoding, for each microbatch, a step of a group of rows, which one is the step before; -1 where
    it is the first. It begins with the token that the last stage has chosen there, and tells all others.
    layers: how many each stage has; (): the same, but for one.
    """
    ranks: tuple[tuple[Action, ...], ...]
    after: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str, after: Sequence[int] = ()) -> Schedule:
        """From a line a rank; what follows # is passed over."""
        lines = [words for line in text.splitlines() if (words := line.partition("#")[0].split())]
        ranks, layers = [], lines.pop(0)[1:] if lines and lines[0][0] == "layers" else []
        if wrong := next((n for n in layers if not re.fullmatch("[0-9]{1,6}", n)), None):
            raise SpecError(f"schedule: {wrong!r} is no number of layers")
        for line in lines:
            found = [(word, _ACTION.fullmatch(word)) for word in line]
            if wrong := next((word for word, match in found if match is None), None):
                raise SpecError(f"schedule: {wrong!r} is no action; one is a stage, F, B, I or W, and a "
                                "microbatch, as in 2F0")
            ranks.append(tuple(Action(int(m[1]), m[2], int(m[3])) for _, m in found if m))
        return cls(tuple(ranks), tuple(after), tuple(map(int, layers))).checked()

    def __str__(self) -> str:
        lines = [f"layers {' '.join(map(str, self.layers))}"] if self.layers else []
        return "\n".join([*lines, *(" ".join(map(str, actions)) for actions in self.ranks)])

    def cut(self, *layers: int) -> Schedule:
        """The same with so many layers on each stage: fewer on one that has more besides.

        >>> print(Schedule.parse("0F0\\n1F0").cut(5, 3))
        layers 5 3
        0F0
        1F0
        """
        return replace(self, layers=layers).checked()

    @property
    def actions(self) -> list[Action]:
        return [action for actions in self.ranks for action in actions]

    @cached_property
    def rank_of(self) -> dict[int, int]:
        """Where each stage is."""
        return {action.stage: rank for rank, actions in enumerate(self.ranks) for action in actions}

    @cached_property
    def stages(self) -> int:
        return len(self.rank_of)

    def on(self, rank: int) -> list[int]:
        """The stages of a rank."""
        return [stage for stage, at in self.rank_of.items() if at == rank]

    @cached_property
    def microbatches(self) -> int:
        return len({action.microbatch for action in self.actions})

    @cached_property
    def kinds(self) -> str:
        """Those of its actions, as a microbatch has them: F, FB or FIW."""
        return "".join(kind for kind in "FBIW" if any(a.kind == kind for a in self.actions))

    @cached_property
    def split(self) -> bool:
        """Whether backward is in two."""
        return "I" in self.kinds

    @cached_property
    def _next(self) -> dict[int, int]:
        return {before: m for m, before in enumerate(self.after) if before >= 0}

    def before(self, action: Action) -> list[Action]:
        """The actions whose results it takes: on its own rank, and the one that another stage sends."""
        stage, kind, m = action
        back = "I" if self.split else "B"
        if kind == "F":
            token = self.after[m] if self.after and stage < self.stages - 1 else -1
            return [*([Action(self.stages - 1, "F", token)] if token >= 0 else []),
                    *([Action(stage - 1, "F", m)] if stage else [])]
        if kind == "W":
            return [Action(stage, "I", m)]
        return [Action(stage, "F", m), *([Action(stage + 1, back, m)] if stage + 1 < self.stages else [])]

    def sends(self, action: Action) -> list[int]:
        """The stages that its result goes to, where these are other ranks'."""
        to = [action.stage + action.goes] if action.goes else []
        if action.stage == self.stages - 1 and action.microbatch in self._next:
            to += range(self.stages - 1)
        return [s for s in to if 0 <= s < self.stages and self.rank_of[s] != self.rank_of[action.stage]]

    def checked(self) -> Schedule:
        """SpecError unless every stage does the same for every microbatch, once, on one rank."""
        actions = self.actions
        if not actions or len(actions) > MAX_ACTIONS:
            raise SpecError(f"schedule: it has {len(actions)} actions; from 1 to {MAX_ACTIONS} are allowed")
        if twice := next((a for a, n in Counter(actions).items() if n > 1), None):
            raise SpecError(f"schedule: {twice} comes twice")
        if (kinds := self.kinds) not in ("F", "FB", "FIW"):
            raise SpecError(f"schedule: its actions are {', '.join(kinds)}; they are F alone, F and B, or F, "
                            "I and W")
        stages, batches = (max(values) + 1 for values in ({a.stage for a in actions},
                                                          {a.microbatch for a in actions}))
        if stages * batches * len(kinds) > MAX_ACTIONS:
            raise SpecError(f"schedule: {stages} stages of {batches} microbatches are too many")
        there = {*actions}
        missing = next((a for s in range(stages) for m in range(batches) for kind in kinds
                        if (a := Action(s, kind, m)) not in there), None)
        if missing:
            raise SpecError(f"schedule: {missing} is missing; each stage does {', '.join(kinds)} of every "
                            "microbatch")
        if self.after and (kinds != "F" or len(self.after) != batches or any(
                not -1 <= before < m for m, before in enumerate(self.after))
                or max(Counter(b for b in self.after if b >= 0).values(), default=1) > 1):
            raise SpecError("schedule: after says of each microbatch of decoding which one it follows: an "
                            "earlier one, that no other follows, or -1")
        counted = all(type(n) is int and n >= 0 for n in self.layers)
        if self.layers and (len(self.layers) != stages or not counted):
            raise SpecError(f"schedule: layers are {', '.join(map(str, self.layers))}; each of {stages} "
                            "stages has a number of them")
        for rank, mine in enumerate(self.ranks):
            if other := next((a for a in mine if self.rank_of[a.stage] != rank), None):
                raise SpecError(f"schedule: stage {other.stage} is on ranks {rank} and "
                                f"{self.rank_of[other.stage]}; a stage is one rank's")
        return self


def schedule(ranks: Sequence[Sequence[Action]], after: Sequence[int] = ()) -> Schedule:
    """The schedule of these lists, looked over."""
    return Schedule(tuple(map(tuple, ranks)), tuple(after)).checked()
