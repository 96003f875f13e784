"""Checkpoints of versions with a training loop of their own: all in one ``checkpoint.pt``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerControl, TrainerState

from fastsam.commands.training.run import RunFolder


def converted(folder: RunFolder, payload: dict[str, Any]) -> dict[str, Any]:
    """Makes the Trainer's folder of such a checkpoint, then ``checkpoint.pt`` name it; returns the progress."""
    assert folder.step is not None
    path = Path(folder.path) / f"checkpoint-{folder.step}"
    path.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in payload["model"].items()}, path / "model.safetensors")
    for name, file in (("optimizer", "optimizer.pt"), ("schedule", "scheduler.pt"), ("scaler", "scaler.pt")):
        if name in payload:
            torch.save(payload[name], path / file)
    callbacks: list[Any] = [TrainerControl()]
    state = TrainerState(global_step=folder.step, train_batch_size=1, stateful_callbacks=callbacks)
    state.save_to_json(str(path / "trainer_state.json"))
    progress = {**payload["progress"], "loss_sum": float(payload["loss_sum"]), "last_row": payload["last_row"]}
    step = progress.pop("step")
    if "best_step" not in progress:  # of a version without best/: the best is that from here on
        known = step == progress["evaluated"] > 0
        progress["best_step"] = step if known else 0
        progress["best_accuracy"] = progress["test_accuracy"] if known else -1.0
    progress["row"] = {**progress["last_row"], "loss": float("nan")}
    folder.save(folder.step, {"progress": progress})
    return progress
