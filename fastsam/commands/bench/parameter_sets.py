"""Parameter sets, as shapes only: what an optimizer sees of a model.

| name | tensors | parameters | network |
|---|---|---|---|
| ``resnet18`` | 62 | 11,689,512 | He et al. 2016, ImageNet head and stem |
| ``resnet50`` | 161 | 25,557,032 | the same paper |
| ``wrn28-10`` | 80 | 36,479,194 | Zagoruyko and Komodakis 2016, CIFAR-10 head |
| ``vit-b16`` | 152 | 86,567,656 | Dosovitskiy et al. 2021, ImageNet head, 224 pixels |
| ``vit-l16`` | 296 | 304,326,632 | the same paper |
| ``demo-resnet`` | 29 | 77,754 | the ResNet of ``fastsam demo`` |
| ``demo-vit`` | 43 | 112,138 | its ViT |
| ``gpt-1.3b`` | 292 | 1,315,723,264 | 24 blocks of width 2,048 and GPT-2's vocabulary (Brown et al. 2020) |
| ``tiny2000`` | 2,000 | 100,000 | no network: many small tensors: the cost of each is all there is |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import nn

from fastsam.commands.training import networks

Shape = tuple[int, ...]
_BLOCK = 1 << 24  # as many random numbers are drawn; a larger set repeats them


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

    def random(
        self, seed: int, scale: float, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> list[torch.Tensor]:
        """Tensors of the set's shapes, drawn from N(0, scale²); the same for the same seed on the same device."""
        generator = torch.Generator(device).manual_seed(seed)
        size = min(_BLOCK, self.parameters)
        block = torch.randn(size, generator=generator, device=device).mul_(scale).to(dtype)
        tensors, start = [], 0
        for shape in self.shapes:
            tensors.append(_taken(block, start, math.prod(shape)).view(shape))
            start = (start + math.prod(shape)) % size
        return tensors

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


def scaled_set(parameters: int) -> ParameterSet:
    """The tensors of ViT-B/16, all scaled by one factor to about ``parameters`` parameters, each at least one."""
    original = parameter_set("vit-b16")
    factor = parameters / original.parameters
    shapes = tuple((max(1, round(math.prod(shape) * factor)),) for shape in original.shapes)
    return ParameterSet(f"scaled{parameters}", f"ViT-B/16 scaled to {parameters:,}", shapes)


def even_set(tensors: int, parameters: int) -> ParameterSet:
    """``parameters`` parameters in ``tensors`` tensors of equal size, to rounding."""
    each, rest = divmod(parameters, tensors)
    shapes = tuple((each + (i < rest),) for i in range(tensors))
    return ParameterSet(f"even{tensors}", f"{parameters:,} parameters in {tensors:,} tensors", shapes)


def _taken(block: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """``count`` elements of the block from ``start`` on, round and round."""
    taken = torch.empty(count, dtype=block.dtype, device=block.device)
    filled = 0
    while filled < count:
        piece = block[start : start + count - filled]
        taken[filled : filled + len(piece)] = piece
        filled, start = filled + len(piece), 0
    return taken


def _network(build: Callable[[], nn.Module]) -> Callable[[], Iterator[Shape]]:
    def shapes() -> Iterator[Shape]:
        with torch.device("meta"):
            return (tuple(p.shape) for p in build().parameters())

    return shapes


def _gpt(width: int = 2048, depth: int = 24, vocabulary: int = 50257, context: int = 2048) -> Iterator[Shape]:
    yield (vocabulary, width)
    yield (context, width)
    for _ in range(depth):
        yield from _norm(width)
        yield from _linear(width, 3 * width)
        yield from _linear(width, width)
        yield from _norm(width)
        yield from _linear(width, 4 * width)
        yield from _linear(4 * width, width)
    yield from _norm(width)


def _tiny2000() -> Iterator[Shape]:
    shapes = ((64,), (8, 8), (3, 3, 3, 2), (10, 5), (1,), (7,), (10,), (4, 25), (50,), (5, 20))
    return islice(cycle(shapes), 2000)


def _norm(width: int) -> tuple[Shape, Shape]:
    return (width,), (width,)


def _linear(inputs: int, outputs: int) -> tuple[Shape, Shape]:
    return (outputs, inputs), (outputs,)


_SETS: dict[str, tuple[str, Callable[[], Iterator[Shape]]]] = {
    "resnet18": ("ResNet-18", _network(lambda: networks.resnet18(1000, stem="imagenet"))),
    "resnet50": ("ResNet-50", _network(lambda: networks.resnet50(1000, stem="imagenet"))),
    "wrn28-10": ("WRN-28-10", _network(lambda: networks.wrn28_10(10))),
    "vit-b16": ("ViT-B/16", _network(networks.vit_b16)),
    "vit-l16": ("ViT-L/16", _network(networks.vit_l16)),
    "demo-resnet": ("the demo's ResNet", _network(networks.small_resnet)),
    "demo-vit": ("the demo's ViT", _network(networks.small_vit)),
    "gpt-1.3b": ("GPT, 1.3 B", _gpt),
    "tiny2000": ("2,000 tiny tensors", _tiny2000),
}
