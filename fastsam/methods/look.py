r"""LookSAM: SAM at every k-th step, whose sharpness is added again in the steps between.

A step with a climb is SAM's, and keeps the part of its gradient that is orthogonal to the one at w:

    g_v = g_+ - (<g, g_+> / ||g||^2) g

The others take one gradient, at w, and descend by h, so that a step takes 1 + 1/k gradients:

    h = g + alpha (||g|| / ||g_v||) g_v

Norms are of the whole vectors, as in the paper (pytorch_optimizer: of each tensor, and two gradients at every step).
Source: Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastsam.engine.recipe import NORM_EPSILON, Group, Mixture, Scalar
from fastsam.methods.sam import SamRecipe
from fastsam.optimizer import BaseOptimizer, Params, SharpnessAware
from fastsam.support.checks import at_least

_TINY = 1e-300  # less than any square of a norm but 0, so that the part along no gradient is 0


class LookRecipe(SamRecipe):
    keeps_gradient = True
    stored = "sharpness_gradient"
    descends_by = ("alpha",)

    def check(self, group: Group) -> None:
        super().check(group)
        at_least(0, "alpha", group["alpha"])
        if not isinstance(group["k"], int) or group["k"] < 1:
            raise ValueError(f"k={group['k']!r} must be a whole number of steps, at least 1")

    def evaluations(self, steps: int, group: Group) -> int:
        return 2 if steps % group["k"] == 0 else 1

    def descend(self, first: Sequence[Scalar], second: Sequence[Scalar], group: Group) -> Mixture:
        # Without NORM_EPSILON, which would leave a trace of g in g_v for between() to blow up where g_+ is g.
        return Mixture(1.0, 0.0, keep_gradient=1.0, keep_stored=-(second[1] / (second[2] + _TINY)))

    def between(self, second: Sequence[Scalar], group: Group) -> Mixture:
        return Mixture(1.0, group["alpha"] * (second[0] ** 0.5 / (second[2] ** 0.5 + NORM_EPSILON)))


class LookSAM(SharpnessAware):
    """LookSAM around any ``torch.optim`` optimizer.

    Args:
        params: parameters or groups; ``rho``, ``alpha``, ``adaptive`` and ``perturb`` may differ by group.
        base_optimizer: an optimizer class, such as ``torch.optim.SGD``.
        rho: radius of the perturbation; >= 0.
        k: steps from one climb to the next, the first step included; >= 1, where 1 is SAM.
        alpha: length of the reused part relative to the gradient; >= 0.
        adaptive: ASAM's ball instead of SAM's.
        backend: ``"auto"``, or a name from :func:`fastsam.backends`.
        base_kwargs: arguments of the base optimizer.

    A loop by hand asks ``optimizer.evaluations`` and leaves out ``first_step()`` where it is 1. g_v is
    ``optimizer.state[p]["sharpness_gradient"]``. Errors as for :class:`~fastsam.SAM`.
    """

    recipe = LookRecipe()

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        k: int = 5,
        alpha: float = 0.7,
        adaptive: bool = False,
        *,
        backend: str = "auto",
        **base_kwargs: Any,
    ) -> None:
        defaults = dict(rho=rho, k=k, alpha=alpha, adaptive=adaptive, steps=0)
        super().__init__(params, base_optimizer, defaults, backend, base_kwargs)
