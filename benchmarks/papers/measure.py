"""Curvature along a training run, in a file that a resumed run continues."""

from __future__ import annotations

import csv
from pathlib import Path

import torch.nn.functional as F

from benchmarks.papers.settings import TrainSettings
from fastsam.commands.training.loop import Training
from fastsam.curvature import CurvatureMonitor


class Curvature:
    """Rows of :class:`~fastsam.curvature.CurvatureMonitor` in ``curvature.csv``, on the same images every time.

    Each measurement starts from noise rather than from the vector before, so that it does not depend on where a run
    was interrupted.
    """

    def __init__(self, settings: TrainSettings, training: Training, folder: Path) -> None:
        self._settings, self._training = settings, training
        self.path = folder / "curvature.csv"

    def if_due(self, step: int) -> None:
        if step % self._settings.measure_every == 0:
            self.measure(step)

    def measure(self, step: int) -> None:
        model = self._training.model
        images, labels = self._training.batches.sample(self._settings.measure_size)
        monitor = CurvatureMonitor(
            self._training.optimizer, self.path, 1, model=model, eval_mode=True, rho=self._settings.rho, append=True
        )
        monitor(lambda: F.cross_entropy(model(images), labels), step)

    def forget_from(self, step: int) -> None:
        """Drops the rows of ``step`` and later ones, which a run that goes on there measures again."""
        rows = [row for row in self.rows() if int(row["step"]) < step]
        self.path.unlink(missing_ok=True)
        if rows:
            with self.path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)

    def summary(self, step: int) -> dict[str, float]:
        """The last measurement, at the end, and the alignment's mean over the second half of training."""
        self.forget_from(step)  # a run that was killed while it finished
        self.measure(step)
        rows = self.rows()
        half = [float(row["perturbation_alignment"]) for row in rows[len(rows) // 2 :]]
        return {"top_eigenvalue": float(rows[-1]["top_eigenvalue"]), "alignment": sum(half) / len(half)}

    def rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))
