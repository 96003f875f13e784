r"""Two methods that the papers use to explain SAM and that nobody would train with: not part of the library.

With u = g / ||g||, and H and T the second and third derivatives of the batch's loss, these are the gradients that the
base optimizer is given, to second order in rho:

    SAM          grad L(w + rho u)                  = g + rho H u + rho^2/2 T[u, u]
    EGR          grad (L + rho ||grad L||)          = g + rho H u
    Reverse-SAM  2 grad L(w) - grad L(w - rho u)    = g + rho H u - rho^2/2 T[u, u]

so that the three differ by the third-order term alone. Source: Luo et al., "Explicit Eigenvalue Regularization Improves
Sharpness-Aware Minimization", NeurIPS 2024, whose analysis this is; the expansions are derived here.
"""

from __future__ import annotations

import torch

from fastsam import SAM, EigenSAM
from fastsam.engine.recipe import NORM_EPSILON, Mixture
from fastsam.methods.eigen import EigenRecipe
from fastsam.methods.sam import SamRecipe


class ReverseRecipe(SamRecipe):
    keeps_gradient = True
    descends_by = ()

    def climb(self, uu, uv, vv, group):
        return -group["rho"] / (uu**0.5 + NORM_EPSILON), 0.0

    def descend(self, first, second, group):
        return Mixture(-1.0, 2.0)


class ReverseSAM(SAM):
    """SAM with e = -rho g / ||g|| that descends along 2 g(w) - g(w + e)."""

    recipe = ReverseRecipe()


class ComponentRecipe(EigenRecipe):
    """The coefficients of :class:`GradientComponent`."""

    def __init__(self, component: str) -> None:
        self.component = component

    def climb(self, uu, uv, vv, group):
        known = (vv > 0) * 1.0
        if self.component == "full":
            sign = (uv > 0) * 1.0 - (uv < 0) * 1.0
            return (1 - known) * group["rho"] / (uu**0.5 + NORM_EPSILON), group["rho"] * sign / (vv**0.5 + NORM_EPSILON)
        projection = uv / (vv + (1 - known))
        rest = uu - uv * projection
        scale = group["rho"] / (((rest > 0) * rest) ** 0.5 + NORM_EPSILON)
        return scale, -projection * scale


class GradientComponent(EigenSAM):
    r"""SAM that climbs along one part of the batch's gradient g: F-SAM's ablation.

    With the full gradient v, the gradient of the whole training set, g splits into its projection on v and the rest,
    which is orthogonal to v and due to the batch alone:

        component="full"     e = rho sign<g,v> v / ||v||
        component="noise"    e = rho (g - p v) / ||g - p v||,   p = <g,v>/<v,v>

    v is what ``eigenvector`` is set to before a step. Where nobody sets it, it is the moving average
    m <- lmbda m + (1 - lmbda) g of the batches before, as F-SAM estimates it; the first step is then SAM's. Source of
    the split: Li et al., "Friendly Sharpness-Aware Minimization", CVPR 2024.
    """

    def __init__(self, params, base_optimizer, rho=0.05, lmbda=0.9, component="noise", **options):
        self.recipe = ComponentRecipe(component)
        self.lmbda = lmbda
        super().__init__(params, base_optimizer, rho=rho, alpha=0.0, **options)

    def eigenvector_due(self, step=None):
        return False  # v is no eigenvector here

    @torch.no_grad()
    def first_step(self, zero_grad=False, **options):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        before = self.eigenvector
        after = [g.clone() for g in gradients]
        if before is not None:
            after = torch._foreach_lerp(before, gradients, 1 - self.lmbda)
        super().first_step(zero_grad, **options)
        self.eigenvector = after  # for the next step, unless somebody sets another
