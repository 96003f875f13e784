r"""Eigen-SAM: SAM pulled towards the top Hessian eigenvector.

SAM's theory assumes that the perturbation aligns with the top eigenvector v of the Hessian; in practice it hardly
does. Eigen-SAM adds v's part orthogonal to the gradient:

    g^ = g / (||g|| + 1e-12)
    e  = rho (g^ + alpha sign<g,v> (v - <g^,v> g^))

which is the combination c_d g + c_v v with c_d = rho (1/||g|| - alpha s <g,v>/||g||^2) and c_v = rho alpha s,
s = sign<g,v>. It is not normalised again. With ``adaptive`` the finished direction is multiplied by w^2 and norms
stay plain. v comes from power steps of Hessian-vector products every ``freq`` steps; before the first estimate
the step is SAM's. All this as in the authors' code; source: Luo, Zhou, Cheng, Song, "Explicit Eigenvalue
Regularization Improves Sharpness-Aware Minimization", NeurIPS 2024.
"""

from __future__ import annotations

import contextlib

import torch

from fastsam.checks import at_least
from fastsam.optimizer import NORM_EPSILON, SharpnessAware

_POWER_STEPS = 5


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
        base_kwargs: arguments of the base optimizer.

    Errors as for :class:`~fastsam.SAM`.

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
        **base_kwargs,
    ):
        if not isinstance(freq, int) or freq < 1:
            raise ValueError(f"freq={freq!r} must be a whole number of steps, at least 1")
        defaults = dict(rho=rho, alpha=alpha, freq=freq, adaptive=adaptive, steps=0)
        super().__init__(params, base_optimizer, defaults, backend, base_kwargs)

    def coefficients(self, dd, dv, vv, group):
        norm = dd**0.5 + NORM_EPSILON
        sign = (dv > 0) - (dv < 0)
        c_v = group["rho"] * group["alpha"] * sign
        return group["rho"] / norm - c_v * (dv / norm) / norm, c_v

    def check_group(self, group):
        at_least(0, "rho", group["rho"])
        at_least(0, "alpha", group["alpha"])

    def second_step(self, zero_grad=False, **options):
        super().second_step(zero_grad, **options)
        self.param_groups[0]["steps"] += 1

    def eigenvector_due(self, step: int | None = None) -> bool:
        """Whether ``freq`` asks for a new estimate before this step: every ``freq`` steps, not at step 0.

        ``step`` defaults to the number of steps taken. The authors count from 0 in each epoch: pass that number
        to do as they do.
        """
        group = self.param_groups[0]
        step = group["steps"] if step is None else step
        return step > 0 and step % group["freq"] == 0

    def update_eigenvector(self, loss_fn, model: torch.nn.Module | None = None) -> None:
        """Estimates v by five power steps, Hessian-vector products by double backward, from the previous v.

        ``loss_fn()`` does a forward pass and returns the scalar loss with its graph, without backward; it is
        called once. ``model``, if given, is in eval mode meanwhile, as the authors have it. Gradients in ``.grad``
        and weights are not touched. The first estimate starts from a normal random vector.

        Raises ``RuntimeError`` between the passes and for a loss without a second derivative, ``TypeError`` or
        ``ValueError`` for a loss that is no scalar tensor, ``FloatingPointError`` for a product that is not finite; v is
        then what it was.
        """
        if self._perturbed:
            raise RuntimeError("update_eigenvector() between first_step() and second_step(): call it before the step")
        params = [p for p, perturb in self._params() if perturb and p.requires_grad]
        previous = self.eigenvector
        if previous is None:
            v = [torch.randn_like(p) for p in params]
        else:
            v = [e for e, (p, perturb) in zip(previous, self._params(), strict=True) if perturb and p.requires_grad]
        with _eval_mode(model), torch.enable_grad():
            loss = loss_fn()
            if not isinstance(loss, torch.Tensor):
                raise TypeError(f"loss_fn returned {type(loss).__name__}: it must return the loss as a tensor")
            if loss.numel() != 1:
                raise ValueError(f"loss_fn returned a tensor of shape {tuple(loss.shape)}: it must be a scalar")
            if loss.grad_fn is None:
                raise RuntimeError(
                    "loss_fn returned a loss without a graph: compute it under grad mode, and without calling backward()"
                )
            gradients = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
            used = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
            for _ in range(_POWER_STEPS if used else 0):
                product = torch.autograd.grad(
                    [gradients[i] for i in used],
                    params,
                    [v[i] for i in used],
                    retain_graph=True,
                    allow_unused=True,
                )
                v = _normalised([torch.zeros_like(p) if h is None else h for h, p in zip(product, params, strict=True)])
        if not used:
            v = [torch.zeros_like(p) for p in params]
        if not all(bool(e.isfinite().all()) for e in v):
            raise FloatingPointError(
                "a Hessian-vector product is not finite; the eigenvector is left as it was: check the batch and the loss"
            )
        estimate = iter(v)
        self.eigenvector = [
            next(estimate) if perturb and p.requires_grad else torch.zeros_like(p) for p, perturb in self._params()
        ]

    @property
    def eigenvector(self) -> list[torch.Tensor] | None:
        """v, shaped like the parameters in the order of the groups, or None before the first estimate.

        Assign a list of such tensors to set it, or None to forget it. Parameters of a ``perturb=False`` group
        have zeros. Raises ``ValueError`` for a wrong number or shapes, or values that are not finite.
        """
        if not any("eigenvector" in self.state[p] for p, _ in self._params() if p in self.state):
            return None
        return [
            self.state[p]["eigenvector"] if p in self.state and "eigenvector" in self.state[p] else torch.zeros_like(p)
            for p, _ in self._params()
        ]

    @eigenvector.setter
    @torch.no_grad()
    def eigenvector(self, v) -> None:
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
            if e.shape != p.shape:
                raise ValueError(f"eigenvector[{i}] has shape {tuple(e.shape)}, its parameter {tuple(p.shape)}")
            if not bool(e.isfinite().all()):
                raise ValueError(f"eigenvector[{i}] has values that are not finite")
        for e, (p, perturb) in zip(v, params, strict=True):
            if perturb:
                self.state[p]["eigenvector"] = e.detach().to(device=p.device, dtype=p.dtype, copy=True)

    def _params(self) -> list[tuple[torch.Tensor, bool]]:
        return [(p, group["perturb"]) for group in self.param_groups for p in group["params"]]


def _normalised(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    norm = (sum((t.double() if t.dtype == torch.float64 else t.float()).square().sum() for t in tensors) + 1e-12) ** 0.5
    return [(t / norm).to(t.dtype) for t in tensors]


@contextlib.contextmanager
def _eval_mode(model: torch.nn.Module | None):
    """Every module in eval mode, and afterwards in the mode it had."""
    training = [] if model is None else [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
