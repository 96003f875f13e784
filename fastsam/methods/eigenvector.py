"""The top Hessian eigenvector v that Eigen-SAM's perturbation is pulled towards: its estimate, and where it is kept."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsam.curvature.products import METHODS, Hessian
from fastsam.curvature.solvers import Eigenpairs, lanczos, power_iteration
from fastsam.distributed.ranks import processes
from fastsam.distributed.shards import local, placed_like
from fastsam.engine.spaces import takes_part
from fastsam.engine.step import Step


@dataclass(frozen=True)
class Estimate:
    """How Eigen-SAM estimates the eigenvector; the defaults are the authors'.

    Attributes:
        solver: ``"power"``, which goes to the eigenvalue of largest magnitude, or ``"lanczos"``, which goes to the
            largest one, and in fewer products.
        products: Hessian-vector products of one estimate, at most; >= 1. Each costs about two gradients. Lanczos
            keeps as many vectors in memory.
        tolerance: relative residual at which an estimate may stop earlier, or None.
        warm_start: go on from the previous vector, or start each time anew: from noise, Lanczos with some gradient.
        method: how products are formed: ``"exact"`` as the authors do, ``"finite-difference"``, or ``"auto"``: exact,
            and by differences, with a warning, where there is no second derivative or no memory for it.
        eval_mode: modules are in eval mode meanwhile. None is the authors' way in ``update_eigenvector``, eval mode
            if the model is given, and leaves them in their mode in ``step(closure)``.
    """

    solver: str = "power"
    products: int = 5
    tolerance: float | None = None
    warm_start: bool = True
    method: str = "auto"
    eval_mode: bool | None = None

    def __post_init__(self) -> None:
        if self.solver not in ("power", "lanczos"):
            raise ValueError(f"solver={self.solver!r} is unknown: choose power or lanczos")
        if not isinstance(self.products, int) or self.products < 1:
            raise ValueError(f"products={self.products!r} must be a whole number, at least 1")
        if self.tolerance is not None and not 0 < self.tolerance < float("inf"):
            raise ValueError(f"tolerance={self.tolerance!r} must be a positive number, or None")
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown: choose one of {', '.join(METHODS)}")


class Estimates:
    """How an optimizer's eigenvector is estimated, and what came of it: one object, which wrappers share."""

    def __init__(self, freq: int, chosen: Estimate | None) -> None:
        check_freq(freq)
        self.choose(chosen)
        #: How good the last one was, without its vectors.
        self.last: Eigenpairs | None = None
        self._no_second_derivative = self._warned_of_sign = False

    def choose(self, chosen: Estimate | None) -> None:
        """Has later estimates be made so; None is the authors' way."""
        if not isinstance(chosen, (Estimate, type(None))):
            raise TypeError(f"estimate={chosen!r} must be a fastsam.methods.eigen.Estimate, or None")
        self.chosen = chosen or Estimate()

    def update(self, step: Step, loss_fn: Callable, model: torch.nn.Module | None) -> None:
        """Makes a new estimate from ``loss_fn``, which returns a loss with its graph."""
        eval_mode = self.chosen.eval_mode
        self._estimate(step, self._hessian(step, loss_fn, model, model is not None if eval_mode is None else eval_mode))

    def refresh(self, step: Step, closure: Callable, scale: float, model: torch.nn.Module | None) -> None:
        """Makes a new estimate from a ``closure``, which calls backward() on ``scale`` times the loss.

        One that meets a NaN or an infinity is a warning, and the vector stays.
        """
        try:
            eval_mode = bool(self.chosen.eval_mode)
            self._estimate(step, self._hessian(step, closure, model, eval_mode, closure=True, loss_scale=scale))
        except FloatingPointError as error:
            warnings.warn(f"the eigenvector was not refreshed: {error}", RuntimeWarning, stacklevel=5)

    def _hessian(
        self, step: Step, loss_fn: Callable, model: torch.nn.Module | None, eval_mode: bool, **options: Any
    ) -> Hessian:
        method = self.chosen.method
        if method == "auto" and self._no_second_derivative:
            method = "finite-difference"  # as it was said
        params = [p for p, perturb in members(step) if perturb and p.requires_grad]
        step.groups()  # which gives groups assigned from elsewhere what they lack
        step.spaces.refresh(step.base.param_groups, step.state)
        spaces = [space for space in step.spaces if space.perturbed]
        return Hessian(loss_fn, params, method=method, model=model, eval_mode=eval_mode, spaces=spaces, **options)

    def _estimate(self, step: Step, hessian: Hessian) -> None:
        chosen = self.chosen
        with hessian:
            # The start vector has no name here: its memory is free once a solver has moved on.
            if chosen.solver == "power":
                pairs = power_iteration(
                    hessian.product, self._start(step, hessian), chosen.products, chosen.tolerance, hessian.inner
                )
            else:
                pairs = lanczos(
                    hessian.product,
                    self._start(step, hessian),
                    products=chosen.products,
                    tolerance=chosen.tolerance,
                    inner=hessian.inner,
                )
            v = pairs.vectors[0]
            if pairs.eigenvalues[0] == 0:  # a zero Hessian has no direction to offer: the step is SAM's
                v = torch.zeros_like(v)
            estimate = dict(zip(hessian.params, hessian.tensors(v), strict=True))
        self._no_second_derivative |= chosen.method == "auto" and hessian.method == "finite-difference"
        self.last = dataclasses.replace(pairs, vectors=None)
        store(step, [estimate[p] if p in estimate else nothing_like(p) for p, _ in members(step)])
        if pairs.eigenvalues[0] < 0 and chosen.solver == "power" and not self._warned_of_sign:
            self._warned_of_sign = True
            warnings.warn(
                f"power iteration found the negative eigenvalue {float(pairs.eigenvalues[0]):.3g}, the largest in "
                'magnitude; for the largest one say estimate=Estimate(solver="lanczos", products=10)',
                RuntimeWarning,
                stacklevel=5,
            )

    def _start(self, step: Step, hessian: Hessian) -> Tensor:
        previous = stored(step) if self.chosen.warm_start else None
        if previous is not None:
            values = dict(zip((p for p, _ in members(step)), previous, strict=True))
            start = hessian.flat([values[p] for p in hessian.params])
            if hessian.inner.dot(start, start) > 0:
                return start
        if self.chosen.solver == "lanczos":
            return hessian.start()
        if processes() > 1:
            return hessian.random()
        return hessian.flat([torch.randn_like(p) for p in hessian.params])


