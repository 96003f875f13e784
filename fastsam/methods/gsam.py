r"""GSAM: surrogate gap guided sharpness-aware minimisation.

Descends by the gradient at w + e and, at the same time, by what makes the gap between both losses small: the part of
the gradient at w that is orthogonal to it is subtracted.

    e = rho g / (||g|| + 1e-12)
    h = g_+ - alpha (g - <g, g_+> / ||g_+||^2 g_+)

Norms and products are global over the perturbed groups. The authors let the radius follow the learning rate: see
:class:`fastsam.schedules.ProportionalSchedule`. Source: Zhuang et al., "Surrogate Gap Minimization Improves
Sharpness-Aware Training", ICLR 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastsam.engine.recipe import NORM_EPSILON, Group, Mixture, Scalar
from fastsam.methods.sam import SamRecipe
from fastsam.optimizer import BaseOptimizer, Params, SharpnessAware
from fastsam.support.checks import at_least


class GsamRecipe(SamRecipe):
    keeps_gradient = True
    descends_by = ("alpha",)

    def check(self, group: Group) -> None:
        super().check(group)
        at_least(0, "alpha", group["alpha"])

    def descend(self, first: Sequence[Scalar], second: Sequence[Scalar], group: Group) -> Mixture:
        norm = second[0] ** 0.5 + NORM_EPSILON
        return Mixture(1 + group["alpha"] * (second[1] / norm / norm), -group["alpha"])


class GSAM(SharpnessAware):
    """GSAM around any ``torch.optim`` optimizer.

    Args:
        params: parameters or groups; ``rho``, ``alpha``, ``adaptive`` and ``perturb`` may differ by group.
        base_optimizer: an optimizer class, such as ``torch.optim.SGD``.
        rho: radius of the perturbation; >= 0.
        alpha: how much of the orthogonal part is subtracted; >= 0, where 0 is SAM.
        adaptive: ASAM's ball instead of SAM's.
        backend: ``"auto"``, or a name from :func:`fastsam.backends`.
        base_kwargs: arguments of the base optimizer.

    It keeps the first gradient, in one more weight-sized buffer. Errors as for :class:`~fastsam.SAM`.
    """

    recipe = GsamRecipe()

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        alpha: float = 0.4,
        adaptive: bool = False,
        *,
        backend: str = "auto",
        **base_kwargs: Any,
    ) -> None:
        defaults = dict(rho=rho, alpha=alpha, adaptive=adaptive)
        super().__init__(params, base_optimizer, defaults, backend, base_kwargs)
