"""srun and mpirun, by the variables that they set: what torchrun would have said."""
from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shardlib.distributed.launch import Launch
from shardlib.distributed.launchers import first_host, in_torchruns_words
from shardlib.errors import SpecError
from shardlib.mesh import Mesh

SRUN = dict(SLURM_PROCID="9", SLURM_STEP_NUM_TASKS="11", SLURM_LOCALID="1", SLURM_NODEID="2",
            SLURM_JOB_ID="123456", SLURM_STEP_ID="3", SLURM_STEP_TASKS_PER_NODE="4(x2),3",
            SLURM_STEP_NODELIST="n[7-9],m")
OPEN_MPI = dict(OMPI_COMM_WORLD_RANK="2", OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_LOCAL_RANK="0",
                OMPI_COMM_WORLD_LOCAL_SIZE="2")
HYDRA = dict(PMI_RANK="3", PMI_SIZE="4", MPI_LOCALRANKID="3", MPI_LOCALNRANKS="4")
ADDRESS = dict(MASTER_ADDR="host0", MASTER_PORT="29500")


@pytest.mark.parametrize("environment, launch", [
    (SRUN, Launch(9, 11, 1, 3, True)),
    ({**OPEN_MPI, **ADDRESS}, Launch(2, 4, 0, 2, True)),
    (HYDRA, Launch(3, 4, 3, 4, True)),
    ({**SRUN, **HYDRA}, Launch(3, 4, 3, 4, True)),                      # mpirun within an allocation
    ({**SRUN, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
     Launch(0, 2, 0, 2, True)),                                         # torchrun, by srun
    ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, Launch()),                  # srun --pty bash
    (dict(SLURM_PROCID="0", SLURM_NTASKS="8"), Launch()),               # a batch script
    (dict(PMI_RANK="0", PMI_SIZE="1"), Launch())])
def test_the_place_among_the_processes(environment: dict[str, str], launch: Launch) -> None:
    assert Launch.from_environment(environment) == launch


WORDS = dict(RANK="9", WORLD_SIZE="11", LOCAL_RANK="1", LOCAL_WORLD_SIZE="3", MASTER_ADDR="n7",
             MASTER_PORT=str(20000 + (31 * 123456 + 3) % 10000))


@pytest.mark.parametrize("missing, words", [
    ("SLURM_PROCID", {}), ("SLURM_STEP_NUM_TASKS", {}), ("SLURM_LOCALID", {**WORDS, "LOCAL_RANK": "9"}),
    ("SLURM_NODEID", {**WORDS, "LOCAL_WORLD_SIZE": "4"}), ("SLURM_JOB_ID", {**WORDS, "MASTER_PORT": "20003"}),
    ("SLURM_STEP_ID", {**WORDS, "MASTER_PORT": str(20000 + 31 * 123456 % 10000)}),
    ("SLURM_STEP_TASKS_PER_NODE", {**WORDS, "LOCAL_WORLD_SIZE": "11"}),
    ("SLURM_STEP_NODELIST", {**WORDS, "MASTER_ADDR": ""}), ("", WORDS)])
def test_a_variable_of_srun_that_is_missing(missing: str, words: dict[str, str]) -> None:
    assert in_torchruns_words({name: said for name, said in SRUN.items() if name != missing}) == words


@pytest.mark.parametrize("said, rank, local_size", [(OPEN_MPI, "2", "2"), (HYDRA, "3", "4")])
def test_a_variable_of_mpirun_that_is_missing(said: dict[str, str], rank: str, local_size: str) -> None:
    words = dict(RANK=rank, WORLD_SIZE="4", LOCAL_RANK=[*said.values()][2], LOCAL_WORLD_SIZE=local_size)
    for missing, wanted in zip((*said, ""), ({}, {}, {**words, "LOCAL_RANK": rank},
                                             {**words, "LOCAL_WORLD_SIZE": "4"}, words)):
        given = {name: value for name, value in said.items() if name != missing}
        assert in_torchruns_words({**given, **ADDRESS}) == wanted
        if wanted and wanted["LOCAL_WORLD_SIZE"] == "4":                # all on one host, which nobody names
            assert in_torchruns_words(given) == {**wanted, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(
                20000 + os.getppid() % 10000)}


def test_all_tasks_of_a_step_meet_at_its_first_host() -> None:
    places = [in_torchruns_words({**SRUN, "SLURM_PROCID": str(i)}) for i in range(11)]
    assert {p["MASTER_ADDR"] for p in places} == {"n7"} and len({p["MASTER_PORT"] for p in places}) == 1
    assert in_torchruns_words({**SRUN, "SLURM_STEP_ID": "4"})["MASTER_PORT"] != places[0]["MASTER_PORT"]
    assert "MASTER_ADDR" not in in_torchruns_words({**SRUN, **ADDRESS})
    assert [first_host(n) for n in ("a", "a[12]", "x[1,3]y,z", "")] == ["a", "a12", "x1y", ""]


def test_mpirun_on_several_hosts_is_told_where_rank_0_is() -> None:
    with pytest.raises(SpecError) as error:
        Launch.from_environment({**OPEN_MPI, "MASTER_ADDR": "host0"})
    assert str(error.value) == ("mpirun started 4 processes on several hosts, and MASTER_PORT is not set: "
                                "say where rank 0 is, as in mpirun -x MASTER_ADDR=host0 -x MASTER_PORT=29500")


@pytest.mark.parametrize("environment, says", [
    (SRUN, "srun started 11 processes; start srun --ntasks 2"),
    ({**OPEN_MPI, **ADDRESS}, "mpirun started 4 processes; start mpirun -n 2"),
    ({**SRUN, "TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "1"},
     "torchrun started 1 process; start torchrun --nproc-per-node 2"),
    ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, "this process was started without torchrun; start torchrun "
     "--nproc-per-node 2")])
def test_another_number_of_processes_is_told_in_the_launchers_words(environment: dict, says: str) -> None:
    with pytest.raises(SpecError) as error:
        Launch.from_environment(environment).check(Mesh(tp=2))
    assert str(error.value) == f"mesh tp=2 has 2 ranks, but {says}, or change the mesh"


PROGRAM = """
from shardlib import Mesh, connect
with connect(Mesh(tp=2), "cpu") as here:
    print(here.rank, flush=True)
"""


def test_two_tasks_of_a_step_meet() -> None:
    """As srun would start them, here."""
    step = {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_JOB_ID": str(os.getpid())}
    tasks = [subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, env={
        **os.environ, **step, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in range(2)]
    assert [task.communicate(timeout=120)[0] for task in tasks] == ["0\n", "1\n"]
