"""Both passes of a step over every micro-batch of a virtual batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from fastsam.distributed import Ranks
from fastsam.model_state import TwoPasses


class MicroBatches:
    """Evaluates each micro-batch as it comes, and all of them again for the second pass.

    With a ``model`` the second pass leaves its buffers alone, and with ``shared_masks`` each micro-batch draws the
    random numbers it drew before (see ``fastsam.model_state``).

    ``unreduced`` makes the context in which gradients stay on their process: that of every micro-batch but the last in
    the second pass, which the framework knows nothing of, and with ``m_sharpness`` that of the whole first pass.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        shared_masks: bool = True,
        unreduced: Callable[[], AbstractContextManager] = nullcontext,
        m_sharpness: bool = False,
    ) -> None:
        self.model = model
        self.shared_masks = shared_masks
        self.unreduced = unreduced
        self.m_sharpness = m_sharpness
        self._seen: list[tuple[Callable, TwoPasses | None]] = []

    def __len__(self) -> int:
        return len(self._seen)

    def first(self, closure: Callable):
        """Evaluates ``closure``, keeps it and whatever it refers to, and returns what it returned."""
        passes = None if self.model is None else TwoPasses(self.model, self.shared_masks)
        with self.unreduced() if self.m_sharpness else nullcontext():
            loss = closure()
        self._seen.append((closure, passes))
        return loss

    def second(self):
        """Evaluates every closure since :meth:`forget` again; returns what the last one returned."""
        loss = None
        for i, (closure, passes) in enumerate(self._seen, 1):
            with contextlib.ExitStack() as contexts:
                if i < len(self._seen):
                    contexts.enter_context(self.unreduced())
                if passes is not None:
                    contexts.enter_context(passes.second())
                loss = closure()
        return loss

    def forget(self) -> None:
        self._seen.clear()


def show_models(ranks: Ranks, models: Iterable[nn.Module], remedy: str) -> None:
    """Has an optimizer know of the models that a framework wrapped.

    Raises ``TypeError`` if it is to climb on each process by itself and none is under DistributedDataParallel,
    ``ValueError`` for one with a static graph.
    """
    for model in models:
        ranks.notice(model)
        if ranks.m_sharpness and getattr(model, "static_graph", False):
            raise ValueError(
                "m_sharpness=True with static_graph=True: torch cannot leave the first pass of a static graph "
                "unreduced; say static_graph=False, or call optimizer.step(closure, model=model) in a loop of your own"
            )
    if ranks.m_sharpness and ranks._model is None:
        raise TypeError(f"m_sharpness=True, but no model is under DistributedDataParallel: use {remedy}")
