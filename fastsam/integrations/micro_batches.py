"""Both passes of a step over every micro-batch of a virtual batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from torch import nn

from fastsam.model_state import TwoPasses


class MicroBatches:
    """Evaluates each micro-batch as it comes, and all of them again for the second pass.

    With a ``model`` the second pass leaves its buffers alone, and with ``shared_masks`` each micro-batch draws the
    random numbers it drew before (see ``fastsam.model_state``).
    """

    def __init__(self, model: nn.Module | None = None, shared_masks: bool = True) -> None:
        self.model = model
        self.shared_masks = shared_masks
        self._seen: list[tuple[Callable, TwoPasses | None]] = []

    def __len__(self) -> int:
        return len(self._seen)

    def first(self, closure: Callable):
        """Evaluates ``closure``, keeps it and whatever it refers to, and returns what it returned."""
        passes = None if self.model is None else TwoPasses(self.model, self.shared_masks)
        loss = closure()
        self._seen.append((closure, passes))
        return loss

    def second(self):
        """Evaluates every closure since :meth:`forget` again; returns what the last one returned."""
        loss = None
        for closure, passes in self._seen:
            with contextlib.nullcontext() if passes is None else passes.second():
                loss = closure()
        return loss

    def forget(self) -> None:
        self._seen.clear()
