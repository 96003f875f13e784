"""Data sets from every source, what is wrong with them, and augmentation of whole batches."""

from __future__ import annotations

import importlib
import importlib.util
import json

import numpy
import pytest
import torch

datasets = pytest.importorskip("datasets")
from PIL import Image  # noqa: E402

from fastsam.commands.training import elpv  # noqa: E402
from fastsam.commands.training.augment import cutout, label_noise, random_crop, random_flip  # noqa: E402
from fastsam.commands.training.data import (  # noqa: E402
    HUB,
    DataError,
    in_memory,
    noisy_digits,
    open_dataset,
    open_image,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Nothing is read from or left in the user's cache, and nothing is downloaded."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def picture(value: int, size: int = 6, mode: str = "L") -> Image.Image:
    return Image.new(mode, (size, size), value if mode == "L" else (value, 0, 0))


def image_folder(path, classes=("cat", "dog"), each=5, mode="L"):
    for i, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for j in range(each):
            picture(50 * i + j, mode=mode).save(path / name / f"{j}.png")
    return path


def parquet(path, labels, column="img", label="label", names=None):
    feature = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    content = {column: [picture(k) for k in range(len(labels))], label: labels}
    features = datasets.Features({column: datasets.Image(), label: feature})
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(content, features=features).to_parquet(path)


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """A package laid out as elpv-dataset, of 48 cells of 6 x 6 pixels, and a split that was made from it."""
    data = tmp_path / "elpv_dataset" / "data"
    (data / "images").mkdir(parents=True)
    (tmp_path / "elpv_dataset" / "__init__.py").write_text("")
    lines = []
    for i in range(48):
        picture(i).save(data / "images" / f"cell{i:04}.png")
        probability = ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")[i % 4]
        lines.append(f"images/cell{i:04}.png  {probability}   {'mono' if i < 24 else 'poly'}")
    (data / "labels.csv").write_text("\n".join(lines) + "\n")
    split = tmp_path / "split.json"
    split.write_text(json.dumps(elpv.stratified(elpv.read_labels(data / "labels.csv"))))
    monkeypatch.setattr(elpv, "SPLIT", split)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return data


# ---- sources ---------------------------------------------------------------------------------------------------


def test_digits_are_all_there_once_and_always_split_alike():
    from sklearn.datasets import load_digits

    splits = open_dataset("digits")
    train, test = in_memory(splits.train), in_memory(splits.test)
    images = torch.cat([train.images, test.images])
    assert images.dtype == torch.uint8 and images.shape == (1797, 1, 8, 8) and len(train) == 1000
    pixels = torch.from_numpy(load_digits().images)
    wanted = (pixels * 255 / 16).round().flatten(1)
    assert sorted(map(tuple, images.flatten(1).tolist())) == sorted(map(tuple, wanted.int().tolist()))
    assert torch.equal(in_memory(open_dataset("digits").train).images, train.images)
    assert splits.classes == [str(i) for i in range(10)]


@pytest.mark.parametrize("test_name", ["test", "val", "validation"])
def test_image_folder_with_a_test_folder(tmp_path, test_name):
    image_folder(tmp_path / "train", each=3)
    image_folder(tmp_path / test_name, each=2)
    splits = open_dataset(str(tmp_path))
    assert splits.classes == ["cat", "dog"]
    assert splits.train["label"][:] == [0, 0, 0, 1, 1, 1] and splits.test["label"][:] == [0, 0, 1, 1]
    assert in_memory(splits.train).images[:, 0, 0, 0].tolist() == [0, 1, 2, 50, 51, 52]


def test_a_fifth_of_each_class_becomes_the_test_set_where_there_is_none(tmp_path):
    splits = open_dataset(str(image_folder(tmp_path, each=10)))
    train, test = (in_memory(s) for s in (splits.train, splits.test))
    assert test.labels.tolist() == [0, 0, 1, 1]
    both = torch.cat([train.images, test.images])[:, 0, 0, 0]
    assert sorted(both.tolist()) == [*range(10), *range(50, 60)]  # every image once
    assert torch.equal(in_memory(open_dataset(str(tmp_path)).test).images, test.images)


def test_local_copy_of_a_hub_data_set_takes_its_columns(tmp_path, monkeypatch):
    known = HUB["cifar100"]
    monkeypatch.setitem(HUB, "cifar100", type(known)(*(known.repository, None, "img", "fine_label"), 4, 2))
    for split, labels in (("train", [0, 1, 1, 0]), ("test", [1, 0])):
        parquet(tmp_path / "cifar100" / f"{split}-00000-of-00001.parquet", labels, label="fine_label", names=["a", "b"])
    for data_dir in (tmp_path, tmp_path / "cifar100"):
        splits = open_dataset("cifar100", data_dir=data_dir)
        assert splits.train.column_names == ["image", "label"] and splits.classes == ["a", "b"]
        assert splits.test["label"][:] == [1, 0]


def test_a_local_copy_with_too_few_rows_is_not_whole(tmp_path):
    for split in ("train", "test"):
        parquet(tmp_path / f"{split}.parquet", [0, 1], names=[str(i) for i in range(10)])
    with pytest.raises(DataError, match="2 images of 50000"):
        open_dataset("cifar10", data_dir=tmp_path)


def test_one_parquet_file_and_a_saved_data_set(tmp_path):
    parquet(tmp_path / "all.parquet", [0, 1] * 5, column="image")
    splits = open_dataset(str(tmp_path / "all.parquet"))
    assert len(splits.train) == 8 and len(splits.test) == 2 and splits.classes == ["0", "1"]
    datasets.DatasetDict({"train": splits.train, "validation": splits.test}).save_to_disk(tmp_path / "saved")
    again = open_dataset(str(tmp_path / "saved"))
    assert again.test["label"][:] == splits.test["label"][:]


def test_grey_and_coloured_images_become_rgb_and_sizes_are_scaled(tmp_path):
    image_folder(tmp_path, each=3)
    picture(200, size=12, mode="RGB").save(tmp_path / "cat" / "0.png")
    train = in_memory(open_dataset(str(tmp_path)).train, size=8)
    assert train.images.shape[1:] == (3, 8, 8)
    with pytest.raises(DataError, match="6 x 6 pixels, the images before it 12 x 12"):
        both = open_dataset(str(tmp_path))
        in_memory(datasets.concatenate_datasets([both.train, both.test]))


def test_elpv_is_split_by_kind_of_cell_and_defective_above_one_half(cells):
    splits = open_dataset("elpv")
    train, test = in_memory(splits.train), in_memory(splits.test)
    both = torch.cat([train.images, test.images])[:, 0, 0, 0].tolist()
    labels = torch.cat([train.labels, test.labels]).tolist()
    assert sorted(both) == list(range(48)) and splits.classes == ["functional", "defective"]
    assert labels == [int(i % 4 >= 2) for i in both]
    kinds = [(i % 4, i < 24) for i in test.images[:, 0, 0, 0].tolist()]  # of each six cells a quarter, rounded
    assert all(kinds.count((probability, mono)) == 2 for probability in range(4) for mono in (True, False))
    validation = json.loads(elpv.SPLIT.read_text())["validation"]
    assert train.images[-len(validation) :, 0, 0, 0].tolist() == validation


def test_the_committed_split_fits_the_package():
    """Where it is installed: 2,624 photographs, of which 821 are defective."""
    if importlib.util.find_spec("elpv_dataset") is None:
        pytest.skip("elpv-dataset is not installed: pip install 'fastsam-optim[real]'")
    splits = open_dataset("elpv")
    assert (len(splits.train), len(splits.test)) == (1576 + elpv.VALIDATION, 654)
    assert sum(splits.train["label"][:]) + sum(splits.test["label"][:]) == 821
    assert open_image(splits.test, 0).size == (300, 300)


# ---- what can be wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["not an image", "cut off"])
def test_an_image_that_does_not_open_is_named(tmp_path, kind):
    image_folder(tmp_path / "train")
    image_folder(tmp_path / "test")
    broken = tmp_path / "train" / "dog" / "3.png"
    noise = numpy.random.default_rng(0).integers(0, 255, (60, 60), dtype="uint8")
    Image.fromarray(noise).save(broken)
    broken.write_bytes(b"no image" if kind == "not an image" else broken.read_bytes()[:1500])
    train = open_dataset(str(tmp_path)).train
    with pytest.raises(DataError, match=r"dog.3\.png does not open"):
        in_memory(train, size=6)
    open_image(train, 0)
    with pytest.raises(DataError, match=r"dog.3\.png does not open"):
        open_image(train, 8)


def _other_label(data):
    text = (data / "labels.csv").read_text()
    (data / "labels.csv").write_text(text.replace("cell0000.png  0.0", "cell0000.png  1.0"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: (data / "images" / "cell0007.png").unlink(), r"1 of its 48 images are missing.*cell0007\.png"),
        (lambda data: (data / "labels.csv").unlink(), r"half installed: .*labels\.csv is missing"),
        (lambda data: (data / "labels.csv").write_text("a,b\n"), r"labels\.csv is not the table of elpv-dataset"),
        (_other_label, r"labels\.csv has other labels than the 48"),
    ],
    ids=["an image", "the labels", "another table", "other labels"],
)
def test_elpv_that_is_not_whole_is_refused_with_what_to_install(cells, damage, message):
    damage(cells)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset("elpv")
    assert "pip install" in str(caught.value)


