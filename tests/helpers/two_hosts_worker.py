"""One rank of the tests on two hosts, `two_hosts_worker.py FOLDER` under torchrun:
mesh dp=2,tp=2, with tp within a host and dp across.

It prints what it found as one object of JSON, then calls collectives without end. Files in the folder say so:
`RANK.loops`, that they go well; and `RANK.lives` is locked as long as the process is there.
"""
from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import torch
from conformance import check, fixed_cases, only

from shardlib import Mesh
from shardlib.distributed import Runtime, connect
from shardlib.errors import SpecError

GROUPS = (("tp",), ("dp",), ("dp", "tp"))


def places(runtime: Runtime) -> dict[str, Any]:
    """Where this rank is, and in each group: who else, who takes a small all_reduce, and who declined to."""
    groups = [runtime.group(axes) for axes in GROUPS]
    return {"rank": runtime.rank, "local_rank": runtime.local_rank, "name": os.uname().nodename,
            "hosts": list(runtime._places[GROUPS[-1]].hosts),
            "groups": {g.name: [list(g.ranks), g.route("all_reduce", torch.ones(4), "sum").name,
                                g.router.declined] for g in groups}}


def collectives(runtime: Runtime) -> list[str]:
    """What is wrong with every third of the conformance kit's cases, in each group by whoever takes them;
    all_reduce in memory alone."""
    found = [f"{case}: {text}" for axes in GROUPS for case in fixed_cases(axes, runtime.mesh.size(axes))[::3]
             for text in check(case, runtime.group(axes))]
    memory = only("shared memory", runtime.group(("tp",)))
    return found + [f"{case}: {text}" for case in fixed_cases(("tp",), 2) if case.collective == "all_reduce"
                    for text in check(case, memory)]


def messages(runtime: Runtime) -> dict[str, Any]:
    """From rank 0 to a reader beside it and two on the other host:
    small, large, many, and one that cannot be written."""
    group, queue = runtime.group(("dp", "tp")), runtime.open_queue(("dp", "tp"))

    def tell(message: Any) -> Any:
        return group.broadcast_message(message if runtime.rank == 0 else None, 0)
    got = [tell({"step": 3, "names": ["a", "b"]}), len(tell("x" * 3_000_000)),
           [tell(i) for i in range(200)] == list(range(200))]
    try:
        tell({"f": int})
    except SpecError as error:
        got.append(str(error))
    return {"got": got, "in memory": queue._ring is not None, "over the network": list(queue._far)}


def loop(runtime: Runtime, folder: Path) -> None:
    group = runtime.group(("dp",))
    for i in count(1):
        group.all_reduce(torch.ones(4), at="step 1 of total, model.py:7: N +dp -> N")
        time.sleep(0.01)
        if i == 100:        # by now the store has heard of it
            (folder / f"{runtime.rank}.loops").touch()


def main(folder: Path) -> None:
    lives = open(folder / f"{os.environ['RANK']}.lives", "w")
    fcntl.flock(lives, fcntl.LOCK_EX)
    with connect(Mesh(dp=2, tp=2), "cpu") as runtime:
        runtime.create_groups(GROUPS)
        found = {f.__name__: f(runtime) for f in (places, collectives, messages)}
        print(json.dumps(found), flush=True)
        loop(runtime, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
