r"""F-SAM and Eigen-SAM together: the batch noise, pulled towards the top Hessian eigenvector.

    d  = g - sigma m                  (F-SAM's direction, and m as there)
    d^ = d / (||d|| + 1e-12)
    e  = rho (d^ + alpha sign<d,v> (v - <d^,v> d^))

which is Eigen-SAM's combination with d in the place of g; ``adaptive`` multiplies it by w^2, as there. Nobody has
published this: it is here because it costs no more code than the two kernels' common case. Sources of its halves:
``fastsam.methods.friendly`` and ``fastsam.methods.eigen``.
"""

from __future__ import annotations

from typing import Any

from fastsam.methods.eigen import EigenRecipe, EigenSAM
from fastsam.methods.eigenvector import Estimate, Estimates
from fastsam.methods.friendly import FriendlyRecipe
from fastsam.optimizer import BaseOptimizer, Params, SharpnessAware


class FriendlyEigenRecipe(EigenRecipe, FriendlyRecipe):
    """F-SAM's average and Eigen-SAM's combination, each with its own checks."""


class FriendlyEigenSAM(EigenSAM):
    """Eigen-SAM along F-SAM's direction, around any ``torch.optim`` optimizer.

    Args:
        params: parameters or groups; ``rho``, ``sigma``, ``lmbda``, ``alpha``, ``adaptive`` and ``perturb`` may differ
            by group.
        base_optimizer: an optimizer class, such as ``torch.optim.SGD``.
        rho: radius of F-SAM's part of the perturbation; >= 0.
        sigma, lmbda: as in :class:`~fastsam.FriendlySAM`; with ``sigma=0`` this is Eigen-SAM.
        alpha, freq, estimate: as in :class:`~fastsam.EigenSAM`; with ``alpha=0`` this is F-SAM.
        adaptive: multiply the finished direction by w^2.
        backend: ``"auto"``, or a name from :func:`fastsam.backends`.
        base_kwargs: arguments of the base optimizer.

    Errors and the eigenvector's refreshing as in :class:`~fastsam.EigenSAM`.
    """

    recipe = FriendlyEigenRecipe()

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        alpha: float = 0.2,
        freq: int = 100,
        adaptive: bool = False,
        *,
        backend: str = "auto",
        estimate: Estimate | None = None,
        **base_kwargs: Any,
    ) -> None:
        self._estimates = Estimates(freq, estimate)
        defaults = dict(rho=rho, sigma=sigma, lmbda=lmbda, alpha=alpha, freq=freq, adaptive=adaptive, steps=0)
        SharpnessAware.__init__(self, params, base_optimizer, defaults, backend, base_kwargs)
