"""Image classification data sets, wherever they come from, as one pair of ``datasets.Dataset``s.

    splits = open_dataset("cifar10")            # from the hub, or from the cache of ``datasets``
    splits = open_dataset("cifar10", data_dir="/data")    # from /data/cifar10: parquet files, as the hub has them
    splits = open_dataset("/data/birds")        # a folder of images for each class, or parquet files
    splits = open_dataset("digits")             # scikit-learn's, needs no network
    splits = open_dataset("elpv")               # photographs of solar cells, from a package
    train = in_memory(splits.train)             # uint8 tensors

Whatever is wrong with the data is a :class:`DataError` that names the file, the folder or the row.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsam.commands.training import augment
from fastsam.commands.training.elpv import elpv
from fastsam.commands.training.sources import (
    DIGITS,
    HUB,
    TEST_NAMES,
    DataError,
    HubData,
    digit_pixels,
    digits,
    from_hub,
    from_path,
    local_copy,
)

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Splits:
    """Two ``datasets.Dataset``s with the columns ``image`` (PIL) and ``label`` (int), and the names of the classes."""

    name: str
    train: datasets.Dataset
    test: datasets.Dataset
    classes: list[str]


@dataclass(frozen=True)
class ImageSet:
    """images: uint8, or float32 where they are a network's inputs, of shape (N, C, H, W); labels: int64 of shape (N,);
    classes: their names."""

    images: Tensor
    labels: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Tensor) -> ImageSet:
        return ImageSet(self.images[rows], self.labels[rows], self.classes)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(images, labels)"""
        return self.images, self.labels

    def to(self, device: torch.device | str) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device), self.classes)


#: Those that come from installed packages.
LOCAL = {"digits": digits, "elpv": elpv}
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")


def open_dataset(source: str, *, data_dir: str | os.PathLike | None = None) -> Splits:
    """Opens ``source`` as a training and a test set.

    Args:
        source: ``"digits"``; ``"elpv"``; a name of :data:`HUB` or any ``owner/name`` on the hub; or a path to a parquet
            file, or to a folder of parquet files (``train*.parquet``, ``test*.parquet``), of what ``save_to_disk``
            wrote, or of images with a folder for each class, directly or under ``train`` and ``test`` (or ``val``,
            ``validation``). Where there is no test set, a fifth of each class, always the same, becomes one.
        data_dir: where local copies of hub data sets lie, as ``data_dir/name`` or ``data_dir`` itself. Nothing is
            downloaded then.

    Raises :class:`DataError` for what is missing or broken, ``ImportError`` without the ``datasets`` library or the
    package that the data is.
    """
    _library()
    return _checked(source, _found(source, data_dir), HUB.get(source))


def in_memory(dataset: datasets.Dataset, size: int | None = None) -> ImageSet:
    """All images as one uint8 tensor: grey (C = 1) if every one is grey, else RGB.

    ``size``: scale every image to size x size (bicubic). Without it all must have one size already. Raises
    :class:`DataError` for an image that does not open, with its file or row.
    """
    import numpy

    arrays, first = [], None
    for i in range(len(dataset)):
        image = open_image(dataset, i)
        if size is not None and image.size != (size, size):
            image = image.resize((size, size), resample=3)
        first = first or image.size
        if image.size != first:
            raise DataError(
                f"{_name_of(dataset, i)} has {image.size[0]} x {image.size[1]} pixels, the images before it "
                f"{first[0]} x {first[1]}: give a size to scale them to"
            )
        arrays.append(numpy.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB")))
    if not arrays:
        raise DataError("the data set has no images")
    if any(a.ndim == 3 for a in arrays):
        arrays = [a if a.ndim == 3 else a[..., None].repeat(3, axis=2) for a in arrays]
    images = torch.from_numpy(numpy.stack(arrays))
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(dataset["label"][:], dtype=torch.int64), list(dataset.features["label"].names))


