"""The first samples of a batch, whatever containers a data loader makes."""

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType

import pytest
import torch

from fastsam.loop.share import check_share, first_part

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    name: str = "train"


class Encoding(UserDict):
    """A mapping that holds more than its items, as BatchEncoding does."""

    kept = "beside the items"


def images(n=8):
    return torch.arange(3.0 * n).reshape(n, 3)


BATCHES = {
    "tensor": lambda x, y, n: x,
    "list": lambda x, y, n: [x, y],
    "tuple": lambda x, y, n: (x, y, 3, "train", None, torch.tensor(2.0)),
    "named tuple": lambda x, y, n: Pair(x, y),
    "dict": lambda x, y, n: {"x": x, "labels": {"a": y, "b": [y, (x,)]}},
    "ordered": lambda x, y, n: OrderedDict(x=x, y=y),
    "encoding": lambda x, y, n: Encoding(x=x, y=y),
    "immutable mapping": lambda x, y, n: MappingProxyType({"x": x}),
    "dataclass": lambda x, y, n: Frozen(x),
    "an item for each sample": lambda x, y, n: {
        "x": x,
        "files": [f"{i}.png" for i in range(n)],
        "targets": [{"boxes": torch.full((i, 4), float(i))} for i in range(n)],
    },
    "two things, two samples": lambda x, y, n: [x[:2], y[:2]],
}


def same(found, expected):
    assert type(found) is type(expected)
    if isinstance(found, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(found, (dict, UserDict, MappingProxyType)):
        assert list(found) == list(expected)
        same(list(found.values()), list(expected.values()))
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            same(a, b)
    elif dataclasses.is_dataclass(found):
        same(dataclasses.astuple(found), dataclasses.astuple(expected))
    else:
        assert found == expected


@pytest.mark.parametrize(("share", "kept"), [(0.25, 2), (0.3, 3), (1.0, 8), (1e-12, 1)])
@pytest.mark.parametrize("kind", BATCHES)
def test_the_part_is_the_batch_of_the_first_samples(kind, share, kept):
    make, x, y = BATCHES[kind], images(), torch.arange(8)
    if kind == "two things, two samples":
        kept = max(1, round(kept / 4))
    batch = make(x, y, 8)
    same(first_part(batch, share), make(x[:kept], y[:kept], kept))
    same(batch, make(x, y, 8))


def test_a_part_is_rounded_up_as_on_paper():
    """0.07 * 100 is more than 7 in floating point."""
    assert [len(first_part(images(100), q)) for q in (0.07, 0.071, 0.29)] == [7, 8, 29]


def test_a_part_lies_in_the_batch_and_a_mapping_keeps_what_it_has_beside_its_items():
    x = images()
    encoding = Encoding(x=x)
    encoding.kept = "set"
    part = first_part(encoding, 0.5)
    assert part["x"].data_ptr() == x.data_ptr() and part.kept == "set"


@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        ({"x": images(), "graph": object()}, TypeError, r"batch\['graph'\] is of type object, which cannot be divided"),
        ((images(), iter([1])), TypeError, r"batch\[1\] is of type list_iterator, which"),
        (
            {"x": images(), "w": torch.ones(3, 2)},
            ValueError,
            r"batch\['w'\] is a Tensor of shape \(3, 2\) in a batch of 8",
        ),
        ((images(), ["a", "b"]), ValueError, r"batch\[1\] is a list of 2 in a batch of 8 samples"),
        (Pair(images(), {"boxes": [torch.ones(3)]}), ValueError, r"batch\[1\]\['boxes'\]\[0\] is a Tensor of shape"),
        (images().to_sparse(), ValueError, "layout torch.sparse_coo"),
        ({"text": ["a"] * 8}, ValueError, r"batch \(a dict of 1\) has no tensor with a first dimension"),
    ],
    ids=lambda value: getattr(value, "__name__", None) if isinstance(value, type) else "",
)
def test_what_cannot_be_divided_is_named_with_the_remedy(batch, error, words):
    with pytest.raises(error, match=words) as raised:
        first_part(batch, 0.5)
    assert "have the collate function make such" in str(raised.value)


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan"), "half", None, True])
def test_a_share_is_a_number_above_0_up_to_1(share):
    with pytest.raises(ValueError, match=r"ascent_share=.* must be a number in \(0, 1\]"):
        check_share(share)
