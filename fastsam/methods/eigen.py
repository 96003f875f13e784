r"""Eigen-SAM: SAM pulled towards the top Hessian eigenvector.

SAM's theory assumes that the perturbation aligns with the top eigenvector v of the Hessian; in practice it hardly
does. Eigen-SAM adds v's part orthogonal to the gradient:

    g^ = g / (||g|| + 1e-12)
    e  = rho (g^ + alpha sign<g,v> (v - <g^,v> g^))

which is the combination c_d g + c_v v with c_d = rho (1/||g|| - alpha s <g,v>/||g||^2) and c_v = rho alpha s,
s = sign<g,v>. It is not normalised again. With ``adaptive`` the finished direction is multiplied by w^2 and norms
stay plain. v comes from power steps of Hessian-vector products every ``freq`` steps. All this as in the authors' code.
Before the first estimate the step is SAM's; their training script climbs by rho g then, as it leaves out the norm.
Source: Luo, Truong, Pham, Harandi, Phung, Le, "Explicit Eigenvalue Regularization Improves Sharpness-Aware
Minimization", NeurIPS 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.amp import GradScaler
from typing_extensions import Unpack

from fastsam.closures import Closure
from fastsam.curvature.solvers import Eigenpairs
from fastsam.engine.recipe import NORM_EPSILON, Group, Scalar
from fastsam.loop.foreign import any_foreign
from fastsam.methods.eigenvector import Estimate, Estimates, check_freq, members, nothing_like, store, stored
from fastsam.methods.sam import SamRecipe
from fastsam.optimizer import (
    BaseOptimizer,
    ClosureOptions,
    FinishOptions,
    MicroBatchOptions,
    Params,
    SharpnessAware,
)
from fastsam.support.checks import at_least

__all__ = ["EigenRecipe", "EigenSAM", "Estimate"]


class EigenRecipe(SamRecipe):
    eigenvector = True
    weighted_norm = False

    def check(self, group: Group) -> None:
        super().check(group)
        at_least(0, "alpha", group["alpha"])
        check_freq(group["freq"])

    def climb(self, uu: Scalar, uv: Scalar, vv: Scalar, group: Group) -> tuple[Scalar, Scalar]:
        norm = uu**0.5 + NORM_EPSILON
        sign = (uv > 0) * 1.0 - (uv < 0) * 1.0
        c_v = group["rho"] * group["alpha"] * sign
        return group["rho"] / norm - c_v * (uv / norm) / norm, c_v

    climb.closed_form = True  # type: ignore[attr-defined]  # what every compiled kernel can compute by itself


class EigenSAM(SharpnessAware):
    """Eigen-SAM around any ``torch.optim`` optimizer.

    Args:
        params: parameters or groups; ``rho``, ``alpha``, ``adaptive`` and ``perturb`` may differ by group.
        base_optimizer: an optimizer class, such as ``torch.optim.SGD``.
        rho: radius of SAM's part of the perturbation; >= 0.
        alpha: weight of the eigenvector's orthogonal part; >= 0, where 0 is SAM.
        freq: steps from one estimate of the eigenvector to the next; >= 1.
        adaptive: multiply the finished direction by w^2.
        backend: ``"auto"``, or a name from :func:`fastsam.backends`.
        estimate: an :class:`~fastsam.methods.eigen.Estimate`, if the eigenvector is not to be the authors' five
            power steps.
        base_kwargs: arguments of the base optimizer; also ``state_dtype=torch.bfloat16``, for less memory
            (docs/training_loops.md), and those that :class:`~fastsam.SAM` names.

    Errors as for :class:`~fastsam.SAM`. In a manual loop ``update_eigenvector`` is called when it is due;
    ``step(closure)`` does so by itself. ``last_estimate`` says how good the last one was: an
    :class:`~fastsam.curvature.Eigenpairs` without its vectors, or None.

    Example:
        >>> if optimizer.eigenvector_due():
        ...     optimizer.update_eigenvector(lambda: loss_fn(model(x), y), model)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.first_step(zero_grad=True)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.second_step(zero_grad=True)
    """

    recipe = EigenRecipe()

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        alpha: float = 0.2,
        freq: int = 100,
        adaptive: bool = False,
        *,
        backend: str = "auto",
        estimate: Estimate | None = None,
        **base_kwargs: Any,
    ) -> None:
        self._estimates = Estimates(freq, estimate)
        defaults = dict(rho=rho, alpha=alpha, freq=freq, adaptive=adaptive, steps=0)
        super().__init__(params, base_optimizer, defaults, backend, base_kwargs)

    @property
    def estimate(self) -> Estimate:
        """How the eigenvector is estimated."""
        return self._estimates.chosen

    @estimate.setter
    def estimate(self, chosen: Estimate) -> None:
        self._estimates.choose(chosen)

    @property
    def last_estimate(self) -> Eigenpairs | None:
        """How good the last estimate was: an :class:`~fastsam.curvature.Eigenpairs` without its vectors, or None."""
        return self._estimates.last

    def state_dict(self) -> dict[str, Any]:
        """:meth:`SAM.state_dict`; before the first estimate v is zero there, as every checkpoint has the same keys.

        Such zeros take no memory until they are loaded, and a step with them is SAM's.
        """
        found = super().state_dict()
        order = [i for group in found["param_groups"] for i in group["params"]]
        for i, (p, perturb) in zip(order, members(self.two_pass), strict=True):
            entry = found["state"].get(i, {})
            if perturb and p.requires_grad and "eigenvector" not in entry:
                found["state"][i] = {**entry, "eigenvector": nothing_like(p, self.two_pass.precision.of_state(p))}
        return found

    def eigenvector_due(self, step: int | None = None) -> bool:
        """Whether ``freq`` asks for a new estimate before this step: every ``freq`` steps, not at step 0.

        ``step`` defaults to the number of steps taken. The authors count from 0 in each epoch: pass that number
        to do as they do.
        """
        group = self.two_pass.groups()[0]
        step = group["steps"] if step is None else step
        return step > 0 and step % group["freq"] == 0

    def step(
        self,
        closure: Closure | None = None,
        estimate_closure: Closure | None = None,
        **options: Unpack[ClosureOptions],
    ) -> Any:
        """:meth:`SAM.step`, which first refreshes the eigenvector when that is due.

        Its products are those of what ``estimate_closure``, which may take a smaller batch, or else ``closure`` calls
        ``backward()`` on: exact ones from a single evaluation, finite differences from two for each product (see
        :class:`Estimate`). An estimate that meets a NaN or an infinity is a warning, and the vector stays.
        """
        if closure is not None and self._is_to_refresh(closure) and not any_foreign(self.two_pass.parameters()):
            self._refresh(estimate_closure or closure, **options)
        return super().step(closure, **options)

    def finish(
        self, closure: Closure, estimate_closure: Closure | None = None, **options: Unpack[FinishOptions]
    ) -> Any:
        """:meth:`SAM.finish`, which first refreshes the eigenvector when that is due, as :meth:`step` does."""
        if self._is_to_refresh(closure):
            self._refresh(estimate_closure or closure, **options)
        return super().finish(closure, **options)

    def accumulate(
        self, closure: Closure, estimate_closure: Closure | None = None, **options: Unpack[MicroBatchOptions]
    ) -> Any:
        """:meth:`SAM.accumulate`, which first refreshes the eigenvector when that is due, as :meth:`step` does.

        That is before the first micro-batch of a step, from its closure.
        """
        if self._is_to_refresh(closure) and not any_foreign(self.two_pass.parameters()):
            self._refresh(estimate_closure or closure, **options)
        return super().accumulate(closure, **options)

    def update_eigenvector(self, loss_fn: Callable[[], torch.Tensor], model: torch.nn.Module | None = None) -> None:
        """Estimates v, by default with five power steps of exact Hessian-vector products from the previous v.

        ``loss_fn()`` does a forward pass and returns the scalar loss with its graph, without backward. ``model``, if
        given, is in eval mode meanwhile, as the authors have it. The first estimate starts from a normal random
        vector. Weights, gradients, buffers, training flags and random generators are afterwards what they were.
        A loss without a second derivative has its products formed by finite differences, with a warning.

        Raises ``RuntimeError`` between the passes and for a loss without a graph, ``TypeError`` or ``ValueError`` for
        a loss that is no scalar tensor, ``FloatingPointError`` for a product that is not finite; v is then what it was.
        """
        if self.two_pass.perturbed:
            raise RuntimeError("update_eigenvector() between first_step() and second_step(): call it before the step")
        self._estimates.update(self.two_pass, loss_fn, model)

    def _is_to_refresh(self, closure: Closure | None) -> bool:
        """Whether an estimate is due; not where the step is about to be refused."""
        return closure is not None and not self.two_pass.perturbed and self.eigenvector_due()

    def _refresh(
        self,
        closure: Closure,
        *,
        model: torch.nn.Module | None = None,
        grad_scaler: GradScaler | None = None,
        **_: object,
    ) -> None:
        self.two_pass.drop_left_gradients()
        scale = 1.0 if grad_scaler is None else grad_scaler.get_scale()
        self._estimates.refresh(self.two_pass, closure, scale, model)

    @property
    def eigenvector(self) -> list[torch.Tensor] | None:
        """v, shaped like the parameters in the order of the groups, or None before the first estimate.

        Assign a list of such tensors to set it, or None to forget it. Parameters of a ``perturb=False`` group and
        frozen ones have zeros, which take no memory. Raises ``ValueError`` for a wrong number or shapes, or values that
        are not finite, ``TypeError`` for anything but real tensors.
        """
        return stored(self.two_pass)

    @eigenvector.setter
    def eigenvector(self, v: Sequence[torch.Tensor] | None) -> None:
        store(self.two_pass, v)
