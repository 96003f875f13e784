"""Where image data comes from: scikit-learn, the hub, a local copy of it, a folder of images, parquet files.

Each function gives ``datasets.Dataset``s by the name of their split, with the columns they came with;
:mod:`fastsam.commands.training.data` makes one form of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import datasets


class DataError(ValueError):
    """Data that cannot be used, and what to do about it."""


@dataclass(frozen=True)
class HubData:
    """A data set's name on the hub, its configuration, its columns, and how many rows it must have."""

    repository: str
    configuration: str | None
    image: str
    label: str
    train: int
    test: int


HUB = {
    "cifar10": HubData("uoft-cs/cifar10", "plain_text", "img", "label", 50_000, 10_000),
    "cifar100": HubData("uoft-cs/cifar100", "cifar100", "img", "fine_label", 50_000, 10_000),
    "fashion_mnist": HubData("zalando-datasets/fashion_mnist", "fashion_mnist", "image", "label", 60_000, 10_000),
    "svhn": HubData("ufldl-stanford/svhn", "cropped_digits", "image", "label", 73_257, 26_032),
}
TEST_NAMES = ("test", "val", "valid", "validation")
DIGITS = [str(i) for i in range(10)]  # their classes
DIGITS_TRAIN = 1000  # of 1797


def digit_pixels(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """1797 grey images of 8 x 8 pixels from 0 to 16, float32 (N, 8, 8), in a random order, and their labels, int64."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("the digits come from scikit-learn: pip install scikit-learn") from None
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=generator)
    return torch.from_numpy(bunch.images).float()[order], torch.from_numpy(bunch.target).long()[order]


def digits() -> dict[str, datasets.Dataset]:
    """The same 1000 of the 1797 images are always for training."""
    import datasets
    from PIL import Image

    images, labels = digit_pixels(torch.Generator().manual_seed(0))
    pixels = (images * 255 / 16).round().to(torch.uint8).numpy()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=DIGITS)})

    def part(rows: slice) -> datasets.Dataset:
        columns = {"image": [Image.fromarray(image) for image in pixels[rows]], "label": labels[rows].tolist()}
        return datasets.Dataset.from_dict(columns, features=features)

    return {"train": part(slice(DIGITS_TRAIN)), "test": part(slice(DIGITS_TRAIN, None))}


def from_hub(name: str) -> dict[str, datasets.Dataset]:
    """Downloaded, or from the cache of the datasets library."""
    import datasets

    known = HUB.get(name)
    repository, configuration = (known.repository, known.configuration) if known else (name, None)
    try:
        found = datasets.load_dataset(repository, configuration)
    except (OSError, ValueError, RuntimeError) as error:  # no network, no such repository, no cached copy
        what = f"{name}: {repository}" if known else f"{name} is no folder here, and as a data set on the hub it"
        raise DataError(
            f"{what} is not in the cache of the datasets library and could not be downloaded "
            f"({str(error).strip().splitlines()[0]}). Without a network, copy the parquet files of "
            f"huggingface.co/datasets/{repository} to a folder {name.split('/')[-1]} and give its parent as data_dir "
            "(--data-dir)"
        ) from None
    return dict(found)


def local_copy(name: str, data_dir: Path) -> dict[str, datasets.Dataset]:
    """``data_dir/name``, or ``data_dir`` itself."""
    if not data_dir.is_dir():
        raise DataError(f"data_dir={data_dir} is not a folder")
    folder = data_dir / name.split("/")[-1]
    if not folder.is_dir():
        if not any(data_dir.glob("*.parquet")) and not (data_dir / "dataset_dict.json").exists():
            raise DataError(
                f"{data_dir} holds no {folder.name}: expected {folder} with train-*.parquet and test-*.parquet, or "
                f"those files in {data_dir} itself"
            )
        folder = data_dir
    configuration = HUB[name].configuration if name in HUB else None
    if configuration and (folder / configuration).is_dir():  # as the hub has it
        folder = folder / configuration
    return from_path(folder)


def from_path(path: Path) -> dict[str, datasets.Dataset]:
    """A parquet file; or a folder of them, of what ``save_to_disk`` wrote, or of images."""
    import datasets

    if path.is_file():
        if path.suffix != ".parquet":
            raise DataError(f"{path} is no parquet file: give one, or a folder")
        return {"train": _parquet([path])}
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        try:
            found = datasets.load_from_disk(path)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} is not a whole data set of save_to_disk: {error}") from None
        return dict(found) if isinstance(found, dict) else {"train": found}
    files = sorted(path.glob("*.parquet")) or sorted(path.glob("*/*.parquet"))
    if files:
        return {split: _parquet(part) for split, part in _parquet_splits(path, files).items()}
    return _image_folder(path)


def _image_folder(path: Path) -> dict[str, datasets.Dataset]:
    import datasets

    folders = {folder.name: folder for folder in _folders(path)}
    if "train" not in folders:
        alone = [t for t in TEST_NAMES if t in folders and _folders(folders[t])]
        if alone:
            raise DataError(f"{path} has a folder {alone[0]} but none called train")
        parts = {"train": path}
    else:
        test = next((folders[t] for t in TEST_NAMES if t in folders), None)
        parts = {"train": folders["train"], **({} if test is None else {"test": test})}
    files = {split: _class_files(folder) for split, folder in parts.items()}
    classes = sorted(files["train"])
    unknown = sorted(set(files.get("test", {})) - set(classes))
    if unknown:
        raise DataError(f"{parts['test']} has the class {unknown[0]}, which {parts['train']} has not")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    found = {}
    for split, by_class in files.items():
        rows = [(str(file), classes.index(c)) for c in sorted(by_class) for file in by_class[c]]
        columns = {"image": [file for file, _ in rows], "label": [label for _, label in rows]}
        found[split] = datasets.Dataset.from_dict(columns, features=features)
    return found


def _class_files(folder: Path) -> dict[str, list[Path]]:
    from PIL import Image

    suffixes = set(Image.registered_extensions())
    by_class = {
        c.name: sorted(f for f in c.rglob("*") if f.suffix.lower() in suffixes and not f.name.startswith("."))
        for c in _folders(folder)
    }
    if not by_class:
        raise DataError(f"{folder} holds no data set: no folder for each class, and no parquet files")
    empty = sorted(c for c, found in by_class.items() if not found)
    if empty:
        raise DataError(f"the class folder {folder / empty[0]} holds no images: fill it, or remove it")
    return by_class


def _folders(path: Path) -> list[Path]:
    return sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith((".", "__")))


def _parquet_splits(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Files by split, which their own name or their folder's begins with."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        label = file.stem if file.parent == path or file.stem.startswith(("train", *TEST_NAMES)) else file.parent.name
        if label.startswith("train"):
            splits.setdefault("train", []).append(file)
        elif label.startswith(TEST_NAMES):
            splits.setdefault("test", []).append(file)
    if "train" not in splits:
        if "test" in splits:
            raise DataError(f"{path} has {splits['test'][0].name} but no train*.parquet")
        splits = {"train": files}
    for part in splits.values():
        _check_shards(part)
    return splits


def _check_shards(files: list[Path]) -> None:
    """Of ``train-00000-of-00002.parquet`` there must be two."""
    for file in files:
        shard = re.fullmatch(r"(.+)-(\d+)-of-(\d+)", file.stem)
        if shard:
            prefix, width, total = shard[1], len(shard[2]), int(shard[3])
            names = [f"{prefix}-{i:0{width}}-of-{shard[3]}.parquet" for i in range(total)]
            missing = [n for n in names if not (file.parent / n).exists()]
            if missing:
                raise DataError(f"{file.parent} is half downloaded: {', '.join(missing)} is missing")


def _parquet(files: list[Path]) -> datasets.Dataset:
    import datasets
    import pyarrow
    import pyarrow.parquet

    for file in files:
        try:
            pyarrow.parquet.read_metadata(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file} is broken or half downloaded: {error}") from None
    return datasets.Dataset.from_parquet([str(f) for f in files])
