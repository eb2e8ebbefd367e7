"""Starts jobs of the fault matrix, a line of standard input each: `CASE PROCESSES FOLDER`.

Its standard output has the pid of each job's agent.

Each job has an agent of its own, torchrun's; agents and workers are forks of this process, which has torch
imported already. What the workers print goes to files in the folder, one a rank.

A worker calls nobody until all are forked: the agent's store looks up the name of whoever calls, in a thread
of its own, and a fork made meanwhile finds the lock of the C library's resolver taken, for ever.
"""
from __future__ import annotations

import os
import sys
from pathlib import Path

import fault_cases
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def launch(case: str, processes: int, folder: str) -> None:
    """One agent with its workers, as `torchrun --standalone` has them."""
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=processes,
                          run_id=f"shardlib-test-{Path(folder).name}", rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
                          start_method="fork", local_addr="localhost",
                          logs_specs=DefaultLogsSpecs(log_dir=f"{folder}/logs", redirects=Std.ALL))
    elastic_launch(config, fault_cases.rank_main)(case, folder)


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        case, processes, folder = line.split()
        agent = os.fork()
        if agent == 0:
            os.dup2(os.open(f"{folder}/agent", os.O_WRONLY | os.O_CREAT, 0o600), 2)
            os.environ |= {"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
            try:
                launch(case, int(processes), folder)
            except BaseException as error:
                print(type(error).__name__, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(agent, file=answers, flush=True)
        _reap()
    _reap()


def _reap() -> None:
    """Agents that have ended leave no zombies behind."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main()
