"""Other launchers' variables in the words of torchrun's: Slurm's srun, mpirun of Open MPI, MPICH and Intel.

>>> said = dict(SLURM_PROCID="5", SLURM_STEP_NUM_TASKS="8", SLURM_LOCALID="1", SLURM_NODEID="1",
...             SLURM_STEP_TASKS_PER_NODE="4(x2)", SLURM_STEP_NODELIST="gpu[03-04]", SLURM_JOB_ID="7")
>>> in_torchruns_words(said)                                            # doctest: +NORMALIZE_WHITESPACE
{'RANK': '5', 'WORLD_SIZE': '8', 'LOCAL_RANK': '1', 'LOCAL_WORLD_SIZE': '4', 'MASTER_ADDR': 'gpu03',
 'MASTER_PORT': '20217'}

What is set already stays as it is. A shell that srun started by itself is one process; so is a batch script,
whose variables say nothing of a step.
"""
from __future__ import annotations

import os
import re
from collections.abc import Mapping

from shardlib.errors import SpecError

MPI = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE"),
       ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"))
"""Rank, number of ranks, and both on this host, as Open MPI has them, and Hydra (MPICH, Intel MPI)."""
PORTS = range(20000, 30000)
TORCHRUN = ("torchrun", "--nproc-per-node")


def in_torchruns_words(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK and what else torchrun would set, and is not set; nothing where RANK is, or nobody launched more
    than one process. SpecError where nobody says at which host rank 0 is."""
    if "RANK" in environment:
        return {}
    words = _of_mpi(environment) or _of_slurm(environment)
    return {name: said for name, said in words.items() if name not in environment}


def launcher(environment: Mapping[str, str]) -> tuple[str, str]:
    """What started this process, and its option that says how many; torchrun, where nobody did.

    >>> launcher(dict(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2"))
    ('srun', '--ntasks')
    """
    if "TORCHELASTIC_RUN_ID" in environment:            # torchrun, which srun may have started on each host
        return TORCHRUN
    if any(environment.get(size, "1") != "1" for _, size, *_ in MPI):
        return "mpirun", "-n"
    return ("srun", "--ntasks") if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1" else TORCHRUN


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """By the variables of a step: srun sets them for each task."""
    rank, size = environment.get("SLURM_PROCID"), environment.get("SLURM_STEP_NUM_TASKS")
    if rank is None or size in (None, "1"):
        return {}
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks = [n for n, times in counts for _ in range(int(times or 1))]
    node, job, number = (int(re.sub(r"\D", "", environment.get(f"SLURM_{name}", "")) or 0)
                         for name in ("NODEID", "JOB_ID", "STEP_ID"))
    return {"RANK": rank, "WORLD_SIZE": str(size), "LOCAL_RANK": environment.get("SLURM_LOCALID", rank),
            "LOCAL_WORLD_SIZE": tasks[node] if node < len(tasks) else str(size),
            "MASTER_ADDR": first_host(environment.get("SLURM_STEP_NODELIST", "")),
            "MASTER_PORT": _port(31 * job + number)}


def _of_mpi(environment: Mapping[str, str]) -> dict[str, str]:
    names = next((names for names in MPI if names[0] in environment), None)
    if names is None or environment.get(names[1], "1") == "1":
        return {}
    rank, size, local_rank, local_size = (environment.get(name, "") for name in names)
    words = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank or rank,
             "LOCAL_WORLD_SIZE": local_size or size}
    if words["LOCAL_WORLD_SIZE"] == size:           # one host; its processes have one parent
        return {**words, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port(os.getppid())}
    if lacking := next((n for n in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(n)), None):
        raise SpecError(f"mpirun started {size} processes on several hosts, and {lacking} is not set: say "
                        "where rank 0 is, as in mpirun -x MASTER_ADDR=host0 -x MASTER_PORT=29500")
    return words


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts.

    >>> first_host("gpu-[003-004,9]-ib,login"), first_host("a1,a2")
    ('gpu-003-ib', 'a1')
    """
    found = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def _port(number: int) -> str:
    return str(PORTS[number % len(PORTS)])
