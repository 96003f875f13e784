"""The second side of a step: the combination of second gradient and stored vector that the update is made with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsam.distributed.shards import local
from fastsam.engine.averages import Accumulated
from fastsam.engine.recipe import Group, Mixture, Recipe
from fastsam.engine.spaces import Spaces
from fastsam.flat.space import FlatSpace
from fastsam.kernels import Descent
from fastsam.kernels.torch import clip_coefficient


class SecondSide:
    """One step's second side.

    Args:
        recipe: the method's.
        groups: with the recipe's own names, checked.
        first: the Gram sums of the first pass, or None where the step made none.
        accumulated: the step's micro-batches, if it has any.
        max_norm: the norm that h is clipped to, or None.
    """

    def __init__(
        self,
        recipe: Recipe,
        groups: list[Group],
        first: Tensor | None,
        accumulated: Accumulated | None,
        max_norm: float | None,
    ) -> None:
        self.recipe, self.groups, self.first, self.max_norm = recipe, groups, first, max_norm
        #: The buffer of s in every perturbed space; where there is none, s is 0.
        self.buffer: str | None = None
        if first is not None and accumulated is not None:
            self.buffer = "gradient_total"  # so that the first sums, too, are those of all micro-batches together
        elif first is not None and recipe.keeps_gradient:
            self.buffer = "gradient"
        elif first is None:
            self.buffer = recipe.stored
        #: The sums <g,g>, <g,s>, <s,s> over the perturbed groups.
        self.second: Tensor | None = None
        if max_norm is not None and len({self._kind(group) for group in groups}) > 1:
            raise ValueError(
                f"max_norm={max_norm!r}: the norm that the update is made with is not known where groups differ in "
                f"{', '.join((*(recipe.descends_by or ()), 'perturb'))}: clip by clip_value, or give all the same"
            )

    def _kind(self, group: Group) -> tuple:
        return (bool(group["perturb"]), *(group[name] for name in self.recipe.descends_by or ()))

    def vector(self, space: FlatSpace, grad_scale: float | Tensor) -> Tensor | None:
        """s in one space, for the sums of the second gradient, which ``grad_scale`` multiplies.

        A parameter that met its first gradient in the second pass has that one for both.
        """
        if self.buffer is None or not space.perturbed:
            return None
        buffer = space.vector(self.buffer)
        if self.buffer == self.recipe.stored:
            space.adopt(self.buffer, buffer)
        if self.buffer == "gradient" and not all(space.climbed):
            for view, g, climbed in zip(buffer.views, space.gradients, space.climbed, strict=True):
                if g is not None and not climbed:
                    local(view).copy_(g * grad_scale)
        return buffer.flat

    def add_up(self, spaces: Spaces, sums: list[Tensor], total: Tensor) -> None:
        """Takes, of every space's ``sums`` and their ``total``, those of the perturbed groups."""
        kept = [(space, s) for space, s in zip(spaces, sums, strict=True) if space.perturbed]
        self.second = total if len(kept) == len(sums) else spaces.total(*map(list, zip(*kept, strict=True)))

    def enter(self, descent: Descent, space: FlatSpace) -> None:
        """Tells a descent what to make its update with."""
        if not space.perturbed:
            return
        descent.stored = None if self.buffer is None else space.vector(self.buffer).flat
        if self.first is not None and self.recipe.stored is not None:
            kept = space.vector(self.recipe.stored)
            space.adopt(self.recipe.stored, kept)
            descent.stored_next = kept.flat
        assert self.second is not None
        descent.mixtures = self._mixtures(space, self.second.to(space.device))

    def _mixtures(self, space: FlatSpace, second: Tensor) -> Callable[[Sequence, Group], Mixture]:
        on_host = space.kernels.DECIDES_ON_HOST
        sums = second.tolist() if on_host else second.unbind()
        first: Sequence | None = None
        if self.buffer == "gradient_total":
            first = (sums[2], 0.0, 0.0)
        elif self.first is not None:
            first = self.first.tolist() if on_host else self.first.to(space.device).unbind()

        def mixture(_: Sequence, group: Group) -> Mixture:
            found = self.recipe.between(sums, group) if first is None else self.recipe.descend(first, sums, group)
            if self.max_norm is None:
                return found
            a, b = found.gradient, found.stored
            scale = _clip_scale(self.max_norm, a * a * sums[0] + 2 * a * b * sums[1] + b * b * sums[2])
            return found._replace(gradient=a * scale, stored=b * scale)

        return mixture


def _clip_scale(max_norm: float, squared_norm: float | Tensor) -> float | Tensor:
    if isinstance(squared_norm, Tensor):
        return torch.clamp(max_norm / (squared_norm.clamp(min=0).sqrt() + 1e-6), max=1.0)
    return clip_coefficient(max_norm, max(squared_norm, 0.0))
