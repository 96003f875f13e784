"""What a run sets for the whole process, and puts back: generators, deterministic algorithms, the libraries' talk."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import sys
from collections.abc import Iterator

import torch

from fastsam.finetune.batches import seed_of
from fastsam.finetune.settings import Settings
from fastsam.training.run import random_state, set_random_state


def check_packages(settings: Settings) -> None:
    """Raises ``ImportError`` for what is not installed, with how it is."""
    missing = [name for name in ("transformers", "datasets", "PIL") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{' and '.join(missing)} not installed: pip install 'fastsam[train]'")
    for name in settings.log:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"--log {name} needs its package: pip install {name}")


def device_of(settings: Settings) -> torch.device:
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {settings.device}: {str(error).splitlines()[0]}") from None
    if settings.cuda_graph and device.type != "cuda":
        raise ValueError(f"--cuda-graph needs an NVIDIA GPU; this run is on {device}")
    return device


def seed_everything(*purpose: int | str) -> int:
    """Seeds every global generator for a purpose; returns the seed."""
    seed = seed_of(*purpose)
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    return seed


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextlib.contextmanager
def deterministic(settings: Settings, device: torch.device) -> Iterator[None]:
    if device.type != "cuda" or not settings.deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """What Transformers would report of a checkpoint is said in the run's own words; it has a bar of its own."""
    import datasets
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
        datasets.enable_progress_bars()
