"""The command `shardlib`: what a bug report needs to say about a machine.

    $ shardlib --version
    shardlib 0.1.0
    python    3.11.7 (CPython)
    platform  Linux-6.1.0-x86_64-with-glibc2.36
    cpus      2
    torch     2.13.0+cpu
    triton    3.7.1
    numpy     2.4.6
    cuda      not available (torch is built without CUDA)
    nccl      not available
    gpus      none

A package or a driver that is missing or broken is a line of the report, never an error. triton is not
imported.
"""

import argparse
import os
import platform
from collections import Counter
from collections.abc import Callable
from importlib import metadata


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit status."""
    parser = argparse.ArgumentParser(prog="shardlib",
                                     description="A functional sharding library for PyTorch.")
    parser.add_argument("--version", action="store_true",
                        help="print the versions and devices that a bug report needs")
    if parser.parse_args(argv).version:
        print(version_report())
    else:
        parser.print_help()
    return 0


def version_report() -> str:
    """shardlib's version, then a fact a line about the machine it runs on."""
    facts: dict[str, Callable[[], str]] = {
        "python": lambda: f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform,
        "cpus": _cpus,
        "torch": _torch,
        "triton": lambda: metadata.version("triton"),
        "numpy": lambda: metadata.version("numpy"),
        "cuda": _cuda,
        "nccl": _nccl,
        "gpus": _gpus,
    }
    lines = [f"shardlib {_fact(lambda: metadata.version('shardlib'))}"]
    return "\n".join(lines + [f"{name:<9} {_fact(read)}" for name, read in facts.items()])


def _fact(read: Callable[[], str]) -> str:
    try:
        return read()
    except metadata.PackageNotFoundError:
        return "not installed"
    except Exception as error:  # a broken driver raises whatever it likes, and the report must still come out
        return f"not available ({type(error).__name__}: {str(error).partition(chr(10))[0]})"


def _cpus() -> str:
    count = os.cpu_count() or 0
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    return f"{count}" if usable == count else f"{count}, {usable} usable"


def _torch() -> str:
    import torch

    return torch.__version__


def _cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return "not available (torch is built without CUDA)"
    return torch.version.cuda if torch.cuda.is_available() else f"{torch.version.cuda}, not available"


def _nccl() -> str:
    import torch

    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return "not available"
    return ".".join(map(str, torch.cuda.nccl.version()))


def _gpus() -> str:
    import torch

    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = Counter(f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)"
                    for gpu in devices)
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none"
