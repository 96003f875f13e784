r"""Eigen-SAM: SAM pulled towards the top Hessian eigenvector.

SAM's theory assumes that the perturbation aligns with the top eigenvector v of the Hessian; in practice it hardly
does. Eigen-SAM adds v's part orthogonal to the gradient:

    g^ = g / (||g|| + 1e-12)
    e  = rho (g^ + alpha sign<g,v> (v - <g^,v> g^))

which is the combination c_d g + c_v v with c_d = rho (1/||g|| - alpha s <g,v>/||g||^2) and c_v = rho alpha s,
s = sign<g,v>. It is not normalised again. With ``adaptive`` the finished direction is multiplied by w^2 and norms
stay plain. v comes from power steps of Hessian-vector products every ``freq`` steps. All this as in the authors' code.
Before the first estimate the step is SAM's; their training script climbs by rho g then, as it leaves out the norm.
Source: Luo, Zhou, Cheng, Song, "Explicit Eigenvalue Regularization Improves Sharpness-Aware Minimization",
NeurIPS 2024.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsam.checks import at_least, flag
from fastsam.curvature.products import METHODS, Hessian
from fastsam.curvature.solvers import Eigenpairs, lanczos, power_iteration
from fastsam.distributed import local, placed_like, processes
from fastsam.optimizer import NORM_EPSILON, SharpnessAware
from fastsam.spaces import takes_part


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
        base_kwargs: arguments of the base optimizer.

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

    uses_eigenvector = True
    weighted_norm = False

    def __init__(
        self,
        params,
        base_optimizer,
        rho=0.05,
        alpha=0.2,
        freq=100,
        adaptive=False,
        *,
        backend="auto",
        estimate: Estimate | None = None,
        **base_kwargs,
    ):
        self._plan_estimates(freq, estimate)
        defaults = dict(rho=rho, alpha=alpha, freq=freq, adaptive=adaptive, steps=0)
        super().__init__(params, base_optimizer, defaults, backend, base_kwargs)

    def _plan_estimates(self, freq: int, estimate: Estimate | None) -> None:
        _check_freq(freq)
        if not isinstance(estimate, (Estimate, type(None))):
            raise TypeError(f"estimate={estimate!r} must be a fastsam.methods.eigen.Estimate, or None")
        self.estimate = estimate or Estimate()
        self.last_estimate: Eigenpairs | None = None
        self._no_second_derivative = self._warned_of_sign = False

    def coefficients(self, dd, dv, vv, group):
        norm = dd**0.5 + NORM_EPSILON
        sign = (dv > 0) * 1.0 - (dv < 0) * 1.0
        c_v = group["rho"] * group["alpha"] * sign
        return group["rho"] / norm - c_v * (dv / norm) / norm, c_v

    coefficients.closed_form = True  # what every compiled kernel can compute by itself

    def check_group(self, group):
        at_least(0, "rho", group["rho"])
        at_least(0, "alpha", group["alpha"])
        flag("adaptive", group["adaptive"])

    def state_dict(self):
        """:meth:`SAM.state_dict`; before the first estimate v is zero there, as every checkpoint has the same keys.

        Such zeros take no memory until they are loaded, and a step with them is SAM's.
        """
        found = super().state_dict()
        order = [i for group in found["param_groups"] for i in group["params"]]
        for i, (p, perturb) in zip(order, self._params(), strict=True):
            entry = found["state"].get(i, {})
            if perturb and p.requires_grad and "eigenvector" not in entry:
                found["state"][i] = {**entry, "eigenvector": _nothing_like(p)}
        return found

    def eigenvector_due(self, step: int | None = None) -> bool:
        """Whether ``freq`` asks for a new estimate before this step: every ``freq`` steps, not at step 0.

        ``step`` defaults to the number of steps taken. The authors count from 0 in each epoch: pass that number
        to do as they do.
        """
        group = self.param_groups[0]
        _check_freq(group["freq"])
        step = group["steps"] if step is None else step
        return step > 0 and step % group["freq"] == 0

    def step(self, closure=None, estimate_closure: Callable | None = None, **options):
        """:meth:`SAM.step`, which first refreshes the eigenvector when that is due.

        Its products are those of what ``estimate_closure``, which may take a smaller batch, or else ``closure`` calls
        ``backward()`` on: exact ones from a single evaluation, finite differences from two for each product (see
        :class:`Estimate`). An estimate that meets a NaN or an infinity is a warning, and the vector stays.
        """
        if self._is_to_refresh(closure) and not self._has_gradients():
            self._refresh(estimate_closure or closure, options)
        return super().step(closure, **options)

    def finish(self, closure, estimate_closure: Callable | None = None, **options):
        """:meth:`SAM.finish`, which first refreshes the eigenvector when that is due, as :meth:`step` does."""
        if self._is_to_refresh(closure):
            self._refresh(estimate_closure or closure, options)
        return super().finish(closure, **options)

    def accumulate(self, closure, estimate_closure: Callable | None = None, **options):
        """:meth:`SAM.accumulate`, which first refreshes the eigenvector when that is due, as :meth:`step` does.

        That is before the first micro-batch of a step, from its closure.
        """
        if self._is_to_refresh(closure) and not self._has_gradients():
            self._refresh(estimate_closure or closure, options)
        return super().accumulate(closure, **options)

    def update_eigenvector(self, loss_fn, model: torch.nn.Module | None = None) -> None:
        """Estimates v, by default with five power steps of exact Hessian-vector products from the previous v.

        ``loss_fn()`` does a forward pass and returns the scalar loss with its graph, without backward. ``model``, if
        given, is in eval mode meanwhile, as the authors have it. The first estimate starts from a normal random
        vector. Weights, gradients, buffers, training flags and random generators are afterwards what they were.
        A loss without a second derivative has its products formed by finite differences, with a warning.

        Raises ``RuntimeError`` between the passes and for a loss without a graph, ``TypeError`` or ``ValueError`` for
        a loss that is no scalar tensor, ``FloatingPointError`` for a product that is not finite; v is then what it was.
        """
        if self._perturbed:
            raise RuntimeError("update_eigenvector() between first_step() and second_step(): call it before the step")
        eval_mode = self.estimate.eval_mode
        self._estimate(self._hessian(loss_fn, model, model is not None if eval_mode is None else eval_mode))

    def _step_taken(self) -> None:
        super()._step_taken()
        self.param_groups[0]["steps"] += 1

    def _is_to_refresh(self, closure) -> bool:
        """Whether an estimate is due; not where the step is about to be refused."""
        return closure is not None and not self._perturbed and self.eigenvector_due()

    def _refresh(self, closure, options: dict) -> None:
        scaler, model = options.get("grad_scaler"), options.get("model")
        scale = 1.0 if scaler is None else scaler.get_scale()
        eval_mode = bool(self.estimate.eval_mode)
        try:
            self._estimate(self._hessian(closure, model, eval_mode, closure=True, loss_scale=scale))
        except FloatingPointError as error:
            warnings.warn(f"the eigenvector was not refreshed: {error}", RuntimeWarning, stacklevel=3)

    def _hessian(self, loss_fn, model, eval_mode: bool, **options) -> Hessian:
        method = self.estimate.method
        if method == "auto" and self._no_second_derivative:
            method = "finite-difference"  # as it was said
        params = [p for p, perturb in self._params() if perturb and p.requires_grad]
        self._spaces.refresh(self.param_groups, self.state)
        spaces = [space for space in self._spaces if space.perturbed]
        return Hessian(loss_fn, params, method=method, model=model, eval_mode=eval_mode, spaces=spaces, **options)

    def _estimate(self, hessian: Hessian) -> None:
        chosen = self.estimate
        with hessian:
            # The start vector has no name here: its memory is free once a solver has moved on.
            if chosen.solver == "power":
                pairs = power_iteration(
                    hessian.product, self._start(hessian), chosen.products, chosen.tolerance, hessian.inner
                )
            else:
                pairs = lanczos(
                    hessian.product,
                    self._start(hessian),
                    products=chosen.products,
                    tolerance=chosen.tolerance,
                    inner=hessian.inner,
                )
            v = pairs.vectors[0]
            if pairs.eigenvalues[0] == 0:  # a zero Hessian has no direction to offer: the step is SAM's
                v = torch.zeros_like(v)
            estimate = dict(zip(hessian.params, hessian.tensors(v), strict=True))
        self._no_second_derivative |= chosen.method == "auto" and hessian.method == "finite-difference"
        self.last_estimate = dataclasses.replace(pairs, vectors=None)
        self.eigenvector = [estimate[p] if p in estimate else _nothing_like(p) for p, _ in self._params()]
        if pairs.eigenvalues[0] < 0 and chosen.solver == "power" and not self._warned_of_sign:
            self._warned_of_sign = True
            warnings.warn(
                f"power iteration found the negative eigenvalue {float(pairs.eigenvalues[0]):.3g}, the largest in "
                'magnitude; for the largest one say estimate=Estimate(solver="lanczos", products=10)',
                RuntimeWarning,
                stacklevel=4,
            )

    def _start(self, hessian: Hessian) -> Tensor:
        previous = self.eigenvector if self.estimate.warm_start else None
        if previous is not None:
            values = dict(zip((p for p, _ in self._params()), previous, strict=True))
            start = hessian.flat([values[p] for p in hessian.params])
            if hessian.inner.dot(start, start) > 0:
                return start
        if self.estimate.solver == "lanczos":
            return hessian.start()
        if processes() > 1:
            return hessian.random()
        return hessian.flat([torch.randn_like(p) for p in hessian.params])

    @property
    def eigenvector(self) -> list[torch.Tensor] | None:
        """v, shaped like the parameters in the order of the groups, or None before the first estimate.

        Assign a list of such tensors to set it, or None to forget it. Parameters of a ``perturb=False`` group and
        frozen ones have zeros, which take no memory. Raises ``ValueError`` for a wrong number or shapes, or values that
        are not finite, ``TypeError`` for anything but real tensors.
        """
        if not any("eigenvector" in self.state[p] for p, _ in self._params() if p in self.state):
            return None
        return [
            self.state[p]["eigenvector"] if p in self.state and "eigenvector" in self.state[p] else _nothing_like(p)
            for p, _ in self._params()
        ]

    @eigenvector.setter
    @torch.no_grad()
    def eigenvector(self, v) -> None:
        self._forget_empty_state()
        params = self._params()
        if v is None:
            for p, _ in params:
                if p in self.state:
                    self.state[p].pop("eigenvector", None)
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
                self.state[p]["eigenvector"] = e.detach().to(device=p.device, dtype=p.dtype, copy=True)

    def _params(self) -> list[tuple[torch.Tensor, bool]]:
        return [(p, group["perturb"]) for group in self.param_groups for p in group["params"]]


def _nothing_like(p: Tensor) -> Tensor:
    """Zeros of p's shape and placement in the memory of one."""
    return placed_like(p, local(p).new_zeros(()).expand_as(local(p)))


def _check_freq(freq) -> None:
    if not isinstance(freq, int) or freq < 1:
        raise ValueError(f"freq={freq!r} must be a whole number of steps, at least 1")
