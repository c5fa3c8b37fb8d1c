"""What the machine offers to this process: processors, memory, and its rank among processes.

Nothing here loads torch.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/sys/fs/cgroup")
_VM_STAT = Path("/usr/bin/vm_stat")  # on macOS
_SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def available_threads() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Processes:
    """This process among `size`; the first one reports and writes files."""

    rank: int = 0
    local: int = 0  # rank among the processes of this machine, and the number of its GPU
    size: int = 1
    on_machine: int = 1  # how many of them share this machine

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def processes() -> Processes:
    """This process among others, by the environment that torchrun sets; alone without it."""
    values = [os.environ.get(name, "") for name in _SET_BY_TORCHRUN]
    if not all(values) or not all(value.isdecimal() for value in values[:3]):
        return Processes()
    rank, local, size = map(int, values[:3])
    own = os.environ.get("LOCAL_WORLD_SIZE", "")  # which not all that start processes set
    on_machine = int(own) if own.isdecimal() else size
    return Processes(rank, local, size, min(max(on_machine, 1), size))


def peak_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    # getrusage also counts the memory of the parent when it started this process
    if (found := _kilobytes(_STATUS, "VmHWM")) is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes; its peak if the system reports no other."""
    found = _kilobytes(_STATUS, "VmRSS")
    return peak_bytes() if found is None else found


def total_bytes() -> int:
    """Host memory of the machine, or of the container if it may use less, in bytes."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = container_limit()
    return installed if limit is None else min(installed, limit)


def container_limit() -> int | None:
    """Host memory that this container may use, in bytes; None without a limit."""
    return _number(_CGROUP / "memory.max")


def available_bytes() -> int:
    """RAM that is free without swapping, in bytes, within what a container may take."""
    free = _kilobytes(_MEMINFO, "MemAvailable")
    if free is None:
        free = _free_on_mac()
    if free is None:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = container_limit(), _number(_CGROUP / "memory.current")
    if limit is None or used is None:
        return free
    cached = _file_cache(_CGROUP / "memory.stat")  # counts as used, and is freed on demand
    return max(0, min(free, limit - used + cached))


def _free_on_mac() -> int | None:
    """Bytes that macOS calls free, speculative or inactive; None if it does not say.

    `vm_stat` prints `(page size of 16384 bytes)`, then lines such as `Pages free:  1234.`
    """
    if not _VM_STAT.is_file():
        return None
    try:
        done = subprocess.run([_VM_STAT], capture_output=True, timeout=10, check=True)
        text = done.stdout.decode("ascii")
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    page = re.search(r"page size of (\d+) bytes", text)
    kinds = r"^Pages (?:free|speculative|inactive): +(\d+)\.$"
    counts = re.findall(kinds, text, re.MULTILINE)
    return int(page[1]) * sum(map(int, counts)) if page and counts else None


def _kilobytes(path: Path, key: str) -> int | None:
    """Bytes of a line such as `VmRSS:   1234 kB`; None if the file does not have it."""
    if not path.is_file():
        return None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _file_cache(path: Path) -> int:
    """Bytes of files that a container has in memory."""
    if not path.is_file():
        return 0
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return sum(int(words[1]) for words in lines if words[0] in ("inactive_file", "active_file"))


def _number(path: Path) -> int | None:
    """The number in a control file; None if there is none, or the file cannot be read."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() else None


def processor_flags() -> frozenset[str]:
    """What the processor can do, as Linux names it; empty where the system does not say."""
    if not _CPUINFO.is_file():
        return frozenset()
    for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
