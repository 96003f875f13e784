r"""Momentum-SAM: SAM without its first gradient.

The perturbation goes along the momentum b that the base optimizer keeps anyway, so that a step takes one gradient:

    e = -rho b / (||b|| + 1e-12)

b is SGD's ``momentum_buffer`` or Adam's ``exp_avg`` as the last step left it; before there is one, the step is the
base optimizer's. ``adaptive=True`` gives e = -rho w^2 b / (|| |w| b || + 1e-12). Norms are global over all groups. The
radius that works is several times SAM's. Weight decay is the base optimizer's, of w; the authors' code decays w + e
under SGD, and after the update under AdamW. Their weights lie perturbed between steps, ours do not. Source: Becker,
Altrock, Risse, "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead", 2024.
"""

from __future__ import annotations

from typing import Any

from fastsam.engine.recipe import Group
from fastsam.methods.sam import SamRecipe
from fastsam.optimizer import BaseOptimizer, Params, SharpnessAware


class MomentumRecipe(SamRecipe):
    along_momentum = True

    def check(self, group: Group) -> None:
        super().check(group)
        if "momentum" not in group and "betas" not in group:
            raise ValueError(
                "base_optimizer has neither momentum nor betas: MomentumSAM climbs along it: take an optimizer "
                "that keeps one, such as torch.optim.SGD with momentum=0.9 or torch.optim.AdamW"
            )
        if group.get("momentum", 1) == 0 or group.get("betas", (1,))[0] == 0:
            name, remedy = ("betas", "betas=(0.9, 0.999)") if "betas" in group else ("momentum", "momentum=0.9")
            raise ValueError(f"{name}={group[name]!r}: MomentumSAM climbs along the momentum; give {remedy}")

    def numbers(self, group: Group) -> Group:
        return {"rho": -group["rho"]}  # SAM's climb, down the momentum


class MomentumSAM(SharpnessAware):
    """Momentum-SAM around a ``torch.optim`` optimizer that has a momentum.

    Args:
        params: parameters or groups; ``rho``, ``adaptive`` and ``perturb`` may differ by group.
        base_optimizer: an optimizer class whose state has ``momentum_buffer`` or ``exp_avg``, such as
            ``torch.optim.SGD`` with ``momentum=0.9`` or ``torch.optim.AdamW``.
        rho: radius of the perturbation; >= 0.
        adaptive: ASAM's ball instead of SAM's.
        backend: ``"auto"``, or a name from :func:`fastsam.backends`.
        base_kwargs: arguments of the base optimizer.

    Errors as for :class:`~fastsam.SAM`; ``ValueError`` for a base optimizer without momentum.

    Example:
        >>> optimizer = MomentumSAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, momentum=0.9)
        >>> optimizer.zero_grad()
        >>> optimizer.first_step()  # or optimizer.step(closure) for all of it
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.second_step()
    """

    recipe = MomentumRecipe()

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseOptimizer,
        rho: float = 0.3,
        adaptive: bool = False,
        *,
        backend: str = "auto",
        **base_kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, dict(rho=rho, adaptive=adaptive), backend, base_kwargs)
