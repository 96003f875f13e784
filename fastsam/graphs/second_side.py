"""The second side of a step within a CUDA graph: the numbers of the groups that it reads, on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.engine.recipe import Group, Mixture, Recipe, Scalar
from fastsam.engine.step import Step
from fastsam.flat.space import FlatSpace
from fastsam.kernels.device import table_of


class DeviceNumbers:
    """The numbers that a recipe's second side reads of the groups, such as ``alpha``, in device memory.

    A number in Python would stay in the graph as it was when the step was captured. ``bring_up_to_date`` copies those
    of now before a replay, in the order of its stream. Flags stay where they are, and so do numbers that are tensors.
    """

    def __init__(self, step: Step, space: FlatSpace) -> None:
        self._step, self._table = step, table_of(space)
        groups = step.groups()
        names = step.recipe.descends_by or ()
        self._names = [[name for name in names if is_number(group.get(name))] for group in groups]
        self._numbers: list[float] = []
        self._tensor = torch.zeros(sum(map(len, self._names)), dtype=torch.float64, device=space.device)
        places = iter(self._tensor.unbind())
        # By its list of parameters, which copies of a group share.
        self._by_group = {
            id(group["params"]): {name: next(places) for name in of_group}
            for group, of_group in zip(groups, self._names, strict=True)
        }
        self.bring_up_to_date()

    def bring_up_to_date(self) -> None:
        groups = zip(self._step.groups(), self._names, strict=True)
        numbers = [float(group[name]) for group, names in groups for name in names]
        if numbers != self._numbers:
            self._table.upload(torch.tensor(numbers, dtype=torch.float64, device="cpu"), self._tensor)
            self._numbers = numbers

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """Has the second side of the steps in the block read them here."""
        recipe = self._step.recipe
        if recipe.descends_by is None:
            yield
            return
        self._step.recipe = _OnDevice(recipe, self._by_group, self._tensor.device)  # type: ignore[assignment]
        try:
            yield
        finally:
            self._step.recipe = recipe


class _OnDevice:
    """In the place of a recipe: its second side with the groups' numbers from the device."""

    def __init__(self, recipe: Recipe, numbers: dict[int, dict[str, Tensor]], device: torch.device) -> None:
        self._recipe, self._numbers, self._device = recipe, numbers, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recipe, name)

    def descend(self, first: Sequence[Scalar], second: Sequence[Scalar], group: Group) -> Mixture:
        return self._tensors(self._recipe.descend(first, second, self._with_numbers(group)))

    def between(self, second: Sequence[Scalar], group: Group) -> Mixture:
        return self._tensors(self._recipe.between(second, self._with_numbers(group)))

    def _with_numbers(self, group: Group) -> Group:
        return {**group, **self._numbers[id(group["params"])]}

    def _tensors(self, mixture: Mixture) -> Mixture:
        """What the steps of two kinds differ in is written by each of their graphs, into the table that they share."""
        if self._recipe.stored is None:
            return mixture
        return Mixture(*map(self._tensor, mixture))

    def _tensor(self, x: Scalar) -> Tensor:
        return x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=self._device)


def is_number(value: object) -> bool:
    """Whether a hyper-parameter is a number in Python, and no flag."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
