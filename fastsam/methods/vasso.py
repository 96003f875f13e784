r"""VaSSO: variance suppressed sharpness-aware optimisation.

Climbs along a moving average of the gradients, which is less noisy than one of them:

    m <- (1 - theta) m + theta g      (the first gradient starts m)
    e = rho m / (||m|| + 1e-12)

with the new m in e. That is F-SAM's pass with lmbda = 1 - theta and sigma = -(1 - theta) / theta: g - sigma m is then
the new m divided by theta, which the norm takes out again. ``adaptive=True`` gives e = rho w^2 m / (|| |w| m || +
1e-12). Source: Li and Giannakis, "Enhancing Sharpness-Aware Optimization Through Variance Suppression", NeurIPS 2023.
"""

from __future__ import annotations

from typing import Any

from fastsam.engine.recipe import Group
from fastsam.methods.sam import SamRecipe
from fastsam.optimizer import BaseOptimizer, Params, SharpnessAware


class VassoRecipe(SamRecipe):
    averages = True

    def check(self, group: Group) -> None:
        super().check(group)
        if not 0 < group["theta"] <= 1:
            raise ValueError(f"theta={group['theta']!r} must be in (0, 1]")

    def numbers(self, group: Group) -> Group:
        return {"lmbda": 1 - group["theta"], "sigma": 1 - 1 / group["theta"]}


class VaSSO(SharpnessAware):
    """VaSSO around any ``torch.optim`` optimizer.

    Args:
        params: parameters or groups; ``rho``, ``theta``, ``adaptive`` and ``perturb`` may differ by group.
        base_optimizer: an optimizer class, such as ``torch.optim.SGD``.
        rho: radius of the perturbation; >= 0.
        theta: weight of the new gradient in the average, in (0, 1], where 1 is SAM.
        adaptive: ASAM's ball instead of SAM's.
        backend: ``"auto"``, or a name from :func:`fastsam.backends`.
        base_kwargs: arguments of the base optimizer.

    The average is ``optimizer.state[p]["momentum"]``. Errors as for :class:`~fastsam.SAM`.
    """

    recipe = VassoRecipe()

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        theta: float = 0.4,
        adaptive: bool = False,
        *,
        backend: str = "auto",
        **base_kwargs: Any,
    ) -> None:
        defaults = dict(rho=rho, theta=theta, adaptive=adaptive)
        super().__init__(params, base_optimizer, defaults, backend, base_kwargs)
