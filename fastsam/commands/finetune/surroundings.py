"""What a run sets for the whole process, and puts back: generators, deterministic algorithms, the libraries' talk."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist

from fastsam.commands.finetune.settings import Settings
from fastsam.commands.training.batches import seed_of
from fastsam.commands.training.run import random_state, set_random_state


def check_packages(settings: Settings) -> None:
    """Raises ``ImportError`` for what is not installed, with how it is."""
    needed = ("transformers", "accelerate", "datasets", "PIL", "matplotlib")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{' and '.join(missing)} not installed: pip install 'fastsam-optim[train]'")
    for name in settings.log:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"--log {name} needs its package: pip install {name}")


def device_of(settings: Settings) -> torch.device:
    """The device, which the Trainer chooses among the GPUs of a machine. Raises ``ValueError`` if it is not there."""
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {settings.device}: {reason}: say --device cpu, or auto") from None
    if device.index:
        raise ValueError(f"--device {name}: the Trainer takes the first GPU; say CUDA_VISIBLE_DEVICES={device.index}")
    if settings.cuda_graph and device.type != "cuda":
        raise ValueError(f"--cuda-graph needs an NVIDIA GPU; this run is on {device}")
    return device


def check_processes(settings: Settings) -> int:
    """The number of processes, before they have met. Raises ``ValueError`` for what does not go with several."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(
            "DeepSpeed makes the step itself, and a sharpness-aware one has two passes: launch with FSDP2 instead "
            "(accelerate launch --use_fsdp --fsdp_version 2)"
        )
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if settings.batch_size % (ranks * settings.accumulate):
        raise ValueError(
            f"--batch-size {settings.batch_size} is that of all {ranks} processes together, in --accumulate "
            f"{settings.accumulate} parts each: it must be a multiple of {ranks * settings.accumulate}"
        )
    for option, given in {"--perturb-parts": settings.perturb_parts, "--cuda-graph": settings.cuda_graph}.items():
        if given and ranks > 1:
            raise ValueError(f"{option} is for one process, and these are {ranks}: leave it out")
    return ranks


def seed_everything(*purpose: int | str) -> int:
    """Seeds every global generator for a purpose; returns the seed."""
    seed = seed_of(*purpose)
    random.seed(seed)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)  # the other one writes its stack down, at every step
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    return seed


@contextlib.contextmanager
def put_back() -> Iterator[None]:
    """Puts the global generators back, and ends the process group if there was none."""
    state = random_state()
    grouped = dist.is_available() and dist.is_initialized()
    try:
        yield
    finally:
        set_random_state(state)
        if not grouped and dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def whole_models() -> Iterator[None]:
    """Has every process read the checkpoint under FSDP, too, where Transformers would leave all but one without it.

    Resizing and the checks of a model need its weights; sharding takes those of the first process.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.get(name)
    if before is not None:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def deterministic(settings: Settings, device: torch.device) -> Iterator[None]:
    """Torch's deterministic algorithms on a GPU, with a warning where it has none.

    The Trainer's ``full_determinism`` raises there, and waits for the GPU after every kernel.
    """
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
