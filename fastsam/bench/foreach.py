"""SAM, F-SAM and Eigen-SAM on ``torch._foreach_*`` by hand."""

from __future__ import annotations

import torch

from fastsam.bench.settings import ALPHA, BASES, LMBDA, RHO, SIGMA


class Foreach:
    """As few foreach passes as the method allows.

    On the CPU the scale is read back with ``.item()``: that costs nothing and saves a pass over memory. On a GPU it
    would make the host wait in the middle of every step, so there the gradients are scaled in place by a tensor.
    F-SAM overwrites the gradient with d = g - σm, as the published code does, and then uses
    λm + (1 - λ)g = (λ + (1 - λ)σ) m + (1 - λ) d.
    """

    def __init__(self, method: str, base: str, parameters: list[torch.Tensor], eigenvector, **flags: bool) -> None:
        base_class, options = BASES[base]
        self.base_optimizer = base_class(parameters, **options, **flags)
        self.parameters = parameters
        self.backup = [torch.empty_like(p) for p in parameters]
        self.eigenvector = eigenvector
        self.momentum: list[torch.Tensor] | None = None
        self.waits = parameters[0].device.type == "cpu"
        self.climb = {"sam": self._climb_sam, "fsam": self._climb_fsam, "eigensam": self._climb_eigensam}[method]

    @torch.no_grad()
    def first_step(self) -> None:
        self.climb([p.grad for p in self.parameters])

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self.parameters, self.backup)
        self.base_optimizer.step()

    def _climb_sam(self, gradients: list[torch.Tensor]) -> None:
        scale = RHO / (_norm(gradients) + 1e-12)
        torch._foreach_copy_(self.backup, self.parameters)
        self._add(gradients, scale)

    def _climb_fsam(self, gradients: list[torch.Tensor]) -> None:
        if self.momentum is None:
            self.momentum = [g.clone() for g in gradients]
            return self._climb_sam(gradients)
        torch._foreach_sub_(gradients, self.momentum, alpha=SIGMA)
        decay = LMBDA + (1 - LMBDA) * SIGMA
        if decay != 1.0:
            torch._foreach_mul_(self.momentum, decay)
        torch._foreach_add_(self.momentum, gradients, alpha=1 - LMBDA)
        self._climb_sam(gradients)

    def _climb_eigensam(self, gradients: list[torch.Tensor]) -> None:
        norm = _norm(gradients) + 1e-12
        pairs = zip(gradients, self.eigenvector, strict=True)
        dot = torch.stack([torch.dot(g.reshape(-1), v.reshape(-1)) for g, v in pairs]).sum()
        torch._foreach_copy_(self.backup, self.parameters)
        self._add(gradients, RHO * (1 / norm - ALPHA * dot.sign() * dot / norm**2))
        self._add(self.eigenvector, RHO * ALPHA * dot.sign(), keep=True)

    def _add(self, tensors: list[torch.Tensor], scale: torch.Tensor, keep: bool = False) -> None:
        """Adds scale times tensors to the parameters; on a GPU that overwrites tensors unless they are to be kept."""
        if self.waits:
            torch._foreach_add_(self.parameters, tensors, alpha=scale.item())
        elif keep:
            torch._foreach_add_(self.parameters, torch._foreach_mul(tensors, scale))
        else:
            torch._foreach_mul_(tensors, scale)
            torch._foreach_add_(self.parameters, tensors)


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
