"""The rows of the frontier: a method at a price, and what is searched for it.

A new method is a new row. What fastsam does not have yet is skipped, and the report says why.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

import fastsam
from benchmarks.frontier import experiments
from fastsam import schedules

Numbers = dict[str, float]

#: Of these a row gives factors, of the network's own values; of every other number the value itself.
SCALED = ("lr", "weight_decay", "rho")


def _radii(*factors: float) -> tuple[Numbers, ...]:
    return tuple({"rho": factor} for factor in factors)


_SAM = _radii(0.7, 1.2, 2.0, 3.3)
_ON_A_PART = _radii(0.9, 1.5, 2.5, 4.1)
_FINER = _radii(0.78, 1.28, 1.6)


@dataclass(frozen=True)
class Row:
    """A method at a price.

    Attributes:
        name: as the report has it.
        method: of the class in fastsam or in ``experiments``; None is the base optimizer by itself.
        gradients: what a step costs nominally, to estimate how long everything takes.
        first: four configurations, all tried.
        second: three more, each a change of the best of the first: factors multiply its numbers.
        options: what a configuration has that does not say otherwise.
        share: of the batch, in the first pass.
        policy: makes the schedule of the radius, from the optimizer and the number of steps.
    """

    name: str
    method: str | None
    gradients: float
    first: tuple[Numbers, ...] = _SAM
    second: tuple[Numbers, ...] = _FINER
    options: Numbers = field(default_factory=dict)
    share: float = 1.0
    policy: Callable[[torch.optim.Optimizer, int], schedules.Schedule] | None = None

    def missing(self) -> str | None:
        """Why the row cannot run with the fastsam at hand, or None."""
        if self.method is None:
            return None
        found = _optimizer(self.method)
        if found is None:
            return f"fastsam has no {self.method}"
        if self.share < 1 and "ascent_closure" not in inspect.signature(found.step).parameters:
            return "fastsam's step() takes no ascent_closure"
        return None

    def build(self, model: nn.Module, momentum: float, numbers: Numbers) -> torch.optim.Optimizer:
        """The optimizer with ``numbers``, as :func:`resolved` gives them, around SGD with momentum."""
        numbers = dict(numbers)
        base = {"lr": numbers.pop("lr"), "weight_decay": numbers.pop("weight_decay"), "momentum": momentum}
        if self.method is None:
            return torch.optim.SGD(model.parameters(), **base)
        return _optimizer(self.method)(model.parameters(), torch.optim.SGD, **{**self.options, **numbers, **base})


def _optimizer(name: str):
    return getattr(fastsam, name, None) or getattr(experiments, name, None)


def resolved(start: Numbers, change: Numbers) -> Numbers:
    """``start`` with the factors and values of ``change``."""
    return {**start, **{k: start[k] * v if k in SCALED else v for k, v in change.items()}}


def _every(k: int):
    return lambda optimizer, steps: schedules.PeriodicSchedule(optimizer, every=k)


def _tail(share: float):
    return lambda optimizer, steps: schedules.ConstantSchedule(optimizer, factor=0.0, steps=round((1 - share) * steps))


#: Tuned first: every other row keeps the learning rate and the weight decay that are best for it.
BASE = Row(
    "SGD", None, 1.0,
    tuple({"lr": factor} for factor in (0.4, 0.7, 1.2, 2.0)),
    tuple({"weight_decay": factor} for factor in (0.3, 3.0, 8.0)),
)  # fmt: skip

_FRIENDLY = ({"sigma": 0.5}, {"lmbda": 0.6}, {"lmbda": 0.95})
_REUSED = ({"alpha": 0.3}, {"alpha": 0.5}, {"rho": 1.28})

ROWS = (
    BASE,
    Row("SAM", "SAM", 2.0),
    Row("ASAM", "SAM", 2.0, _radii(8, 14, 23, 38), options={"adaptive": True}),
    Row("F-SAM", "FriendlySAM", 2.0, second=_FRIENDLY),
    Row("Eigen-SAM", "EigenSAM", 2.2, second=({"alpha": 0.05}, {"alpha": 0.4}, {"rho": 1.28}), options={"freq": 40}),
    Row("VaSSO", "VaSSO", 2.0, second=({"theta": 0.2}, {"theta": 0.7}, {"theta": 0.9}), options={"theta": 0.4}),
    Row("GSAM", "GSAM", 2.0, second=({"alpha": 0.1}, {"alpha": 0.2}, {"alpha": 0.7})),
    Row("WSAM", "WSAM", 2.0, _radii(0.3, 0.6, 1.1, 1.8), second=(
        {"gamma": 0.6, "rho": 1.6}, {"gamma": 0.8, "rho": 1.25}, {"gamma": 0.95, "rho": 0.7},
    )),
    Row("StableSAM", "StableSAM", 2.0),
    Row("SAM, first pass on 1/2", "SAM", 1.5, _ON_A_PART, share=1 / 2),
    Row("SAM, first pass on 1/4", "SAM", 1.25, _ON_A_PART, share=1 / 4),
    Row("SAM, first pass on 1/8", "SAM", 1.125, _ON_A_PART, share=1 / 8),
    Row("ASAM, first pass on 1/4", "SAM", 1.25, _radii(8, 15, 27, 50), options={"adaptive": True}, share=1 / 4),
    Row("F-SAM, first pass on 1/4", "FriendlySAM", 1.25, _ON_A_PART, second=_FRIENDLY, share=1 / 4),
    Row("SAM, every 2nd step", "SAM", 1.5, policy=_every(2)),
    Row("SAM, every 5th step", "SAM", 1.2, policy=_every(5)),
    Row("SAM, half the steps at random", "SAM", 1.5,
        policy=lambda optimizer, steps: schedules.RandomSchedule(optimizer, probability=0.5)),
    Row("SAM, last half", "SAM", 1.5, policy=_tail(0.5)),
    Row("SAM, last fifth", "SAM", 1.2, policy=_tail(0.2)),
    Row("AE-SAM", "SAM", 1.5, policy=lambda optimizer, steps: schedules.GradientNormSchedule(optimizer, steps=steps)),
    Row("LookSAM, k=2", "LookSAM", 1.5, second=_REUSED, options={"k": 2}),
    Row("LookSAM, k=5", "LookSAM", 1.2, second=_REUSED, options={"k": 5}),
    Row("Momentum-SAM", "MomentumSAM", 1.0, _radii(3, 5, 8, 12.5)),
    Row("Momentum-ASAM", "MomentumSAM", 1.0, _radii(20, 35, 55, 85), options={"adaptive": True}),
    Row("Momentum-SAM, radius follows lr", "MomentumSAM", 1.0, _radii(5, 8, 12.5, 20),
        policy=lambda optimizer, steps: schedules.ProportionalSchedule(optimizer)),
    Row("Momentum-Eigen-SAM", "MomentumEigenSAM", 1.2, _radii(3, 5, 8, 12.5), options={"freq": 40, "alpha": 0.2},
        second=({"alpha": 0.05}, {"alpha": 0.4}, {"rho": 1.28})),
)  # fmt: skip

BY_NAME = {row.name: row for row in ROWS}
