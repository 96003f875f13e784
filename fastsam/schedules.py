r"""Schedules of rho, alpha, sigma, or any other number of the groups, in the manner of ``torch.optim.lr_scheduler``.

    schedule = CosineSchedule(optimizer, "rho", end=0.0, steps=1000)
    ...
    optimizer.step(closure)
    schedule.step()

A schedule multiplies nothing and accumulates nothing: the value after k steps is a closed form of k and of the value
the group had at the start, so that a resumed run meets the same numbers, bit for bit:

    ConstantSchedule      value_k = factor * initial for k < steps, then initial
    LinearSchedule        from start * initial to end * initial in ``steps`` steps
    CosineSchedule        the same along half a cosine
    ProportionalSchedule  value_k = minimum + (initial - minimum) * lr_k / reference lr

torch's own schedulers change ``lr`` and work on the wrapper or on ``optimizer.base_optimizer``.
"""

from __future__ import annotations

import math

import torch

from fastsam.checks import at_least


class Schedule:
    """Base class: ``value(initial, k, group)`` is what each group's ``name`` is set to.

    Args:
        optimizer: a fastsam optimizer.
        name: of the hyper-parameter, such as ``"rho"``, ``"alpha"`` or ``"sigma"``.

    Raises ``KeyError`` for a hyper-parameter that the optimizer does not have. A group added later starts at the
    value that it has at the next ``step()``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, name: str) -> None:
        self.optimizer = optimizer
        self.name = name
        # Where the base optimizer has a hyper-parameter of the same name, the groups call the method's sam_<name>.
        self._key = getattr(optimizer, "_aliases", {}).get(name, name)
        if any(self._key not in group for group in optimizer.param_groups):
            raise KeyError(f"the groups of {type(optimizer).__name__} have no {name!r}")
        self.steps_taken = 0
        self.initial = [group[self._key] for group in optimizer.param_groups]
        self._apply()

    def value(self, initial: float, k: int, group: dict) -> float:
        raise NotImplementedError

    def step(self) -> None:
        """After each step of the optimizer; after ``lr_scheduler.step()`` where there is one."""
        self.steps_taken += 1
        groups = self.optimizer.param_groups
        self.initial += [group[self._key] for group in groups[len(self.initial) :]]
        self._apply()

    def get_last_value(self) -> list[float]:
        """The present value in each group."""
        return [group[self._key] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict:
        """Everything but the optimizer."""
        return {k: v for k, v in self.__dict__.items() if k != "optimizer"}

    def load_state_dict(self, state_dict: dict) -> None:
        """Goes on from a saved schedule; the groups get its present value."""
        if state_dict["name"] != self.name:
            raise ValueError(f"the checkpoint is of a schedule of {state_dict['name']!r}, this one is of {self.name!r}")
        if len(state_dict["initial"]) != len(self.optimizer.param_groups):
            raise ValueError(
                f"the checkpoint has {len(state_dict['initial'])} groups, the optimizer "
                f"{len(self.optimizer.param_groups)}"
            )
        self.__dict__.update({k: list(v) if isinstance(v, list) else v for k, v in state_dict.items()})
        self._apply()

    def _apply(self) -> None:
        for initial, group in zip(self.initial, self.optimizer.param_groups, strict=True):
            group[self._key] = self.value(initial, self.steps_taken, group)


class ConstantSchedule(Schedule):
    """``factor * initial`` for the first ``steps`` steps, then ``initial``: SAM that starts late with factor 0."""

    def __init__(self, optimizer, name: str = "rho", *, factor: float = 0.0, steps: int = 5) -> None:
        at_least(0, "factor", factor)
        at_least(0, "steps", steps)
        self.factor, self.steps = factor, steps
        super().__init__(optimizer, name)

    def value(self, initial, k, group):
        return initial * self.factor if k < self.steps else initial


class LinearSchedule(Schedule):
    """From ``start * initial`` to ``end * initial`` in ``steps`` equal steps, and constant from there."""

    def __init__(self, optimizer, name: str = "rho", *, start: float = 1.0, end: float = 0.0, steps: int) -> None:
        at_least(0, "start", start)
        at_least(0, "end", end)
        at_least(1, "steps", steps)
        self.start, self.end, self.steps = start, end, steps
        super().__init__(optimizer, name)

    def value(self, initial, k, group):
        return initial * (self.start + (self.end - self.start) * self.progress(min(k, self.steps) / self.steps))

    def progress(self, t: float) -> float:
        """How much of the way is done at share ``t`` of the time."""
        return t


class CosineSchedule(LinearSchedule):
    """From ``start * initial`` to ``end * initial`` along half a cosine in ``steps`` steps, and constant from there."""

    def progress(self, t):
        return (1 - math.cos(math.pi * t)) / 2


class ProportionalSchedule(Schedule):
    """``minimum + (initial - minimum) * lr / reference_lr``: the radius follows the learning rate.

    ``reference_lr`` is the lr at which the value is ``initial``; it defaults to each group's ``initial_lr``, which
    torch's schedulers leave there, or else to its ``lr`` at construction.
    """

    def __init__(
        self, optimizer, name: str = "rho", *, reference_lr: float | None = None, minimum: float = 0.0
    ) -> None:
        at_least(0, "minimum", minimum)
        groups = optimizer.param_groups
        given = [float(g.get("initial_lr", g["lr"])) if reference_lr is None else reference_lr for g in groups]
        if not all(lr > 0 for lr in given):
            raise ValueError(f"reference_lr={min(given)!r} must be positive: name it, as the lr is 0 now")
        self.minimum, self.reference_lr = minimum, given
        super().__init__(optimizer, name)

    def value(self, initial, k, group):
        i = next(i for i, g in enumerate(self.optimizer.param_groups) if g is group)
        reference = self.reference_lr[min(i, len(self.reference_lr) - 1)]
        return self.minimum + (initial - self.minimum) * (float(group["lr"]) / reference)
