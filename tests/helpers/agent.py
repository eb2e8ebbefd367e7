"""torchrun --standalone in a process that has torch imported, and so with ranks that have: the agent is
torchrun's, the ranks are forks of it.

    agent.py PROCESSES SCRIPT [ARGUMENT ...]

A rank calls nobody until all are forked: see fault_launcher.py.
"""
from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import traceback
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def rank(all_forked: Any, command: list[str]) -> None:
    """Runs the script as Python would."""
    for of_the_agent in (signal.SIGTERM, signal.SIGINT):
        signal.signal(of_the_agent, signal.SIG_DFL)
    sys.argv, code = command, 1
    all_forked.wait()
    sys.path.insert(0, os.path.dirname(command[0]))
    try:
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)      # by returning, it would say that all went well


if __name__ == "__main__":
    count = int(sys.argv[1])
    elastic_launch(LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=f"shardlib-test-{os.getpid()}",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0,
        monitor_interval=0.1, start_method="fork", logs_specs=DefaultLogsSpecs()), rank)(
            multiprocessing.get_context("fork").Barrier(count), sys.argv[2:])
