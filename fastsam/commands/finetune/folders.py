"""Folders of a run that are written as a whole: of a model, and of a checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn


def save(model: nn.Module, processor, path: Path, step: int, state: dict[str, Tensor] | None = None) -> Path:
    """Writes the folder ``path`` as a whole, for ``from_pretrained``; raises ``OSError`` if it cannot.

    ``state`` is the whole state dict of a model that is sharded. Of a network of one's own the folder has
    ``model.safetensors``, for ``load_state_dict``.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        _remove(partial)
        try:
            if hasattr(model, "save_pretrained"):
                cast(Any, model).save_pretrained(partial, state_dict=state)
            else:
                save_weights(model, partial / "model.safetensors", state)
            processor.save_pretrained(partial)
            reach_disk(partial)  # before it takes the place of another
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # on a full disk it would leave no room for anything else
            raise
        _remove(path)
        os.replace(partial, path)
    except Exception as error:  # safetensors has a kind of its own for a full disk
        raise OSError(
            f"the model could not be written into {path} ({error}); the checkpoint of step {step} is intact: make "
            "room, and the same command goes on from it"
        ) from error
    return path


def save_weights(model: nn.Module, file: Path, state: dict[str, Tensor] | None = None) -> None:
    """Writes safetensors; tensors that are in the model twice are there once."""
    from safetensors.torch import save_file, save_model

    file.parent.mkdir(parents=True, exist_ok=True)
    if state is None:
        save_model(model, str(file))
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.is_dir()]


def reach_disk(folder: Path) -> None:
    """Synchronises every file: their bytes reach the disk before their folder gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
