"""Checkpoints: files that survive a crash, and the layouts of other implementations.

    fastsam.checkpoint.save("run.pt", model=model, optimizer=optimizer, scheduler=scheduler, epoch=3)
    epoch = fastsam.checkpoint.load("run.pt", model=model, optimizer=optimizer, scheduler=scheduler)["epoch"]

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
from torch import Tensor

from fastsam.checks import describe
from fastsam.descent import fused_rule

#: Hyper-parameters that tell the methods apart.
_OF_ONE_METHOD = ("sigma", "lmbda", "freq")


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


def in_this_layout(state_dict: dict, optimizer: torch.optim.Optimizer) -> dict:
    """A checkpoint of this method, of the authors' code, of davda54's SAM, of pytorch_optimizer or of a plain base.

    What the groups do not name keeps its present value. ``old_p``, the backup that other implementations leave in
    their state, is left out. pytorch_optimizer's F-SAM keeps the base optimizer's state in a dict of its own.
    """
    _check_method(state_dict["param_groups"], optimizer)
    groups = [
        {**{k: v for k, v in mine.items() if k != "params"}, **theirs}
        for mine, theirs in zip(optimizer.param_groups, state_dict["param_groups"], strict=False)
    ] + state_dict["param_groups"][len(optimizer.param_groups) :]
    base = state_dict.get("base_optimizer", {}).get("state", {})
    state = {
        i: {k: v for k, v in {**base.get(i, {}), **s}.items() if k != "old_p"} if isinstance(s, dict) else s
        for i, s in {**base, **state_dict["state"]}.items()
    }
    return {"state": state, "param_groups": groups}


def checked(state_dict: dict, optimizer: torch.optim.Optimizer) -> dict:
    """``state_dict`` itself; raises ``ValueError`` if its state is another optimizer's or has other shapes."""
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if len(saved) != len(params):
        return state_dict  # torch says so itself
    own = {"momentum": optimizer.uses_ema, "eigenvector": optimizer.uses_eigenvector}
    shaped = {name for name, used in own.items() if used}
    rule = fused_rule(optimizer.base_optimizer)
    if rule is not None:
        shaped |= {"momentum_buffer", "exp_avg", "exp_avg_sq"}
        for name, used in own.items():
            if not used and any(name in state_dict["state"].get(i, ()) for i in saved):
                raise ValueError(
                    f"the checkpoint is another method's: its state has {name!r}, which {type(optimizer).__name__} "
                    "does not keep; build the optimizer that wrote it, or take that entry out of its state"
                )
        keeps = set(rule.state_names(optimizer.param_groups))
        for i in saved:
            found = state_dict["state"].get(i, {}).keys() - own.keys()
            # SGD counts no steps; the others do, and keep all of theirs.
            if found and (not keeps <= found if "step" in keeps else "step" in found):
                raise ValueError(
                    f"the checkpoint is another base optimizer's: its state has {', '.join(sorted(found))}, where "
                    f"{type(optimizer.base_optimizer).__name__} keeps {', '.join(sorted(keeps)) or 'none'}; build the "
                    "optimizer that wrote it"
                )
    for i, p in zip(saved, params, strict=True):
        for name, value in state_dict["state"].get(i, {}).items():
            if name in shaped and isinstance(value, Tensor) and value.shape != p.shape:
                raise ValueError(
                    f"the checkpoint is another model's: its {name!r} has shape {tuple(value.shape)} for {describe(p)}"
                )
    return state_dict


def _check_method(saved_groups: list[dict], optimizer: torch.optim.Optimizer) -> None:
    """The groups of a fastsam checkpoint, which ``perturb`` marks, name the hyper-parameters of their method."""
    for saved, mine in zip(saved_groups, optimizer.param_groups, strict=False):
        if "perturb" not in saved:
            continue
        other = [k for k in _OF_ONE_METHOD if (k in saved) != (k in mine)]
        if other:
            raise ValueError(
                f"the checkpoint is another method's: its groups {'have' if other[0] in saved else 'lack'} "
                f"{other[0]!r}, unlike those of {type(optimizer).__name__}; build the optimizer that wrote it"
            )


def _sync_folder(folder: Path) -> None:
    """Has the new name itself reach the disk, where folders can be synchronised (not on Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
