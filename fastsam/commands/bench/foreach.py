"""SAM, its family and Eigen-SAM on ``torch._foreach_*`` by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from fastsam.commands.bench.settings import ALPHA, BASES, FAMILY, LMBDA, RHO, SIGMA

Tensors = list[torch.Tensor]


class Foreach:
    """As few foreach passes as the method allows.

    On the CPU the scale is read back with ``.item()``: that costs nothing and saves a pass over memory. On a GPU it
    would make the host wait in the middle of every step, so there the gradients are scaled in place by a tensor.
    F-SAM overwrites the gradient with d = g - σm, as the published code does, and then uses
    λm + (1 - λ)g = (λ + (1 - λ)σ) m + (1 - λ) d. A first gradient that is kept stays where it is, as its tensors are
    new in each pass, and the second one is overwritten with what the base optimizer takes.
    """

    def __init__(self, method: str, base: str, parameters: Tensors, eigenvector, **flags: Any) -> None:
        base_class, options = BASES[base]
        self.base_optimizer = base_class(parameters, **options, **flags)
        self.parameters = parameters
        self.backup = [torch.empty_like(p) for p in parameters]
        self.eigenvector = eigenvector
        self.momentum: Tensors | None = None
        self.first: Tensors | None = None  # the first gradient, between the passes
        self.first_norm: torch.Tensor | None = None
        self.sharpness: Tensors = []  # LookSAM's g_v
        self.waits = parameters[0].device.type == "cpu"
        self.hyper = FAMILY.get(method, {})
        climbs = {
            "fsam": self._climb_fsam,
            "eigensam": self._climb_eigensam,
            "momentumsam": self._climb_momentum,
            "stablesam": self._climb_stable,
            "vasso": self._climb_vasso,
        }
        self.climb = climbs.get(method, self._climb_keeping if method in _SECOND_SIDES else self._climb_sam)
        self.mix = _SECOND_SIDES.get(method)

    @torch.no_grad()
    def first_step(self) -> None:
        self.climb(self._gradients())

    @torch.no_grad()
    def second_step(self) -> None:
        climbed = self.first is not None or self.mix is not _looksam
        if climbed:
            torch._foreach_copy_(self.parameters, self.backup)
        if self.mix is None:
            self.base_optimizer.step()
        else:
            self.mix(self, self._gradients())
        self.first = None

    def _gradients(self) -> Tensors:
        return cast(Tensors, [p.grad for p in self.parameters])

    def _climb_sam(self, gradients: Tensors) -> None:
        scale = RHO / (_norm(gradients) + 1e-12)
        torch._foreach_copy_(self.backup, self.parameters)
        self._add(gradients, scale)

    def _climb_fsam(self, gradients: Tensors) -> None:
        if self.momentum is None:
            self.momentum = [g.clone() for g in gradients]
            return self._climb_sam(gradients)
        torch._foreach_sub_(gradients, self.momentum, alpha=SIGMA)
        decay = LMBDA + (1 - LMBDA) * SIGMA
        if decay != 1.0:
            torch._foreach_mul_(self.momentum, decay)
        torch._foreach_add_(self.momentum, gradients, alpha=1 - LMBDA)
        self._climb_sam(gradients)

    def _climb_eigensam(self, gradients: Tensors) -> None:
        norm = _norm(gradients) + 1e-12
        dot = _dot(gradients, self.eigenvector)
        torch._foreach_copy_(self.backup, self.parameters)
        self._add(gradients, RHO * (1 / norm - ALPHA * dot.sign() * dot / norm**2))
        self._add(self.eigenvector, RHO * ALPHA * dot.sign(), keep=True)

    def _climb_momentum(self, gradients: Tensors) -> None:
        """Along what the base optimizer has, whatever the gradients; none before its first step."""
        torch._foreach_copy_(self.backup, self.parameters)
        states = [self.base_optimizer.state[p] for p in self.parameters]
        if states[0]:
            name = "momentum_buffer" if "momentum_buffer" in states[0] else "exp_avg"
            momentum = [state[name] for state in states]
            self._add(momentum, -self.hyper["rho"] / (_norm(momentum) + 1e-12), keep=True)

    def _climb_vasso(self, gradients: Tensors) -> None:
        if self.momentum is None:
            self.momentum = [g.clone() for g in gradients]
        else:
            torch._foreach_lerp_(self.momentum, gradients, self.hyper["theta"])
        torch._foreach_copy_(self.backup, self.parameters)
        self._add(self.momentum, RHO / (_norm(self.momentum) + 1e-12), keep=True)

    def _climb_keeping(self, gradients: Tensors) -> None:
        self.first, self.first_norm = gradients, _norm(gradients)
        torch._foreach_copy_(self.backup, self.parameters)
        self._add(gradients, RHO / (self.first_norm + 1e-12), keep=True)

    def _climb_stable(self, gradients: Tensors) -> None:
        self.first_norm = _norm(gradients)
        torch._foreach_copy_(self.backup, self.parameters)
        self._add(gradients, RHO / (self.first_norm + 1e-12))

    def _add(self, tensors: Tensors, scale: torch.Tensor, keep: bool = False) -> None:
        """Adds scale times tensors to the parameters; on a GPU that overwrites tensors unless they are to be kept."""
        self.add_to(self.parameters, tensors, scale, keep)

    def add_to(self, targets: Tensors, tensors: Tensors, scale: torch.Tensor, keep: bool = True) -> None:
        if self.waits:
            torch._foreach_add_(targets, tensors, alpha=scale.item())
        elif keep:
            torch._foreach_add_(targets, torch._foreach_mul(tensors, scale))
        else:
            torch._foreach_mul_(tensors, scale)
            torch._foreach_add_(targets, tensors)


# ---- second sides: the base optimizer's step, and before it what makes h of the second gradient ---------------------


def _gsam(optimizer: Foreach, gradients: Tensors) -> None:
    assert optimizer.first is not None
    alpha = optimizer.hyper["alpha"]
    along = _dot(optimizer.first, gradients) / _norm(gradients) ** 2
    torch._foreach_mul_(gradients, 1 + alpha * along)
    torch._foreach_add_(gradients, optimizer.first, alpha=-alpha)
    optimizer.base_optimizer.step()


def _wsam(optimizer: Foreach, gradients: Tensors) -> None:
    """The base optimizer's step with the first gradient, then one along the difference."""
    assert optimizer.first is not None
    gamma, lr = optimizer.hyper["gamma"], optimizer.base_optimizer.param_groups[0]["lr"]
    torch._foreach_sub_(gradients, optimizer.first)
    for p, g in zip(optimizer.parameters, optimizer.first, strict=True):
        p.grad = g
    optimizer.base_optimizer.step()
    torch._foreach_add_(optimizer.parameters, gradients, alpha=-lr * gamma / (1 - gamma))


