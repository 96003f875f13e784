"""Vectors over the weights: one flat tensor for a solver, a tensor for each parameter for everybody else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastsam.curvature.solvers import dot


class Vectors:
    """The vectors (n,) over those of ``params`` that require gradients, one after the other in their order.

    Each parameter's part has its strides. The dtype is float64 if any parameter's is, else float32; the device is
    the first one's. Raises ``ValueError`` if no parameter requires gradients.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = list(params)
        self.trainable = [p for p in dict.fromkeys(self.params) if p.requires_grad]
        if not self.trainable:
            raise ValueError("none of the parameters requires gradients: there is no Hessian")
        self.device = self.trainable[0].device
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for p in self.trainable) else torch.float32
        self.offsets: dict[Tensor, int] = {}
        self.numel = 0
        for p in self.trainable:
            self.offsets[p] = self.numel
            self.numel += p.numel()

    def zeros(self) -> Tensor:
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)

    def flat(self, tensors: Iterable[Tensor]) -> Tensor:
        """One vector (n,) from a tensor for each parameter; raises ``ValueError`` for wrong numbers or shapes."""
        tensors = self.matched(tensors)
        flat = torch.empty(self.numel, dtype=self.dtype, device=self.device)
        for t, p in zip(tensors, self.params, strict=True):
            if p.requires_grad:
                self.part(flat, p).copy_(t.detach())
        return flat

    def matched(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        tensors = list(tensors)
        if len(tensors) != len(self.params):
            raise ValueError(f"the vector has {len(tensors)} tensors for {len(self.params)} parameters")
        for i, (t, p) in enumerate(zip(tensors, self.params, strict=True)):
            if t.shape != p.shape:
                raise ValueError(f"vector[{i}] has shape {tuple(t.shape)}, its parameter {tuple(p.shape)}")
        return tensors

    def tensors(self, flat: Tensor) -> list[Tensor]:
        """A tensor of each parameter's shape, a view into ``flat``; zeros for those that are frozen."""
        return [self.part(flat, p) if p.requires_grad else torch.zeros_like(p, dtype=self.dtype) for p in self.params]

    def random(self, generator: torch.Generator | None = None) -> Tensor:
        """A standard normal vector (n,). It is drawn on the CPU, so a seed means the same on every device."""
        return torch.randn(self.numel, dtype=self.dtype, generator=generator).to(self.device)

    def laid_out(self, tensors: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """The tensors by their parameters, with their strides: without a copy where they have them already."""
        found = {}
        for t, p in zip(self.matched(tensors), self.params, strict=True):
            if p.requires_grad:
                fits = t.stride() == p.stride() and t.dtype in (p.dtype, self.dtype) and t.device == p.device
                found[p] = t.detach() if fits else torch.empty_like(p, dtype=self.dtype).copy_(t)
        return found

    def part(self, v: Tensor | dict[Tensor, Tensor], p: Tensor) -> Tensor:
        """The part of p, of its shape: a view of a flat vector, or an entry of what ``laid_out`` gave."""
        if not isinstance(v, Tensor):
            return v[p]
        offset = self.offsets[p]
        return v[offset : offset + p.numel()].as_strided(p.shape, p.stride())

    def dot(self, a: Tensor | dict[Tensor, Tensor], b: Tensor | dict[Tensor, Tensor]) -> float:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return dot(a, b)
        pairs = ((self.part(a, p), self.part(b, p)) for p in self.trainable)
        return sum(dot(*(x.as_strided((x.numel(),), (1,)).to(self.device, self.dtype) for x in xy)) for xy in pairs)
