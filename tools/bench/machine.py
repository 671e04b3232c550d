"""What the figures were measured on, and how busy it was with other things."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import shmcbw
from shmcbw.sizes import format_size
from tools.bench.place import Place

TOOLS = (("qemu-img", "--version"), ("fio", "--version"), ("cp", "--version"), ("strace", "--version"))


def describe(places: Sequence[Place]) -> dict[str, Any]:
    """Plain data; the load averages are of one, five and fifteen minutes."""
    cpu = _cpu()
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "virtual": "hypervisor" in cpu.get("flags", ""),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "shmcbw": shmcbw.__version__,
        "tools": {name: _version(name, option) for name, option in TOOLS},
        "places": {place.name: place.file_system for place in places},
        "load_average": load_average(),
    }


def load_average() -> list[float]:
    return [round(each, 2) for each in os.getloadavg()]


class Others:
    """CPU time that the rest of the machine takes from now on, us and our children left out.

    Only children that have ended and been waited for are known as ours, so a measurement begins and ends without any.
    The kernel's own threads, which also work for us, count as others.
    """

    def __init__(self) -> None:
        self._started_s, self._all_s, self._ours_s = time.monotonic(), _all_cpu_s(), _our_cpu_s()

    def cpus(self) -> float:
        """How many CPUs others have kept busy on average."""
        seconds = time.monotonic() - self._started_s
        others_s = _all_cpu_s() - self._all_s - (_our_cpu_s() - self._ours_s)
        return max(0.0, others_s) / seconds if seconds else 0.0


def _all_cpu_s() -> float:
    """Seconds that all CPUs together were not idle, or stolen by the machine's host."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, interrupts, soft_interrupts, stolen = map(int, fields)
    return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")


def _our_cpu_s() -> float:
    return sum(os.times()[:4])


def lines(machine: dict[str, Any]) -> list[str]:
    """The same for people."""
    tools = ", ".join(version for version in machine["tools"].values() if version)
    missing = ", ".join(name for name, version in machine["tools"].items() if not version)
    return [
        f"{machine['cpu']}, {machine['cpus']} CPUs{' of a virtual machine' if machine['virtual'] else ''}, "
        f"{format_size(machine['memory_bytes'])}",
        f"Linux {machine['kernel']}, {machine['python']}, shmcbw {machine['shmcbw']}",
        tools + (f"; not installed: {missing}" if missing else ""),
        "places: " + ", ".join(f"{name} is {kind}" for name, kind in machine["places"].items()),
    ]


def _cpu() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _version(name: str, option: str) -> str:
    """The first line of what a program says of itself; empty if it is not there."""
    if shutil.which(name) is None:
        return ""
    said = subprocess.run([name, option], capture_output=True, text=True, check=False).stdout
    return said.partition("\n")[0].strip()
