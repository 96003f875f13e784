"""Which function runs which kind of row, and whether a row's words are known before anything starts."""

from __future__ import annotations

from pathlib import Path

from benchmarks.papers import sde_runs, train
from benchmarks.papers.methods import BASES, METHODS
from benchmarks.papers.networks import NETWORKS
from benchmarks.papers.sde import PROBLEMS, PROCESSES
from benchmarks.papers.settings import SdeSettings, TrainSettings, nearest


def check(settings: TrainSettings | SdeSettings) -> None:
    """Raises ``ValueError`` for a word that names nothing, with the nearest that does."""
    if isinstance(settings, SdeSettings):
        words = {"problem": PROBLEMS, "process": PROCESSES}
        at_least_one = ("steps", "batches", "substeps", "measure_every", "hidden")
    else:
        words = {
            "method": METHODS, "network": NETWORKS, "base": BASES,
            "schedule": ("step", "epoch"), "full_gradient": ("average", "exact"),
        }  # fmt: skip
        at_least_one = ("epochs", "batch_size", "freq", "k")
        if not 0 < settings.ascent_share <= 1:
            raise ValueError(f"ascent_share={settings.ascent_share} must be above 0, and 1 at most")
        if settings.ascent_share < 1 and settings.method in ("EGR", "Momentum-SAM", *BASES):
            raise ValueError(
                f"ascent_share={settings.ascent_share}: {settings.method} has one pass, of the whole batch"
            )
        if settings.network == "pretrained" and not settings.checkpoint:
            raise ValueError("network='pretrained' needs a checkpoint, a name on the hub or a folder")
        if settings.method in BASES and settings.method != settings.base:
            raise ValueError(f"method={settings.method!r} with base={settings.base!r}: they must be the same")
    for name, known in words.items():
        value = getattr(settings, name)
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}{nearest(value, known)}")
    for name in at_least_one:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}={getattr(settings, name)} must be at least 1")


def run(
    settings: TrainSettings | SdeSettings,
    seed: int,
    folder: Path,
    device: str,
    data_dir: Path | None,
    save_seconds: float,
) -> dict:
    """Runs one row with one seed in its folder, or goes on with it; returns what ``result.json`` holds."""
    runner = sde_runs if isinstance(settings, SdeSettings) else train
    return runner.run(settings, seed, folder, device, data_dir, save_seconds)
