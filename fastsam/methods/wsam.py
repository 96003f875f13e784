r"""WSAM: sharpness as a weighted regulariser.

    e = rho g / (||g|| + 1e-12)
    c = gamma / (1 - gamma)
    h = g + c (g_+ - g)

Decoupled, which is the default, the base optimizer steps with g, as if there were no regulariser, and then
w <- w - lr c (g_+ - g). ``gamma=0.5`` without decoupling is SAM, ``gamma=0`` the base optimizer. Source: Yue, Jiang,
Ye, Gao, Liu, Zhang, "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term", KDD 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastsam.engine.recipe import Group, Mixture, Scalar
from fastsam.methods.sam import SamRecipe
from fastsam.optimizer import BaseOptimizer, Params, SharpnessAware
from fastsam.support.checks import flag, in_range


class WsamRecipe(SamRecipe):
    keeps_gradient = True
    descends_by = ("gamma", "decouple", "lr", "maximize")

    def check(self, group: Group) -> None:
        super().check(group)
        in_range(0, 1, "gamma", group["gamma"])
        flag("decouple", group["decouple"])

    def descend(self, first: Sequence[Scalar], second: Sequence[Scalar], group: Group) -> Mixture:
        weight = group["gamma"] / (1 - group["gamma"])
        if not group["decouple"]:
            return Mixture(weight, 1 - weight)
        rate = group["lr"] * weight * (-1 if group.get("maximize") else 1)
        return Mixture(0.0, 1.0, direct_gradient=rate, direct_stored=-rate)


class WSAM(SharpnessAware):
    """WSAM around any ``torch.optim`` optimizer.

    Args:
        params: parameters or groups; ``rho``, ``gamma``, ``adaptive`` and ``perturb`` may differ by group.
        base_optimizer: an optimizer class, such as ``torch.optim.SGD``.
        rho: radius of the perturbation; >= 0.
        gamma: weight of the sharpness, in [0, 1); the step follows it by gamma / (1 - gamma).
        adaptive: ASAM's ball instead of SAM's.
        decouple: take the sharpness out of the base optimizer's momentum and scaling.
        backend: ``"auto"``, or a name from :func:`fastsam.backends`.
        base_kwargs: arguments of the base optimizer.

    It keeps the first gradient, in one more weight-sized buffer. Errors as for :class:`~fastsam.SAM`.
    """

    recipe = WsamRecipe()

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        gamma: float = 0.9,
        adaptive: bool = False,
        decouple: bool = True,
        *,
        backend: str = "auto",
        **base_kwargs: Any,
    ) -> None:
        defaults = dict(rho=rho, gamma=gamma, adaptive=adaptive, decouple=decouple)
        super().__init__(params, base_optimizer, defaults, backend, base_kwargs)
