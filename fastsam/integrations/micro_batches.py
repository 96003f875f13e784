"""Both passes of a step over every micro-batch of a virtual batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import nn
from torch.amp import GradScaler

from fastsam.distributed.ranks import Ranks
from fastsam.loop.model_state import TwoPasses
from fastsam.methods.eigen import EigenSAM
from fastsam.optimizer import SharpnessAware

Loss = TypeVar("Loss")


class MicroBatches:
    """Evaluates each micro-batch as it comes, and all of them again for the second pass of a step that has one.

    With a ``model`` the second pass leaves its buffers alone, and with ``shared_masks`` each micro-batch draws the
    random numbers it drew before (see ``fastsam.loop.model_state``).

    ``unreduced`` makes the context in which gradients stay on their process: that of every micro-batch but the last in
    the second pass, which the framework knows nothing of, and under m-sharpness that of the whole first pass.
    """

    def __init__(
        self,
        optimizer: SharpnessAware,
        model: nn.Module | None = None,
        shared_masks: bool = True,
        unreduced: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.optimizer = optimizer
        self.model = model
        self.shared_masks = shared_masks
        self.unreduced = unreduced
        self._twice = True  # whether the step at hand has two passes
        self._seen: list[tuple[Callable, TwoPasses | None]] = []

    def __len__(self) -> int:
        return len(self._seen)

    def first(
        self,
        closure: Callable[[], Loss],
        part: Callable[[], Loss] | None = None,
        *,
        last: bool,
        grad_scaler: GradScaler | None = None,
    ) -> Loss:
        """Evaluates a micro-batch, keeps ``closure`` and whatever it refers to, and returns the loss.

        In a step of two passes ``part``, the same closure on a part of the micro-batch, is evaluated in place of
        ``closure`` if it is given. In a step of one pass this is the pass that counts, with every sample:
        MomentumSAM's is at w + e, where the weights stay after the ``last`` micro-batch until :meth:`update`.

        An exception forgets all, and their memory is another attempt's; the weights are restored.
        """
        if not self._seen:
            self._twice = self._two_passes()
        taken = part if part is not None and self._twice else closure
        # The masks of a part are not those of the whole: then the second pass draws its own.
        shared_masks = self.shared_masks and taken is closure
        passes = TwoPasses(self.model, shared_masks) if self.model is not None and self._twice else None
        alone = self._twice and self.optimizer.two_pass.ranks.m_sharpness
        along_momentum = self.optimizer.recipe.along_momentum
        try:
            if along_momentum:
                self.optimizer.first_step(grad_scaler=grad_scaler)
            with self.unreduced() if alone else nullcontext():
                loss = taken()
        except BaseException:
            self.abandon()
            raise
        if along_momentum and not last:  # nobody is to meet w + e between two micro-batches
            self.optimizer.restore()
        self._seen.append((closure, passes))
        return loss

    def second(self) -> Any:
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

    def update(
        self,
        second: Callable[[], Any],
        gradients_ready: Callable[[], None] = lambda: None,
        *,
        grad_scaler: GradScaler | None = None,
        **options: Any,
    ) -> None:
        """The rest of the step, once the last micro-batch was evaluated; gradients are cleared.

        ``second`` calls :meth:`second` where the step has a second pass. ``gradients_ready`` is called before the
        update, with its gradients in ``.grad``. ``options`` are those of the optimizer's ``finish``. An exception
        restores the weights; ``RuntimeError`` for a step without gradients.
        """
        optimizer = self.optimizer

        def closure() -> Any:
            loss = second()
            gradients_ready()
            return loss

        if self._twice:
            optimizer.finish(closure, grad_scaler=grad_scaler, **options)
            return
        options.pop("estimate_closure", None)  # an estimate that is due makes a step of two passes
        try:
            if not optimizer.two_pass.has_gradients():
                raise RuntimeError("the step's only pass left no gradients: its closure has to call backward()")
            if optimizer.two_pass.climbs() and not optimizer.recipe.along_momentum:  # by a radius of 0
                optimizer.first_step(grad_scaler=grad_scaler)
            gradients_ready()
            optimizer.second_step(zero_grad=True, grad_scaler=grad_scaler, **options)
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Forgets the micro-batches of a step that failed, and restores the weights."""
        self.forget()
        self.optimizer.restore()

    def forget(self) -> None:
        self._seen.clear()

    def _two_passes(self) -> bool:
        optimizer = self.optimizer
        estimates = isinstance(optimizer, EigenSAM) and optimizer.eigenvector_due()
        return optimizer.evaluations == 2 or estimates


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
    if ranks.m_sharpness and ranks.model is None:
        raise TypeError(f"m_sharpness=True, but no model is under DistributedDataParallel: use {remedy}")
