"""How much memory is free: of the machine, of the container around this process, of a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

# What the whole machine has, then what this container may have and has taken (control groups, version 2 and 1).
_MEMINFO = Path("/proc/meminfo")
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device, or None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, StopIteration):
        line = next(line for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
        return min([int(line.split()[1]) * 1024, *_left_to_container()])
    return None


def _left_to_container() -> Iterator[int]:
    for limit, used in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
            yield int(limit.read_text()) - int(used.read_text())