def noisy_digits(train_size: int, label_noise: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """The digits for the demo: ``train_size`` images for training, the others for testing; needs scikit-learn alone.

    Images are standardised by the training set's mean and standard deviation. ``label_noise`` is the share of the
    training labels that are wrong. ``seed`` decides the split and which labels.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = digit_pixels(generator)
    images = images.unsqueeze(1)
    std, mean = torch.std_mean(images[:train_size])
    both = ImageSet((images - mean) / std, labels, DIGITS)
    train, test = both[:train_size], both[train_size:]
    noisy = augment.label_noise(train.labels, label_noise, len(DIGITS), generator, always_wrong=True)
    return ImageSet(train.images, noisy, DIGITS), test


def open_image(dataset: datasets.Dataset, index: int):
    """The PIL image of one row, decoded; grey of 16 bits becomes grey of 8.

    Raises :class:`DataError`, with the name of the file, for one that does not open and for pixels without a range.
    """
    try:
        image = dataset[index]["image"]
        image.load()
    except (OSError, SyntaxError, ValueError, AttributeError) as error:  # what PIL raises for broken files
        raise DataError(
            f"{_name_of(dataset, index)} does not open as an image: {error}. Put another in its place, or take it away"
        ) from None
    if image.mode.startswith("I;16"):
        return _of_8_bits(image)
    if image.mode in ("I", "F"):
        raise DataError(
            f"{_name_of(dataset, index)} has pixels of 32 bits, which do not say what is black and what is white: "
            "scale it to 8 bits"
        )
    return image


def _of_8_bits(image):
    """The upper byte of each pixel, as PIL reads colour of 16 bits; its own conversion would cut off at 255."""
    import numpy
    from PIL import Image

    return Image.fromarray((numpy.asarray(image) >> 8).astype("uint8"))


def _found(source: str, data_dir: str | os.PathLike | None) -> dict[str, datasets.Dataset]:
    if source in LOCAL:
        return LOCAL[source]()
    path = Path(source)
    if source in HUB or (re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.exists()):
        return from_hub(source) if data_dir is None else local_copy(source, Path(data_dir))
    if path.exists():
        return from_path(path)
    near = difflib.get_close_matches(source, [*LOCAL, *HUB], n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    known = ", ".join([*LOCAL, *HUB])
    raise DataError(
        f"{source} is neither a folder or file here nor a known data set{hint} (known: {known}, owner/name on the hub)"
    )


def _checked(name: str, found: dict, known: HubData | None) -> Splits:
    """Columns, labels and sizes as :class:`Splits` promises them."""
    if "train" not in found:
        raise DataError(f"{name} has no split called train, only {', '.join(found)}")
    test = next((found[t] for t in TEST_NAMES if t in found), None)
    train = _two_columns(name, found["train"], known)
    train, names = _with_classes(name, train)
    if test is None:
        train, test = _split_off_test(train)
    else:
        test, _ = _with_classes(f"{name}, test set", _two_columns(name, test, known), names)
    for split, part, rows in (("training", train, known and known.train), ("test", test, known and known.test)):
        if len(part) == 0:
            raise DataError(f"{name}: the {split} set is empty")
        if rows and len(part) != rows:
            raise DataError(f"{name}: the {split} set has {len(part)} images of {rows}; the copy is not whole")
    return Splits(name, train, test, names)


def _two_columns(name: str, dataset: datasets.Dataset, known: HubData | None) -> datasets.Dataset:
    import datasets

    for new, candidates in (
        ("image", (known.image,) if known else IMAGE_COLUMNS),
        ("label", (known.label,) if known else LABEL_COLUMNS),
    ):
        column = next((c for c in (*candidates, new) if c in dataset.column_names), None)
        if column is None:
            raise DataError(
                f"{name} has the columns {', '.join(dataset.column_names)}; looked for {' or '.join(candidates)}"
            )
        if column != new:
            dataset = dataset.rename_column(column, new)
    dataset = dataset.select_columns(["image", "label"])
    if isinstance(dataset.features["image"], datasets.Image):
        return dataset
    try:
        return dataset.cast_column("image", datasets.Image())
    except (TypeError, ValueError) as error:  # pyarrow's errors are among them
        raise DataError(f"{name}: its column of images holds {dataset.features['image']}, no images: {error}") from None


def _with_classes(name: str, dataset, names: list[str] | None = None) -> tuple[datasets.Dataset, list[str]]:
    """Labels as ``ClassLabel`` of ``names``, or of what the data says of itself."""
    import datasets

    feature, labels = dataset.features["label"], dataset["label"][:]
    if isinstance(feature, datasets.ClassLabel):
        own = feature.names
    elif all(isinstance(label, str) for label in labels):
        own = names or sorted(set(labels))
    elif all(isinstance(label, int) for label in labels):
        own = names or [str(i) for i in range(max(labels, default=-1) + 1)]
    else:
        raise DataError(f"{name}: labels must be whole numbers or names, and none may be missing")
    if names is not None and own != names:
        raise DataError(f"{name}: its classes are not those of the training set")
    if labels and isinstance(labels[0], str):
        unknown = set(labels) - set(own)
        if unknown:
            raise DataError(f"{name}: the label {min(unknown)!r} is none of the training set's classes")
        labels = [own.index(label) for label in labels]
        dataset = dataset.remove_columns("label").add_column("label", labels)
    for i, label in enumerate(labels):
        if not 0 <= label < len(own):
            raise DataError(f"{name}: row {i} has the label {label}, outside the range of {len(own)} classes from 0")
    wanted = datasets.ClassLabel(names=own)
    return (dataset if dataset.features["label"] == wanted else dataset.cast_column("label", wanted)), own


def _split_off_test(dataset: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
    """A fifth of each class, chosen with a fixed seed, and at least one image."""
    labels = torch.tensor(dataset["label"][:])
    generator = torch.Generator().manual_seed(0)
    test = []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        if len(rows) < 2:
            named = dataset.features["label"].int2str(label)
            raise DataError(f"the class {named} has one image, and there is no test set: add images")
        test += rows[torch.randperm(len(rows), generator=generator)[: max(1, len(rows) // 5)]].tolist()
    chosen = set(test)
    return dataset.select([i for i in range(len(labels)) if i not in chosen]), dataset.select(sorted(chosen))


def _name_of(dataset: datasets.Dataset, index: int) -> str:
    """The file of a row, or its number."""
    import datasets

    raw = dataset.cast_column("image", datasets.Image(decode=False))[index]["image"]
    return (raw or {}).get("path") or f"row {index}"


def _library() -> None:
    try:
        import datasets  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'fastsam-optim[train]'") from None
