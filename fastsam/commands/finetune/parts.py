"""What a run is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fastsam.commands.finetune.model import Preparation
from fastsam.commands.finetune.settings import Settings
from fastsam.commands.training.data import Splits
from fastsam.commands.training.run import RunFolder


@dataclass
class Job:
    """What a run is made of; ``folder`` is None on every process but the first."""

    settings: Settings
    arguments: Any  # TrainingArguments
    splits: Splits
    model: nn.Module
    preparation: Preparation
    folder: RunFolder | None = None
    saved_step: int | None = None
    train: Any = None  # Images, as soon as they are decoded
    test: Any = None

    @property
    def steps_per_epoch(self) -> int:
        return len(self.splits.train) // self.settings.batch_size
