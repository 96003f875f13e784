r"""Stable SAM: the second gradient's direction at the first one's length.

    e = rho g / (||g|| + 1e-12)
    h = (||g|| / ||g_+||) g_+

Norms are global over the perturbed groups. Source: Tan, Zhang, Liu, Gong, "Stabilizing Sharpness-Aware Minimization
through a Simple Renormalization Strategy", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastsam.engine.recipe import NORM_EPSILON, Group, Mixture, Scalar
from fastsam.methods.sam import SamRecipe
from fastsam.optimizer import BaseOptimizer, Params, SharpnessAware


class StableRecipe(SamRecipe):
    descends_by = ()

    def descend(self, first: Sequence[Scalar], second: Sequence[Scalar], group: Group) -> Mixture:
        return Mixture(first[0] ** 0.5 / (second[0] ** 0.5 + NORM_EPSILON), 0.0)


class StableSAM(SharpnessAware):
    """Stable SAM around any ``torch.optim`` optimizer.

    Args:
        params: parameters or groups; ``rho`` and ``perturb`` may differ by group.
        base_optimizer: an optimizer class, such as ``torch.optim.SGD``.
        rho: radius of the perturbation; >= 0.
        backend: ``"auto"``, or a name from :func:`fastsam.backends`.
        base_kwargs: arguments of the base optimizer.

    Errors as for :class:`~fastsam.SAM`.
    """

    recipe = StableRecipe()

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        *,
        backend: str = "auto",
        **base_kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, dict(rho=rho, adaptive=False), backend, base_kwargs)