def test_elpv_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"elpv-dataset, which is not installed: pip install 'fastsam-optim\[real\]'"):
        open_dataset("elpv")


def test_grey_of_16_bits_is_scaled_not_cut_off(tmp_path):
    image_folder(tmp_path)
    deep = numpy.array([[0, 255, 256], [0x1234, 0x8000, 0xFFFF]], dtype="uint16")
    Image.fromarray(deep).save(tmp_path / "cat" / "0.png")
    found = open_dataset(str(tmp_path))
    opened = [open_image(part, i) for part in (found.train, found.test) for i in range(len(part))]
    grey = next(image for image in opened if image.size == (3, 2))
    assert grey.mode == "L" and numpy.asarray(grey).tolist() == [[0, 0, 1], [0x12, 0x80, 0xFF]]


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_pixels_of_32_bits_are_refused_by_the_name_of_their_file(tmp_path, dtype):
    image_folder(tmp_path / "train")
    image_folder(tmp_path / "test")
    Image.fromarray(numpy.full((6, 6), 1000, dtype=dtype)).save(tmp_path / "train" / "cat" / "0.tiff")
    with pytest.raises(DataError, match=r"cat.0\.tiff has pixels of 32 bits.* scale it to 8 bits"):
        in_memory(open_dataset(str(tmp_path)).train)


