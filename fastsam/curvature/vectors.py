"""Vectors over the weights: one flat tensor for a solver, a tensor for each parameter for everybody else.

Of a parameter that is spread over processes (a DTensor) the flat tensor holds this process's part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fastsam.curvature.inner import counted_first
from fastsam.distributed.ranks import processes
from fastsam.distributed.shards import distributed_like, local, placed_like


class Vectors:
    """The vectors (n,) over those of ``params`` that require gradients, one after the other, with their inner product.

    Each parameter's part has its strides. The dtype is float64 if any parameter's is, else float32; the device is
    the first one's. Raises ``ValueError`` if no parameter requires gradients.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = list(params)
        trainable = [p for p in dict.fromkeys(self.params) if p.requires_grad]
        if not trainable:
            raise ValueError("none of the parameters requires gradients: there is no Hessian")
        self.trainable, self.inner = counted_first(trainable)
        self.device = self.trainable[0].device
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for p in self.trainable) else torch.float32
        self.offsets: dict[Tensor, int] = {}
        self.numel = 0
        for p in self.trainable:
            self.offsets[p] = self.numel
            self.numel += local(p).numel()
        self._common: torch.Generator | None = None

    def zeros(self) -> Tensor:
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)

    def flat(self, tensors: Iterable[Tensor]) -> Tensor:
        """One vector (n,) from a tensor for each parameter; raises ``ValueError`` for wrong numbers or shapes."""
        tensors = self.matched(tensors)
        flat = torch.empty(self.numel, dtype=self.dtype, device=self.device)
        for t, p in zip(tensors, self.params, strict=True):
            if p.requires_grad:
                self.part(flat, p).copy_(local(distributed_like(p, t.detach())))
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
        return [
            placed_like(p, self.part(flat, p)) if p.requires_grad else torch.zeros_like(p, dtype=self.dtype)
            for p in self.params
        ]

    def random(self, generator: torch.Generator | None = None) -> Tensor:
        """A standard normal vector (n,). It is drawn on the CPU, so a seed means the same on every device.

        Several processes draw the same whole vector, from a generator of their own if none is given.
        """
        if generator is None and processes() > 1:
            generator = self._common = self._common or torch.Generator().manual_seed(0)
        if not self.inner.groups:
            return torch.randn(self.numel, dtype=self.dtype, generator=generator).to(self.device)
        flat = self.zeros()
        for p in self.params:
            if p.requires_grad:
                whole = torch.randn(p.shape, dtype=self.dtype, generator=generator)
                self.part(flat, p).copy_(local(distributed_like(p, whole)))
        return flat

    def laid_out(self, tensors: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """The tensors by their parameters, with their strides: without a copy where they have them already."""
        found = {}
        for t, p in zip(self.matched(tensors), self.params, strict=True):
            if p.requires_grad:
                t, w = local(distributed_like(p, t.detach())), local(p.detach())
                fits = t.stride() == w.stride() and t.dtype in (w.dtype, self.dtype) and t.device == w.device
                found[p] = t if fits else torch.empty_like(w, dtype=self.dtype).copy_(t)
        return found

    def part(self, v: Tensor | dict[Tensor, Tensor], p: Tensor) -> Tensor:
        """This process's part of p, in its shape: a view of a flat vector, or an entry of what ``laid_out`` gave."""
        if not isinstance(v, Tensor):
            return v[p]
        offset, w = self.offsets[p], local(p)
        return v[offset : offset + w.numel()].as_strided(w.shape, w.stride())

    def dot(self, a: Tensor | dict[Tensor, Tensor], b: Tensor | dict[Tensor, Tensor]) -> float:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return self.inner.dot(a, b)
        if self.inner.groups:  # one sum over all the processes for each inner product, not for each parameter
            return self.inner.dot(*(x if isinstance(x, Tensor) else self._joined(x) for x in (a, b)))
        pairs = ((self.part(a, p), self.part(b, p)) for p in self.trainable)
        flat = ((x.as_strided((x.numel(),), (1,)).to(self.device, self.dtype) for x in xy) for xy in pairs)
        return sum(self.inner.dot(*xy) for xy in flat)

    def norm(self, v: Tensor | dict[Tensor, Tensor]) -> float:
        return math.sqrt(self.dot(v, v))

    def weight_norm(self) -> float:
        """||w||, without a copy of the weights where one process holds them."""
        with torch.no_grad():
            return self.norm({p: local(p.detach()) for p in self.trainable})

    def _joined(self, v: dict[Tensor, Tensor]) -> Tensor:
        flat = self.zeros()
        for p in self.trainable:
            self.part(flat, p).copy_(v[p])
        return flat
