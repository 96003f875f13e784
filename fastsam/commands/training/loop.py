"""The training loop of the demo and of the papers' tables, for any optimizer: each of them is a table of settings.

    training = Training(small_vit, lambda params: SAM(params, torch.optim.SGD, lr=0.1), batches, seed=0, epochs=20)
    for row in training.epochs():
        print(row["epoch"], row["train_loss"], row["test_accuracy"])

``state_dict`` between two epochs holds all that a run needs to go on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam.commands.training.batches import Batches
from fastsam.commands.training.evaluate import evaluate
from fastsam.commands.training.run import random_state, set_random_state
from fastsam.commands.training.schedule import warmup_then_cosine
from fastsam.optimizer import SharpnessAware

Closure = Callable[[], Tensor]
Step = Callable[..., Tensor]  # as take_step


def take_step(optimizer: torch.optim.Optimizer, closure: Closure, model: nn.Module, **options: Any) -> Tensor:
    """One step of a sharpness-aware or any other optimizer; returns the loss at the weights before it, detached.

    ``closure`` does a forward and a backward pass and returns the loss. BatchNorm's statistics are those of the first
    pass, and dropout draws fresh masks in the second, as in the authors' code. ``options`` are the optimizer's.
    """
    if isinstance(optimizer, SharpnessAware):
        options |= {"model": model, "shared_masks": False}
    evaluate_loss: Callable[[], Any] = closure  # torch says that closures return floats
    loss: Any = optimizer.step(evaluate_loss, **options)
    optimizer.zero_grad()
    return loss.detach()


class Training:
    """A network, its optimizer, the schedule of lr and the data, and where the run stands.

    Args:
        build: builds the network.
        make_optimizer: makes the optimizer of the network's parameters.
        batches: the data.
        seed: of the initial weights and of what the network draws; sets torch's global generator.
        epochs: of the whole run.
        warmup: steps in which lr rises; a cosine to 0 follows. With ``lr_per_epoch`` both are counted in epochs.
        backward: the backward pass, of the mean cross-entropy of a batch and the model, if it is not that of the loss.
        ascent_share: share of the batch that the perturbation is computed from: its first images, rounded up.
        device: of network and data.

    Attributes:
        samples: images that this object has taken gradients of, so that what a method costs is counted.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        batches: Batches,
        *,
        seed: int,
        epochs: int,
        warmup: int = 0,
        lr_per_epoch: bool = False,
        backward: Callable[[Tensor, nn.Module], None] = lambda loss, model: loss.backward(),
        ascent_share: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        torch.manual_seed(seed)
        self.batches, self.model = batches, build().to(device)
        self.optimizer = make_optimizer(self.model.parameters())
        self._epochs, self._lr_per_epoch, self._backward = epochs, lr_per_epoch, backward
        self._ascent_share, self.samples = ascent_share, 0
        whole = epochs if lr_per_epoch else epochs * batches.steps_per_epoch
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, warmup_then_cosine(warmup, whole))
        self.epoch, self.last = 0, {"seconds": 0.0}

    @property
    def steps_done(self) -> int:
        """Steps of whole epochs."""
        return self.epoch * self.batches.steps_per_epoch

    def epochs(
        self, before_step: Callable[[int, int], None] | None = None, step: Step = take_step, *, test: bool = True
    ) -> Iterator[dict[str, float]]:
        """Trains to the end of the run; gives the row of each epoch, as :meth:`one_epoch`, when it is over."""
        while self.epoch < self._epochs:
            yield self.one_epoch(before_step, step, test=test)

    def one_epoch(
        self, before_step: Callable[[int, int], None] | None = None, step: Step = take_step, *, test: bool = True
    ) -> dict[str, float]:
        """Trains for an epoch and tests.

        ``before_step`` is called with the number of the step in the run and in its epoch. ``step`` is called in place
        of :func:`take_step`. The row has step, epoch, mean train_loss and test_loss (cross-entropy, nats),
        test_accuracy (a share), lr, and the seconds of the run; without ``test`` nothing of the test set.
        """
        begin, before, losses = time.monotonic(), self.steps_done, []
        self.model.train()
        for place, (images, labels) in enumerate(self.batches.epoch()):
            if before_step is not None:
                before_step(before + place, place)
            losses.append(step(self.optimizer, self._closure(images, labels), self.model, **self._part(images, labels)))
            if not self._lr_per_epoch:
                self._schedule.step()
        if self._lr_per_epoch:
            self._schedule.step()
        self.epoch += 1
        tested = {}
        if test:
            tested["test_loss"], tested["test_accuracy"] = evaluate(self.model, self.model, self.batches.test())
        self.last = {
            "step": self.steps_done,
            "epoch": self.epoch,
            "train_loss": torch.stack(losses).mean().item(),
            **tested,
            "lr": float(self._schedule.get_last_lr()[0]),
            "seconds": round(self.last["seconds"] + time.monotonic() - begin, 3),
        }
        return self.last

    def state_dict(self) -> dict[str, Any]:
        """Between epochs."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {**parts, "epoch": self.epoch, "last": self.last, "random": random_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.epoch, self.last = state["epoch"], state["last"]
        set_random_state(state["random"])

    def _closure(self, images: Tensor, labels: Tensor) -> Closure:
        def closure() -> Tensor:
            self.samples += len(labels)
            loss = F.cross_entropy(self.model(images), labels)
            self._backward(loss, self.model)
            return loss

        return closure

    def _part(self, images: Tensor, labels: Tensor) -> dict[str, Closure]:
        """What a step is given for its first pass, where that is of a share of the batch."""
        if self._ascent_share == 1:
            return {}
        few = math.ceil(self._ascent_share * len(labels))
        return {"ascent_closure": self._closure(images[:few], labels[:few])}

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self._schedule,
            "data": self.batches,
        }
