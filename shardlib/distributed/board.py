"""The board: what ranks write of themselves in the store of torch.distributed, where all can read it.

>>> board = Board(dist.HashStore())
>>> board.write(1, State(beat=7, note="has ended"))
>>> {rank: str(state) for rank, state in board.read((0, 1)).items()}
{0: 'is in no collective, and has called none', 1: 'has ended'}

A state is as long as its rank has groups, whatever their sizes, and many are read in two calls.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from time import monotonic, sleep
from typing import Any

import msgspec
import torch.distributed as dist

from shardlib.distributed.scene import State
from shardlib.distributed.watch import Moment


class Board:
    """Over `store`, a connection that nobody else waits on, until it fails once: then there is none.

    asked: when a question began that has no answer yet.
    """

    def __init__(self, store: dist.Store) -> None:
        self.store: dist.Store | None = store
        self.asked: float | None = None
        self.where = f"the store{_on_host(store)}"

    def ask(self, question: Callable[[dist.Store], Any]) -> Any:
        """What the store answers; None once it does not."""
        if self.store is None:
            return None
        self.asked = monotonic()
        try:
            return question(self.store)
        except RuntimeError:
            self.store = None
            return None
        finally:
            self.asked = None

    def look(self, key: str) -> bytes | None:
        """What is under `key`, if anything is."""
        return self.ask(lambda s: s.get(key) if s.check([key]) else None)

    def wait(self, ready: Callable[[], Any], seconds: float) -> Any:
        """What `ready` gives, once that is something, or at the end; asked a dozen times at most."""
        until = monotonic() + seconds
        while not (found := ready()) and monotonic() < until:
            sleep(seconds / 12)
        return found

    def write(self, rank: int, state: State) -> None:
        """Readers go by the name of a group, and need no list of its ranks."""
        told = msgspec.structs.replace(state, now=_brief(state.now), last=_brief(state.last))
        self.ask(lambda s: s.set(str(rank), msgspec.msgpack.encode(told)))

    def read(self, ranks: Sequence[int]) -> dict[int, State]:
        """Their states; that of a rank that has never written one is empty."""
        keys = [str(rank) for rank in ranks]
        texts = self.ask(lambda s: s.multi_get(keys) if s.check(keys) else None)
        return {rank: _state(text) for rank, text in zip(ranks, texts or map(self.look, keys))}


def _brief(moment: Moment | None) -> Moment | None:
    return moment and msgspec.structs.replace(moment, ranks=())


def _state(text: bytes | None) -> State:
    try:
        return msgspec.msgpack.decode(text, type=State) if text else State()
    except msgspec.DecodeError:
        return State(left=True, note="has written what is no state")


def own_connection(store: dist.Store, timeout_s: float) -> dist.Store:
    """A connection to `store` that another thread may use."""
    made = store.clone() if hasattr(store, "clone") else store
    made.set_timeout(timedelta(seconds=timeout_s))
    return made


def _on_host(store: Any) -> str:
    """The host that holds the store for all ranks, where it is a TCPStore."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return f" on {store.host}" if isinstance(store, dist.TCPStore) else ""
