"""The machine: its processors, and a description of it for the results measured on it."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

import fastsam
from fastsam import kernels


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """CPU model, cores, load before the run, instruction set, memory, versions, threads, date (UTC); and of a GPU."""
    described = {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": _memory_gib(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch_optimizer": _version("pytorch_optimizer"),
        "fastsam": fastsam.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_properties(torch.device(device))
        described["gpu"] = gpu.name
        described["gpu_memory_gib"] = round(gpu.total_memory / 2**30, 1)
        described["gpu_capability"] = f"{gpu.major}.{gpu.minor}"
        described["gpu_l2_mib"] = getattr(gpu, "L2_cache_size", 0) >> 20
        described["backend"] = kernels.choose("auto", torch.device(device), torch.float32).__name__.rpartition(".")[2]
        described["cuda"] = torch.version.cuda or f"ROCm {torch.version.hip}"
    return described


def processor() -> str:
    """The processor's name as Linux gives it, else as Python knows it."""
    return _from_file("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def processors() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _from_file(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def _memory_gib() -> float | None:
    total = _from_file("/proc/meminfo", "MemTotal")
    return round(int(total.split()[0]) / 2**20, 1) if total else None


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
