"""The gradients that every implementation is given, pass by pass."""

from __future__ import annotations

import math

import torch

from fastsam.commands.bench.parameter_sets import ParameterSet


class GradientSequence:
    """Gradients of pass t = 0, 1, 2, ...: a + cos(1.7 t) b with fixed random a and b.

    They change from pass to pass: F-SAM's difference of a gradient and its average would otherwise be zero.
    """

    def __init__(
        self, shapes: ParameterSet, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self._a, self._b = (shapes.random(seed, scale=1e-3, device=device, dtype=dtype) for seed in (1, 2))
        self._out = [torch.empty_like(a) for a in self._a]
        self._pass = 0

    def restart(self) -> None:
        self._pass = 0

    def next(self) -> list[torch.Tensor]:
        """The next pass's gradients, in tensors that the next call overwrites."""
        factor = math.cos(1.7 * self._pass)
        self._pass += 1
        for a, b, out in zip(self._a, self._b, self._out, strict=True):
            torch.add(a, b, alpha=factor, out=out)
        return self._out

    def fixed(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Gradients of a first and of a second pass that stay where they are, to be handed over again and again."""
        return self._a, self._b
