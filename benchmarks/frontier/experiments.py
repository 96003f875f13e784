"""What the design makes free and nobody has published: in the frontier first, a method only where it pays."""

from __future__ import annotations

from typing import Any

import torch

from fastsam.engine.recipe import Group
from fastsam.methods.eigen import EigenRecipe, EigenSAM
from fastsam.methods.eigenvector import Estimates
from fastsam.methods.momentum import MomentumRecipe
from fastsam.optimizer import SharpnessAware


class MomentumEigenRecipe(EigenRecipe, MomentumRecipe):
    """e = -rho (b^ + alpha sign<b,v> (v - <b^,v> b^)): Eigen-SAM's combination with the momentum b for the gradient."""

    def check(self, group: Group) -> None:
        EigenRecipe.check(self, group)
        MomentumRecipe.check(self, group)


class MomentumEigenSAM(EigenSAM):
    """Momentum-SAM pulled towards the top Hessian eigenvector: one gradient a step, and the estimates."""

    recipe = MomentumEigenRecipe()

    def __init__(
        self, params: Any, base_optimizer: type[torch.optim.Optimizer], rho: float, alpha: float, freq: int, **base: Any
    ) -> None:
        self._estimates = Estimates(freq, None)
        defaults = dict(rho=rho, alpha=alpha, freq=freq, adaptive=False, steps=0)
        SharpnessAware.__init__(self, params, base_optimizer, defaults, "auto", base)
