r"""SAM and ASAM.

SAM climbs to the (linearised) worst point of a ball of radius rho before it takes the gradient:

    e = rho g / (||g|| + 1e-12)

ASAM (``adaptive=True``) measures the ball relative to the weights, with D = w^2 elementwise:

    e = rho w^2 g / (|| |w| g || + 1e-12)

Norms are global over all groups. Sources: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving
Generalization", ICLR 2021; Kwon et al., "ASAM", ICML 2021.
"""

from __future__ import annotations

from typing import Any

from fastsam.engine.recipe import NORM_EPSILON, Group, Recipe, Scalar
from fastsam.optimizer import BaseOptimizer, Params, SharpnessAware
from fastsam.support.checks import at_least, flag


class SamRecipe(Recipe):
    def check(self, group: Group) -> None:
        at_least(0, "rho", group["rho"])
        flag("adaptive", group["adaptive"])

    def climb(self, uu: Scalar, uv: Scalar, vv: Scalar, group: Group) -> tuple[Scalar, Scalar]:
        return group["rho"] / (uu**0.5 + NORM_EPSILON), 0.0

    climb.closed_form = True  # type: ignore[attr-defined]  # the case alpha = 0 of what every compiled kernel can compute by itself


class SAM(SharpnessAware):
    """Sharpness-aware minimisation around any ``torch.optim`` optimizer.

    Args:
        params: parameters or groups. A group may set its own ``rho`` and ``adaptive``, and ``perturb=False``.
        base_optimizer: an optimizer class, such as ``torch.optim.SGD``.
        rho: radius of the perturbation, in the units of the weights (of relative weights if adaptive); >= 0.
        adaptive: ASAM's ball instead of SAM's.
        backend: ``"auto"``, or a name from :func:`fastsam.backends`.
        base_kwargs: arguments of the base optimizer (``lr``, ``momentum``, ...); also ``m_sharpness`` and
            ``process_group``, for training on several processes (docs/distributed.md), and ``stochastic_rounding``, for
            weights in bfloat16 (docs/training_loops.md).

    Raises:
        ValueError: a hyper-parameter out of range, an unknown backend, an empty parameter list.
        TypeError: parameters that are not real floating-point tensors, a base optimizer that is no class.

    Example:
        >>> optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.first_step(zero_grad=True)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.second_step(zero_grad=True)
    """

    recipe = SamRecipe()

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        backend: str = "auto",
        **base_kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, dict(rho=rho, adaptive=adaptive), backend, base_kwargs)
