"""Photographs of solar cells (``--data elpv``), from the package ``elpv-dataset``, in a fixed split.

2,624 grey electroluminescence images of 300 x 300 pixels, CC BY-NC-SA 4.0, of Deitsch et al., "Automatic
classification of defective photovoltaic module cells in electroluminescence images", Solar Energy 185, 2019. Experts
gave each cell a probability of a defect, 0, 1/3, 2/3 or 1. There are two classes, as the authors report them: a cell is
defective where its probability is above one half (821 of them), else functional.

``elpv_split.json`` names the cells of the test set, 656 as the authors have them, and of the validation set; both are
drawn at random from each combination of probability and kind of module. It holds the checksum of the labels that it
was made from.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

from fastsam.commands.training.sources import DataError

if TYPE_CHECKING:
    import datasets

CLASSES = ["functional", "defective"]
SPLIT = Path(__file__).with_name("elpv_split.json")
INSTALL = "pip install 'fastsam-optim[real]'"
AGAIN = "pip install --force-reinstall --no-deps elpv-dataset"
#: The last training images are the validation set, for whoever chooses numbers.
VALIDATION = 394


def elpv() -> dict[str, datasets.Dataset]:
    """The training set, whose last :data:`VALIDATION` images are the validation set, and the test set.

    Raises ``ImportError`` where the package is not installed, :class:`DataError` where it lacks files, and where its
    labels are not those that the split was made from.
    """
    import datasets

    folder = _folder()
    cells = read_labels(folder / "labels.csv")
    split = json.loads(SPLIT.read_text())
    if checksum(cells) != split["labels"]:
        raise DataError(
            f"{folder / 'labels.csv'} has other labels than the {split['cells']} that the split of elpv was made from: "
            "pip install elpv-dataset==1.0.0.post1"
        )
    missing = [name for name, _, _ in cells if not (folder / name).exists()]
    if missing:
        raise DataError(
            f"elpv-dataset is half installed: {len(missing)} of its {len(cells)} images are missing, such as "
            f"{folder / missing[0]}: {AGAIN}"
        )
    kept = sorted(set(range(len(cells))) - {*split["validation"], *split["test"]})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})

    def part(rows: list[int]) -> datasets.Dataset:
        labels = [int(cells[i][1] > 0.5) for i in rows]
        return datasets.Dataset.from_dict(
            {"image": [str(folder / cells[i][0]) for i in rows], "label": labels}, features=features
        )

    return {"train": part(kept + split["validation"]), "test": part(split["test"])}


def read_labels(path: Path) -> list[tuple[str, float, str]]:
    """Each cell's image, probability of a defect and kind of module, in the order of ``labels.csv``."""
    try:
        rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
        return [(name, float(probability), kind) for name, probability, kind in rows]
    except OSError:
        raise DataError(f"elpv-dataset is half installed: {path} is missing: {AGAIN}") from None
    except ValueError as error:
        raise DataError(f"{path} is not the table of elpv-dataset ({error}): {AGAIN}") from None


def checksum(cells: list[tuple[str, float, str]]) -> str:
    """Of what the labels say, however the file is spaced."""
    text = "\n".join(f"{name} {probability:.3f} {kind}" for name, probability, kind in cells)
    return hashlib.sha256(text.encode()).hexdigest()


def stratified(cells: list[tuple[str, float, str]], seed: int = 0) -> dict:
    """What ``elpv_split.json`` holds: a quarter of each kind of cell for the test, a fifth of the rest to validate."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    validation: list[int] = []
    test: list[int] = []
    for kind in sorted({cell[1:] for cell in cells}):
        rows = [i for i, cell in enumerate(cells) if cell[1:] == kind]
        order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        quarter = round(len(order) / 4)
        test += order[:quarter]
        validation += order[quarter : quarter + round((len(order) - quarter) / 5)]
    return {
        "labels": checksum(cells),
        "cells": len(cells),
        "validation": sorted(validation),
        "test": sorted(test),
    }


def _folder() -> Path:
    found = importlib.util.find_spec("elpv_dataset")
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"elpv is the package elpv-dataset, which is not installed: {INSTALL}")
    return Path(found.submodule_search_locations[0]) / "data"
