r"""F-SAM: friendly sharpness-aware minimisation.

The batch gradient is the full gradient plus noise, and only the noise helps. F-SAM estimates the full gradient by
an exponential moving average m and subtracts it before SAM's perturbation:

    d = g - sigma m                   (the first gradient a parameter has is itself the direction)
    e = rho d / (||d|| + 1e-12)
    m <- lmbda m + (1 - lmbda) g      (the first gradient starts m)

with the raw gradient g and the old m in d, as in the authors' code. ``adaptive=True`` gives ASAM's
e = rho w^2 d / (|| |w| d || + 1e-12). Source: Li, Zhou, He, Cheng, Huang, "Friendly Sharpness-Aware
Minimization", CVPR 2024.
"""

from __future__ import annotations

from typing import Any

from fastsam.engine.recipe import Group
from fastsam.methods.sam import SAM, SamRecipe
from fastsam.optimizer import BaseOptimizer, Params, SharpnessAware
from fastsam.support.checks import at_least, in_range


class FriendlyRecipe(SamRecipe):
    averages = True

    def check(self, group: Group) -> None:
        super().check(group)
        at_least(0, "sigma", group["sigma"])
        in_range(0, 1, "lmbda", group["lmbda"])


class FriendlySAM(SAM):
    """F-SAM around any ``torch.optim`` optimizer.

    Args:
        params: parameters or groups; ``rho``, ``sigma``, ``lmbda``, ``adaptive`` and ``perturb`` may differ by group.
        base_optimizer: an optimizer class, such as ``torch.optim.SGD``.
        rho: radius of the perturbation; >= 0.
        sigma: how much of the average is subtracted; >= 0, where 0 is SAM.
        lmbda: decay of the average, in [0, 1).
        adaptive: ASAM's ball instead of SAM's.
        backend: ``"auto"``, or a name from :func:`fastsam.backends`.
        base_kwargs: arguments of the base optimizer; also ``state_dtype=torch.bfloat16``, for less memory
            (docs/training_loops.md), and those that :class:`~fastsam.SAM` names.

    The average is ``optimizer.state[p]["momentum"]``, as in the authors' code. Errors as for
    :class:`~fastsam.SAM`.
    """

    recipe = FriendlyRecipe()

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        adaptive: bool = False,
        *,
        backend: str = "auto",
        **base_kwargs: Any,
    ) -> None:
        defaults = dict(rho=rho, sigma=sigma, lmbda=lmbda, adaptive=adaptive)
        SharpnessAware.__init__(self, params, base_optimizer, defaults, backend, base_kwargs)