def _stable_sam(optimizer: Foreach, gradients: Tensors) -> None:
    assert optimizer.first_norm is not None
    torch._foreach_mul_(gradients, optimizer.first_norm / (_norm(gradients) + 1e-12))
    optimizer.base_optimizer.step()


def _looksam(optimizer: Foreach, gradients: Tensors) -> None:
    if optimizer.first is not None:
        assert optimizer.first_norm is not None
        torch._foreach_mul_(optimizer.first, -_dot(optimizer.first, gradients) / optimizer.first_norm**2)
        torch._foreach_add_(optimizer.first, gradients)
        optimizer.sharpness = optimizer.first
    else:
        scale = optimizer.hyper["alpha"] * _norm(gradients) / (_norm(optimizer.sharpness) + 1e-12)
        optimizer.add_to(gradients, optimizer.sharpness, scale)
    optimizer.base_optimizer.step()


_SECOND_SIDES: dict[str, Callable[[Foreach, Tensors], None]] = {
    "gsam": _gsam,
    "wsam": _wsam,
    "stablesam": _stable_sam,
    "looksam": _looksam,
}


def _norm(tensors: Tensors) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


def _dot(first: Tensors, second: Tensors) -> torch.Tensor:
    pairs = zip(first, second, strict=True)
    return torch.stack([torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in pairs]).sum()
