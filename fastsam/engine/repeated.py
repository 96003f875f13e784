"""A second backward pass through the first one's graph, where torch itself cannot notice it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor

from fastsam.engine.recipe import Group, Recipe
from fastsam.flat.space import FlatSpace


class RepeatedGradient:
    """Warns, once, of a second gradient that is the first one.

    The gradient of a linear model needs none of its weights, so that nothing in the graph says that they changed. The
    sums tell, where both are of the gradients of all parameters, and of nothing else.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._comparable = not recipe.averages and not recipe.along_momentum
        self._told = False

    def look(self, first: Tensor, second: Tensor, spaces: Iterable[FlatSpace], groups: list[Group]) -> None:
        """``first`` and ``second`` are the Gram sums of a step's passes, which the host has waited for."""
        if self._told or not self._comparable or not 0 != first.tolist()[0] == second.tolist()[0]:
            return
        if not all(space.perturbed for space in spaces) or any(g["adaptive"] or not g["rho"] for g in groups):
            return
        self._told = True
        warnings.warn(
            "the second gradient is the first one, bit for bit, so that this is the base optimizer's step: compute the "
            "loss again after first_step(), without retain_graph=True; where the loss is linear in the weights, there "
            "is nothing to gain from SAM",
            RuntimeWarning,
            stacklevel=6,
        )
