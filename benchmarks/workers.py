"""One process for each backend: after an illegal access nothing runs any more in the process that made it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from fastsam import kernels
from fastsam.commands.bench import clock

#: The backends of a GPU, the preferred one first.
BACKENDS = ("cuda", "triton")


def stand_in() -> bool:
    """Whether a CPU stands in for the GPU: every line runs, and no number means anything."""
    return os.environ.get("FASTSAM_BENCH_DEVICE", "cuda") == "cpu"


def available() -> dict[str, str]:
    """For each backend of a GPU "available", or why it is not."""
    if stand_in():
        return dict.fromkeys(BACKENDS, "available")
    return {name: kernels.backends()[name] for name in BACKENDS}


def no_gpu() -> str | None:
    """Why torch has no GPU, in its own words; None if it has one."""
    if stand_in() or torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()  # which says what is_available() does not: no driver, or one that is too old
    except (AssertionError, RuntimeError) as error:
        return str(error).strip().splitlines()[0]
    return "torch finds no GPU"


def broken(device: str) -> str | None:
    """Why nothing runs any more on this process's device, as after an illegal access; None if something does."""
    try:
        torch.ones(1, device=device).sum().item()
    except RuntimeError as error:
        return clock.failure(error)
    return None


def run(module: str, arguments: Sequence[str], seconds: float) -> str | None:
    """Runs the ``main()`` of a module in a process of its own for at most ``seconds``; how it ended if not with 0."""
    program = [sys.executable, "-c", f"from {module} import main; raise SystemExit(main())", *arguments]
    try:
        status = subprocess.run(program, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"cut off after {seconds:.0f} s"
    if status < 0:
        return f"died of signal {-status}"
    return f"ended with status {status}" if status else None
