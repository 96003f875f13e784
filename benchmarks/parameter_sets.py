"""Parameter sets of well-known networks, as shapes only: what an optimizer sees of a model.

| name | tensors | parameters | network |
|---|---|---|---|
| ``resnet18`` | 62 | 11,689,512 | He et al. 2016, ImageNet head (torchvision's shapes) |
| ``wrn28-10`` | 80 | 36,479,194 | Zagoruyko and Komodakis 2016, CIFAR-10 head |
| ``vit-b16`` | 152 | 86,567,656 | Dosovitskiy et al. 2021, ImageNet head, 224 pixels (torchvision's shapes) |
| ``tiny2000`` | 2,000 | 100,000 | no network: many small tensors: the cost of each is all there is |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ParameterSet:
    """A named list of tensor shapes in the order of the model's ``parameters()``."""

    name: str
    title: str
    shapes: tuple[Shape, ...]

    @property
    def tensors(self) -> int:
        return len(self.shapes)

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def random(self, seed: int, scale: float) -> list[torch.Tensor]:
        """float32 tensors of the set's shapes, drawn from N(0, scale²); the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator).mul_(scale) for shape in self.shapes]

    def module(self, weights: list[torch.Tensor]) -> nn.Module:
        """A module that holds copies of ``weights`` as its parameters (it has no forward)."""
        module = nn.Module()
        module.weights = nn.ParameterList(nn.Parameter(weight.clone()) for weight in weights)
        return module


def parameter_set(name: str) -> ParameterSet:
    """The set called ``name``. Raises ``ValueError`` naming the known sets otherwise."""
    if name not in _SETS:
        raise ValueError(f"unknown parameter set {name!r}; known: {', '.join(_SETS)}")
    title, generate = _SETS[name]
    return ParameterSet(name, title, tuple(generate()))


def set_names() -> list[str]:
    return list(_SETS)


def host_only_set(count: int) -> ParameterSet:
    """``count`` tensors of one or two elements: what is left of a step's time is the host's work."""
    return ParameterSet(
        f"host{count}", f"{count} tensors of 1 or 2 elements", tuple(islice(cycle([(1,), (2,)]), count))
    )


def _resnet18() -> Iterator[Shape]:
    yield from _convolution_and_norm(3, 64, 7)
    channels = 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            yield from _convolution_and_norm(channels, width, 3)
            yield from _convolution_and_norm(width, width, 3)
            if channels != width:
                yield from _convolution_and_norm(channels, width, 1)
            channels = width
    yield from _linear(512, 1000)


def _wrn28_10() -> Iterator[Shape]:
    yield (16, 3, 3, 3)
    channels = 16
    for width in (160, 320, 640):
        for _ in range(4):
            yield from _norm(channels)
            yield (width, channels, 3, 3)
            yield from _norm(width)
            yield (width, width, 3, 3)
            if channels != width:
                yield (width, channels, 1, 1)
            channels = width
    yield from _norm(640)
    yield from _linear(640, 10)


def _vit_b16(width: int = 768, mlp: int = 3072, depth: int = 12) -> Iterator[Shape]:
    yield (1, 1, width)  # class token
    yield from ((width, 3, 16, 16), (width,))
    yield (1, 14 * 14 + 1, width)  # position embedding
    for _ in range(depth):
        yield from _norm(width)
        yield from _linear(width, 3 * width)
        yield from _linear(width, width)
        yield from _norm(width)
        yield from _linear(width, mlp)
        yield from _linear(mlp, width)
    yield from _norm(width)
    yield from _linear(width, 1000)


def _tiny2000() -> Iterator[Shape]:
    shapes = ((64,), (8, 8), (3, 3, 3, 2), (10, 5), (1,), (7,), (10,), (4, 25), (50,), (5, 20))
    return islice(cycle(shapes), 2000)


def _convolution_and_norm(inputs: int, outputs: int, size: int) -> Iterator[Shape]:
    yield (outputs, inputs, size, size)
    yield from _norm(outputs)


def _norm(width: int) -> tuple[Shape, Shape]:
    return (width,), (width,)


def _linear(inputs: int, outputs: int) -> tuple[Shape, Shape]:
    return (outputs, inputs), (outputs,)


_SETS: dict[str, tuple[str, Callable[[], Iterator[Shape]]]] = {
    "resnet18": ("ResNet-18", _resnet18),
    "wrn28-10": ("WRN-28-10", _wrn28_10),
    "vit-b16": ("ViT-B/16", _vit_b16),
    "tiny2000": ("2,000 tiny tensors", _tiny2000),
}
