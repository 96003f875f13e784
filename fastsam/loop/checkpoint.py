"""Checkpoint files that survive a crash.

    fastsam.loop.checkpoint.save("run.pt", model=model, optimizer=optimizer, scheduler=scheduler, epoch=3)
    epoch = fastsam.loop.checkpoint.load("run.pt", model=model, optimizer=optimizer, scheduler=scheduler)["epoch"]

``save`` never writes into the file it replaces, so that a process killed at any moment leaves the last good one.
``load`` reads tensors and plain containers and nothing else: a file that would run code is refused.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch


def save(path: str | os.PathLike, **objects: Any) -> None:
    """Writes the ``state_dict()`` of every object (or the value itself, if it has none) to one file, atomically.

    The bytes go to a temporary file in the same folder, reach the disk, and then take the name. Raises
    ``RuntimeError`` if an optimizer among them has the weights perturbed, ``OSError`` if the file cannot be written;
    whatever was at ``path`` is still there then.
    """
    if not objects:
        raise ValueError("save() was given nothing to save: name the objects, as in save(path, model=model)")
    # The optimizer first: it knows whether the weights are perturbed.
    states = {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in objects.items()}
    replace(Path(path), lambda file: torch.save(states, file))


def replace(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Replaces a file as a whole by what ``write(file)`` writes: whoever opens it finds the old one or the new one."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's own mode keeps everybody else out
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load(path: str | os.PathLike, map_location: Any = "cpu", **objects: Any) -> dict[str, Any]:
    """Reads a file of :func:`save`, hands each named object its state, and returns everything that was in it.

    Either every object is loaded or, after an exception, every one is as it was (for which a copy of its state is
    held meanwhile). Raises ``KeyError`` for a name that the file does not have, ``pickle.UnpicklingError`` for a
    file that holds more than tensors and plain containers, and what an object's own ``load_state_dict`` raises.
    """
    states = torch.load(path, map_location=map_location, weights_only=True)
    missing = [name for name in objects if name not in states]
    if missing:
        raise KeyError(f"{os.fspath(path)!r} has no {missing[0]!r}; it has {', '.join(sorted(states))}")
    before = {name: copy.deepcopy(value.state_dict()) for name, value in objects.items()}
    try:
        for name, value in objects.items():
            value.load_state_dict(states[name])
    except BaseException:
        for name, value in objects.items():
            value.load_state_dict(before[name])
        raise
    return states


def _sync_folder(folder: Path) -> None:
    """Has the new name itself reach the disk, where folders can be synchronised (not on Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