def test_an_empty_class_folder_is_named(tmp_path):
    image_folder(tmp_path)
    (tmp_path / "eel").mkdir()
    (tmp_path / "eel" / "notes.txt").write_text("later")
    with pytest.raises(DataError, match="eel holds no images"):
        open_dataset(str(tmp_path))


def test_a_class_only_in_the_test_folder_is_named(tmp_path):
    image_folder(tmp_path / "train")
    image_folder(tmp_path / "test", classes=("cat", "emu"))
    with pytest.raises(DataError, match="has the class emu"):
        open_dataset(str(tmp_path))


def test_labels_outside_the_range_are_named(tmp_path):
    parquet(tmp_path / "train.parquet", [0, 1, 2, 1])
    parquet(tmp_path / "test.parquet", [0, 1, 7])
    with pytest.raises(DataError, match="row 2 has the label 7, outside the range of 3 classes"):
        open_dataset(str(tmp_path))


def test_a_half_downloaded_folder_says_what_is_missing(tmp_path):
    parquet(tmp_path / "train-00000-of-00003.parquet", [0, 1, 1])
    parquet(tmp_path / "train-00002-of-00003.parquet", [0, 1, 1])
    with pytest.raises(DataError, match=r"train-00001-of-00003\.parquet is missing"):
        open_dataset(str(tmp_path))


def test_a_parquet_file_that_was_cut_off_is_named(tmp_path):
    parquet(tmp_path / "train.parquet", [0, 1, 1])
    whole = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train\.parquet is broken or half downloaded"):
        open_dataset(str(tmp_path))


def test_missing_columns_are_listed(tmp_path):
    parquet(tmp_path / "train.parquet", [0, 1], column="picture")
    with pytest.raises(DataError, match="has the columns picture, label; looked for image or img"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digit", "did you mean digits"),
        ("cifar", "did you mean cifar10"),
        ("no/such", "no/such is no folder here, and as a data set on the hub it is not in the cache"),
        ("/no/such/folder", "neither a folder or file here nor a known data set"),
        ("cifar10", r"copy the parquet files of huggingface.co/datasets/uoft-cs/cifar10"),
    ],
)
def test_a_source_that_is_not_there(source, message):
    with pytest.raises(DataError, match=message):
        open_dataset(source)


