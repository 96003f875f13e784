"""The loop over tensors, with the operations and the allocations of the published code.

SAM follows davda54/sam, F-SAM nblt/F-SAM, Eigen-SAM RitianLuo/EigenSAM.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from fastsam.commands.bench.settings import ALPHA, BASES, LMBDA, RHO, SIGMA


class PerTensorSAM:
    """SAM with one temporary for each operation and the weights re-bound to their copy afterwards."""

    def __init__(self, parameters: list[torch.Tensor], base: str) -> None:
        base_class, options = BASES[base]
        self.base_optimizer = base_class(parameters, **options)
        self.groups = self.base_optimizer.param_groups
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = defaultdict(dict)
        for group in self.groups:
            group.update(rho=RHO, adaptive=False)

    def with_gradient(self, group):
        return (p for p in group["params"] if p.grad is not None)

    @torch.no_grad()
    def first_step(self) -> None:
        norm = self.gradient_norm()
        self.climb(lambda group: group["rho"] / (norm + 1e-12))

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.groups:
            for p in self.with_gradient(group):
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()

    def gradient_norm(self) -> torch.Tensor:
        device = self.groups[0]["params"][0].device
        norms = [
            ((torch.abs(p) if group["adaptive"] else 1.0) * p.grad).norm(p=2).to(device)
            for group in self.groups
            for p in self.with_gradient(group)
        ]
        return torch.norm(torch.stack(norms), p=2)

    def climb(self, scale_of: Callable[[dict], torch.Tensor]) -> None:
        for group in self.groups:
            scale = scale_of(group)
            for p in self.with_gradient(group):
                self.state[p]["old_p"] = p.data.clone()
                perturbation = (torch.pow(p, 2) if group["adaptive"] else 1.0) * p.grad * scale.to(p)
                p.add_(perturbation)


class PerTensorFriendlySAM(PerTensorSAM):
    """The EMA is rebuilt from temporaries, and its old value is subtracted from the gradient in place."""

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.groups:
            for p in self.with_gradient(group):
                raw = p.grad.clone()
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = raw
                    continue
                p.grad -= state["momentum"] * SIGMA
                state["momentum"] = state["momentum"] * LMBDA + raw * (1 - LMBDA)
        super().first_step()


class PerTensorEigenSAM(PerTensorSAM):
    """Gradient and eigenvector are concatenated, combined, and copied back; then SAM without normalising,
    which still sums the norm it does not use."""

    def __init__(self, parameters: list[torch.Tensor], base: str, eigenvector: list[torch.Tensor]) -> None:
        super().__init__(parameters, base)
        self.eigenvector = eigenvector

    @torch.no_grad()
    def first_step(self) -> None:
        self.project_gradient()
        self.gradient_norm()
        self.climb(lambda group: torch.tensor(group["rho"]))

    def project_gradient(self) -> None:
        pairs = [(p, p.grad.reshape(-1)) for group in self.groups for p in self.with_gradient(group)]
        gradient = torch.cat([flat for _, flat in pairs], dim=0)
        vector = torch.cat([v.reshape(-1) for v in self.eigenvector], dim=0)
        sign = torch.sign(gradient.dot(vector))
        gradient /= gradient.norm() + 1e-12
        orthogonal = vector - gradient.dot(vector) * gradient
        gradient += ALPHA * sign * orthogonal
        start = 0
        for p, flat in pairs:
            p.grad.data.copy_(gradient[start : start + flat.numel()].view_as(p.grad))
            start += flat.numel()
