"""Two hosts on one machine, made of the kernel's namespaces, with a cable between them.

    with two_hosts() as hosts:
        job = hosts.torchrun(folder, [WORKER, folder])  # torchrun --nnodes 2 --nproc-per-node 2, on each host
        job.end()                                       # AssertionError if it does not in time
        job.said(3, "stdout")                           # by rank
        hosts.cut_cable()

A host has a network, a host name, a /dev/shm, and process numbers of its own; files are those of the machine,
as if both mounted one file server. The network reaches the other host and nothing else. Nothing has a name
outside: a host is its first process, which reads a pipe from here, and when that ends, however this process
ended, the kernel ends all others and takes all of it away.
"""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 120.0  # for the import of torch by six processes of a busy machine; what is tried takes seconds
OWN = ("--net", "--uts", "--ipc", "--mount")
UNSHARE = ("unshare", *OWN, "--pid", "--fork", "--kill-child", "--mount-proc")
BOOT = (
    'mount -t tmpfs -o mode=1777 tmpfs /dev/shm && hostname "$0" && ip link set lo up && echo up && exec cat')


def missing() -> str:
    """Why two hosts cannot be made here; "" where they can."""
    lacking = [f"{tool} ({package})" for tool, package in {"ip": "iproute2", "unshare": "util-linux",
                                                           "nsenter": "util-linux"}.items()
               if shutil.which(tool) is None]
    if lacking:
        return f"two hosts need {' and '.join(lacking)}"
    tried = subprocess.run([*UNSHARE, "sh", "-c", f"{BOOT} && ip link add eth0 type veth peer name eth1",
                            "host"], stdin=subprocess.DEVNULL,
                           capture_output=True, text=True)
    return f"two hosts are not permitted here: {tried.stderr.strip()}" if tried.returncode else ""


class Host:
    """One host, up as long as its first process reads `process.stdin`."""

    def __init__(self, number: int) -> None:
        self.number, self.address = number, f"192.0.2.{number + 1}"
        self.process = subprocess.Popen([*UNSHARE, "sh", "-c", BOOT, f"host{number}"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        self.inside = ("nsenter", "--target", str(self.process.pid), *OWN,
                       f"--pid=/proc/{self.process.pid}/ns/pid_for_children", "--")
        if self.process.stdout.readline() != "up\n":
            self.stop()
            raise AssertionError(f"host {number} did not come up")
        self.processes = os.readlink(f"/proc/{self.process.pid}/ns/pid_for_children")

    def run(self, *command: str) -> None:
        subprocess.run([*self.inside, *command], check=True)

    def stop(self) -> None:
        """Ends all its processes. What the kernel held of it goes with the last one."""
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()


class Hosts:
    """Both, the first of which holds the store."""

    def __init__(self, pair: Sequence[Host], agents: list[subprocess.Popen[bytes]]) -> None:
        self.pair, self.agents = tuple(pair), agents
        first, second = (str(host.process.pid) for host in pair)
        subprocess.run(["ip", "link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0",
                        "netns", second], check=True)
        for host in pair:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")

    def cut_cable(self) -> None:
        self.pair[0].run("ip", "link", "set", "eth0", "down")

    def torchrun(self, folder: Path, command: Sequence[str | Path], **environment: str) -> Job:
        """`command` of Python in two processes on each host. Its output goes to files in `folder`."""
        env = {name: value for name, value in os.environ.items()
               if not name.startswith(("TORCHELASTIC", "SHARDLIB"))}
        env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0",
                "PYTHONPATH": os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")]), **environment}
        agents = []
        for host in self.pair:
            agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2",
                     "--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint",
                     f"{self.pair[0].address}:29400", "--rdzv-conf", f"is_host={int(host.number == 0)}",
                     "--local-addr", host.address, "--redirects", "3", "--log-dir",
                     str(folder / f"host{host.number}")]
            with open(folder / f"agent{host.number}", "w") as log:
                agents.append(subprocess.Popen([*host.inside, *agent, *map(str, command)], env=env,
                                               stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        self.agents += agents
        return Job(folder, agents)


class Job:
    """Two agents of torchrun with their workers, running. They do not outlive their hosts."""

    def __init__(self, folder: Path, agents: Sequence[subprocess.Popen[bytes]]) -> None:
        self.folder, self.agents = folder, agents

    def wait(self, what: str, done: Callable[[], bool], seconds: float = DEADLINE_S) -> None:
        """AssertionError, with all that was said, if `done` has not come true in time."""
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                raise AssertionError(f"waited {seconds:.0f} s for {what}\n{self}")
            time.sleep(0.05)

    def end(self) -> None:
        """Waits until both agents have ended, and well."""
        self.wait("the job to end", lambda: None not in [agent.poll() for agent in self.agents])
        assert [agent.returncode for agent in self.agents] == [0, 0], str(self)

    def said(self, rank: int, stream: str = "stderr") -> str:
        """What a rank has written."""
        return "".join(file.read_text()
                       for file in self.folder.glob(f"host{rank // 2}/*/attempt_0/{rank % 2}/{stream}.log"))

    def __str__(self) -> str:
        files = sorted([*self.folder.glob("agent*"), *self.folder.glob("host*/**/*.log")])
        return "\n".join(f"-- {file.relative_to(self.folder)}\n{text[-3000:]}" for file in files
                         if (text := file.read_text()))


def processes(namespace: str) -> list[int]:
    """Those of a host, by the name of its `processes`, as the machine numbers them."""
    found = []
    for link in Path("/proc").glob("[0-9]*/ns/pid"):
        with suppress(OSError):
            found += [int(link.parts[2])] * (os.readlink(link) == namespace)
    return found


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Both hosts, up and connected; gone with all their processes at the end."""
    with ExitStack() as stack:
        pair, agents = [], []
        # last of all: they have ended with their hosts
        stack.callback(lambda: [agent.wait(10) for agent in agents])
        for number in range(2):
            pair.append(Host(number))
            stack.callback(pair[-1].stop)
        yield Hosts(pair, agents)