def test_a_data_dir_without_the_data_set(tmp_path):
    with pytest.raises(DataError, match="holds no svhn"):
        open_dataset("svhn", data_dir=tmp_path)
    (tmp_path / "svhn").mkdir()
    with pytest.raises(DataError, match="no folder for each class, and no parquet files"):
        open_dataset("svhn", data_dir=tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        open_dataset("svhn", data_dir=tmp_path / "nowhere")


# ---- augmentation ----------------------------------------------------------------------------------------------


def test_random_crop_shifts_each_image_and_fills_with_zeros():
    images = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4).repeat(400, 2, 1, 1)
    cropped = random_crop(images, 1, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images[0], (1, 1, 1, 1))
    windows = {tuple(padded[:, y : y + 4, x : x + 4].flatten().tolist()): 0 for y in range(3) for x in range(3)}
    for image in cropped:
        windows[tuple(image.flatten().tolist())] += 1  # a KeyError is an image that is no window
    assert len(windows) == 9 and min(windows.values()) > 20  # 44 expected


def test_random_flip_mirrors_half_of_the_images():
    images = torch.arange(6.0).view(1, 1, 2, 3).repeat(400, 1, 1, 1)
    flipped = random_flip(images, torch.Generator().manual_seed(0))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (mirrored ^ (flipped == images).flatten(1).all(1)).all() and 160 < mirrored.sum() < 240


def test_cutout_cuts_one_square_that_may_stick_out_in_half_of_the_images():
    images = torch.ones(600, 3, 8, 8)
    cut = cutout(images, 4, torch.Generator().manual_seed(0))
    assert torch.equal(images, torch.ones_like(images))
    assert (cut == cut[:, :1]).all()  # the same square in every channel
    holes = cut[:, 0] == 0
    share = holes.flatten(1).any(1).double().mean()
    assert 0.4 < share < 0.6
    for hole in holes[holes.flatten(1).any(1)]:
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert hole.sum() == len(rows) * len(columns)  # a rectangle
        assert all(2 <= len(s) <= 4 and s[-1] - s[0] + 1 == len(s) for s in (rows, columns))
        assert all(len(s) == 4 or 0 in s or 7 in s for s in (rows, columns))  # smaller only at the edge
    assert {int(h.sum()) for h in holes} == {0, 4, 6, 8, 9, 12, 16}


def test_label_noise_redraws_an_exact_share_from_all_classes():
    labels = torch.arange(1000) % 10
    noisy = label_noise(labels, 0.4, 10, seed=3)
    changed = (noisy != labels).sum().item()
    assert changed <= 400 and 335 < changed < 385  # 360 expected: the right class may be drawn
    assert torch.equal(noisy, label_noise(labels, 0.4, 10, seed=3))
    assert not torch.equal(noisy, label_noise(labels, 0.4, 10, seed=4))
    assert torch.equal(label_noise(labels, 0.0, 10, seed=3), labels)
    everything = label_noise(labels, 1.0, 10, seed=0)
    assert torch.bincount(everything, minlength=10).min() > 65  # of 100 expected
    with pytest.raises(ValueError, match="labels go from 0 to 9"):
        label_noise(labels, 0.1, 5, seed=0)


def test_label_noise_that_is_always_wrong_comes_from_the_other_classes():
    labels = torch.arange(1000) % 10
    noisy = label_noise(labels, 0.9, 10, seed=3, always_wrong=True)
    moved = (noisy - labels) % 10
    assert (moved != 0).sum() == 900
    assert torch.bincount(moved, minlength=10)[1:].min() > 65  # of 100 expected


# ---- the demo's digits -----------------------------------------------------------------------------------------


def test_split_is_fixed_and_only_training_labels_are_noisy():
    clean, clean_test = noisy_digits(768, 0.0, 0)
    noisy, noisy_test = noisy_digits(768, 0.2, 0)
    assert torch.equal(clean.images, noisy.images) and torch.equal(clean_test.labels, noisy_test.labels)
    assert int((clean.labels != noisy.labels).sum()) == round(0.2 * 768)
    assert len(clean) + len(clean_test) == 1797
    std, mean = torch.std_mean(clean.images)
    assert abs(mean) < 1e-5 and abs(std - 1) < 1e-5
    again = noisy_digits(768, 0.2, 0)[0]
    assert torch.equal(again.labels, noisy.labels) and not torch.equal(
        noisy_digits(768, 0.2, 1)[0].labels, noisy.labels
    )


def test_the_digits_are_the_same_images_from_both_sources():
    """As uint8 with the datasets library, standardised without it."""
    kept = in_memory(open_dataset("digits").train)
    train, _ = noisy_digits(1000, 0.0, 0)
    assert torch.equal(kept.labels, train.labels)
    pixels = kept.images.float()
    torch.testing.assert_close((pixels - pixels.mean()) / pixels.std(), train.images, atol=1e-2, rtol=0)