def stored(step: Step) -> list[Tensor] | None:
    """v, shaped like the parameters in the order of the groups, or None where no parameter has any."""
    found = [step.state[p].get("eigenvector") if p in step.state else None for p in step.parameters()]
    if all(v is None for v in found):
        return None
    pairs = zip(step.parameters(), found, strict=True)
    return [nothing_like(p, step.precision.of_state(p)) if v is None else v for p, v in pairs]


@torch.no_grad()
def store(step: Step, v: Sequence[Tensor] | None) -> None:
    """Makes ``v`` the eigenvector of the parameters that are climbed; None forgets it."""
    step.forget_blank_state()
    params = members(step)
    if v is None:
        for p, _ in params:
            if p in step.state:
                step.state[p].pop("eigenvector", None)
        return
    v = list(v)
    if len(v) != len(params):
        raise ValueError(f"eigenvector has {len(v)} tensors for {len(params)} parameters: give one for each")
    for i, (e, (p, _)) in enumerate(zip(v, params, strict=True)):
        if not isinstance(e, Tensor) or not e.is_floating_point():
            kind = e.dtype if isinstance(e, Tensor) else type(e).__name__
            raise TypeError(f"eigenvector[{i}] is {kind}: it must be a real floating-point tensor")
        if e.shape != p.shape:
            raise ValueError(f"eigenvector[{i}] has shape {tuple(e.shape)}, its parameter {tuple(p.shape)}")
        if not bool(e.isfinite().all()):
            raise ValueError(f"eigenvector[{i}] has values that are not finite")
    for e, (p, perturb) in zip(v, params, strict=True):
        if perturb and takes_part(p):
            step.state[p]["eigenvector"] = e.detach().to(device=p.device, dtype=step.precision.of_state(p), copy=True)


def members(step: Step) -> list[tuple[Tensor, bool]]:
    """Every parameter, and whether it is climbed."""
    return [(p, group.get("perturb", True)) for group in step.base.param_groups for p in group["params"]]


def nothing_like(p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros of p's shape and placement, and of its dtype or ``dtype``, in the memory of one."""
    return placed_like(p, local(p).new_zeros((), dtype=dtype).expand_as(local(p)))


def check_freq(freq: object) -> None:
    if not isinstance(freq, int) or freq < 1:
        raise ValueError(f"freq={freq!r} must be a whole number of steps, at least 1")
