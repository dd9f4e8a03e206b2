"""Facts about the machine and the software that a number is worth nothing without."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastclip
from fastclip._native import C

TREE = Path(__file__).resolve().parent.parent
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def _text(path: Path | str) -> str:
    file = Path(path)
    return file.read_text() if file.is_file() else ""


def _value_after(text: str, key: str) -> str:
    """From a file of ``key: value`` lines."""
    return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(key)), "")


def cache_bytes(level: int) -> int | None:
    """Size of the first core's cache of that level, data or unified; None where the kernel does not say."""
    for index in sorted(CACHES.glob("index*")):
        if _text(index / "level").strip() == str(level) and _text(index / "type").strip() != "Instruction":
            size = _text(index / "size").strip()
            return int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]]
    return None


def last_level_cache_bytes() -> int | None:
    return next((size for level in (4, 3, 2) if (size := cache_bytes(level))), None)


class Others:
    """How busy other processes, and other tenants of the hardware, keep the CPUs from now on."""

    def __init__(self) -> None:
        self._start = self._ticks()

    @staticmethod
    def _ticks() -> tuple[float, float, float]:
        """Seconds of CPU time so far: of all CPUs, of that spent working or stolen, of this process and children."""
        fields = _text("/proc/stat").partition("\n")[0].split()[1:9]  # user nice system idle iowait irq softirq steal
        seconds = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
        own = os.times()
        return sum(seconds), sum(seconds) - sum(seconds[3:5]), sum(own[:4])

    def share(self) -> float | None:
        """Of all CPU time; None where the kernel does not say, or too little has passed to tell."""
        total, busy, own = (now - then for now, then in zip(self._ticks(), self._start, strict=True))
        return min(1.0, max(0.0, (busy - own) / total)) if total > 0.2 else None


def facts() -> dict[str, Any]:
    memory_kib = _value_after(_text("/proc/meminfo"), "MemTotal").removesuffix(" kB")
    return {
        "cpu": _value_after(_text("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "l2_bytes": cache_bytes(2),
        "l3_bytes": cache_bytes(3),
        "memory_bytes": int(memory_kib) * 1024 if memory_kib else None,
        "transparent_hugepages": _chosen(_text("/sys/kernel/mm/transparent_hugepage/enabled")),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def peak_memory_bytes() -> int:
    """Of this program: unlike ``ru_maxrss``, without what its parent had; 0 where the kernel does not say."""
    return 1024 * int(_value_after(_text("/proc/self/status"), "VmHWM").removesuffix(" kB") or 0)


def _chosen(setting: str) -> str:
    """From "always [madvise] never"."""
    return setting.partition("[")[2].partition("]")[0] or "unknown"


def versions() -> dict[str, Any]:
    return {
        "fastclip": fastclip.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "backend": os.environ.get("FASTCLIP_BACKEND") or ("reference" if C is None else "cpu"),
        "cpu_capability": None if C is None else C.cpu_capability(),
    }


@functools.cache
def commit() -> str | None:
    """What FASTCLIP_COMMIT says, for a tree that was copied without its history; else that of the source tree that this
    file is in; None for an installed copy or without git."""
    if told := os.environ.get("FASTCLIP_COMMIT"):
        return told
    if not (TREE / ".git").exists():
        return None
    git = ["git", "-C", str(TREE)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + (" and uncommitted changes" if changed.stdout.strip() else "")
