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

A step whose radius is 0 in every group evaluates its closure once, and so a policy of which steps are SAM's is a
schedule of ``rho``. What a step costs on average, in gradients:

    ConstantSchedule      a tail: factor 0 for the first ``steps`` of n steps        2 - steps / n
    PeriodicSchedule      value_k = initial for k = 0, every, 2 every, ..., else 0   1 + 1 / every
    RandomSchedule        value_k = initial with a probability, else 0               1 + probability
    GradientNormSchedule  value_k = initial where the gradient is large, else 0      1 + the share of such steps

The last one has no closed form: its state is two numbers that its ``state_dict`` holds.

torch's own schedulers change ``lr`` and work on the wrapper or on ``optimizer.base_optimizer``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastsam.distributed.shards import is_dtensor
from fastsam.optimizer import SharpnessAware
from fastsam.support.checks import at_least, in_range


class Schedule:
    """Base class: ``value(initial, k, group)`` is what each group's ``name`` is set to.

    Args:
        optimizer: a fastsam optimizer.
        name: of the hyper-parameter, such as ``"rho"``, ``"alpha"`` or ``"sigma"``.

    Raises ``KeyError`` for a hyper-parameter that the optimizer does not have. A group added later starts at the
    value that it has at the next ``step()``.
    """

    def __init__(self, optimizer: SharpnessAware, name: str) -> None:
        self.optimizer = optimizer
        self.name = name
        # Where the base optimizer has a hyper-parameter of the same name, the groups call the method's sam_<name>.
        self._key = optimizer.two_pass.aliases.get(name, name)
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
    """``factor * initial`` for the first ``steps`` steps, then ``initial``.

    With factor 0 SAM starts late: the first steps evaluate their closure once, and only a tail of the training pays
    for two gradients.
    """

    def __init__(self, optimizer: SharpnessAware, name: str = "rho", *, factor: float = 0.0, steps: int = 5) -> None:
        at_least(0, "factor", factor)
        at_least(0, "steps", steps)
        self.factor, self.steps = factor, steps
        super().__init__(optimizer, name)

    def value(self, initial: float, k: int, group: dict) -> float:
        return initial * self.factor if k < self.steps else initial


class LinearSchedule(Schedule):
    """From ``start * initial`` to ``end * initial`` in ``steps`` equal steps, and constant from there."""

    def __init__(
        self, optimizer: SharpnessAware, name: str = "rho", *, start: float = 1.0, end: float = 0.0, steps: int
    ) -> None:
        at_least(0, "start", start)
        at_least(0, "end", end)
        at_least(1, "steps", steps)
        self.start, self.end, self.steps = start, end, steps
        super().__init__(optimizer, name)

    def value(self, initial: float, k: int, group: dict) -> float:
        return initial * (self.start + (self.end - self.start) * self.progress(min(k, self.steps) / self.steps))

    def progress(self, t: float) -> float:
        """How much of the way is done at share ``t`` of the time."""
        return t


class CosineSchedule(LinearSchedule):
    """From ``start * initial`` to ``end * initial`` along half a cosine in ``steps`` steps, and constant from there."""

    def progress(self, t: float) -> float:
        return (1 - math.cos(math.pi * t)) / 2


class ProportionalSchedule(Schedule):
    """``minimum + (initial - minimum) * lr / reference_lr``: the radius follows the learning rate.

    ``reference_lr`` is the lr at which the value is ``initial``; it defaults to each group's ``initial_lr``, which
    torch's schedulers leave there, or else to its ``lr`` at construction.
    """

    def __init__(
        self, optimizer: SharpnessAware, name: str = "rho", *, reference_lr: float | None = None, minimum: float = 0.0
    ) -> None:
        at_least(0, "minimum", minimum)
        groups = optimizer.param_groups
        given = [float(g.get("initial_lr", g["lr"])) if reference_lr is None else reference_lr for g in groups]
        if not all(lr > 0 for lr in given):
            raise ValueError(f"reference_lr={min(given)!r} must be positive: name it, as the lr is 0 now")
        self.minimum, self.reference_lr = minimum, given
        super().__init__(optimizer, name)

    def value(self, initial: float, k: int, group: dict) -> float:
        i = next(i for i, g in enumerate(self.optimizer.param_groups) if g is group)
        reference = self.reference_lr[min(i, len(self.reference_lr) - 1)]
        return self.minimum + (initial - self.minimum) * (float(group["lr"]) / reference)


class PeriodicSchedule(Schedule):
    """``initial`` at every ``every``-th step, beginning with the first, and 0 in between."""

    def __init__(self, optimizer: SharpnessAware, name: str = "rho", *, every: int) -> None:
        at_least(1, "every", every)
        if every != int(every):
            raise ValueError(f"every={every!r} must be a whole number of steps")
        self.every = every
        super().__init__(optimizer, name)

    def value(self, initial: float, k: int, group: dict) -> float:
        return initial if k % self.every == 0 else 0.0


class RandomSchedule(Schedule):
    """``initial`` with ``probability`` at each step, and 0 otherwise.

    Whether step k is one of them depends on ``seed`` and k alone: the same on every rank, on every machine, and after
    a resume. No random generator is touched.

    Source: Zhao et al., "SS-SAM: Stochastic Scheduled Sharpness-Aware Minimization for Efficiently Training Deep
    Neural Networks", 2022.
    """

    def __init__(self, optimizer: SharpnessAware, name: str = "rho", *, probability: float, seed: int = 0) -> None:
        at_least(0, "probability", probability)
        if probability > 1:
            raise ValueError(f"probability={probability!r} must be at most 1")
        self.probability, self.seed = probability, seed
        super().__init__(optimizer, name)

    def value(self, initial: float, k: int, group: dict) -> float:
        digest = hashlib.blake2b(f"{self.seed} {k}".encode(), digest_size=8).digest()
        return initial if int.from_bytes(digest, "little") < self.probability * 2**64 else 0.0


class GradientNormSchedule(Schedule):
    r"""``initial`` where the gradient at w is large for the time being, and 0 elsewhere: AE-SAM's rule.

        schedule = GradientNormSchedule(optimizer, steps=1000)
        ...
        optimizer.step(schedule.watch(closure))
        schedule.step()

    With n_k = ||g_k||^2 of the first pass, mean and variance starting at 0:

        mean_k     = decay mean_(k-1) + (1 - decay) n_k
        variance_k = decay variance_(k-1) + (1 - decay) (n_k - mean_k)^2
        c_k        = start + (end - start) min(k / steps, 1)
        value_k    = initial if n_k >= mean_k + c_k sqrt(variance_k), else 0

    The decision falls between a step's two passes, from the gradient that the step needs anyway: it costs one read of
    the gradients and one number that the host waits for, and no evaluation. A step makes one evaluation or two, as it
    falls out. The gradients are those of the perturbed groups. Where they are not finite nothing is learnt, and the
    step is left to the optimizer. A manual loop calls ``decide`` before ``first_step()``, and leaves out the second
    pass where the answer is False. Not for ``accumulate``, whose micro-batches each have a first pass, nor for
    gradients under a ``GradScaler``, whose scale would enter the mean.

    Source: Jiang, Yang, Zhang, Kwok, "An Adaptive Policy to Employ Sharpness-Aware Minimization", ICLR 2023.
    """

    def __init__(
        self,
        optimizer: SharpnessAware,
        name: str = "rho",
        *,
        steps: int,
        start: float = 1.0,
        end: float = -1.0,
        decay: float = 0.9,
    ) -> None:
        at_least(1, "steps", steps)
        in_range(0, 1, "decay", decay)
        for key, value in (("start", start), ("end", end)):
            if not math.isfinite(value):
                raise ValueError(f"{key}={value!r} must be a finite number")
        self.steps, self.start, self.end, self.decay = steps, start, end, decay
        self.mean = self.variance = 0.0
        self.climbs = True
        self._met: tuple[float, float] | None = None
        super().__init__(optimizer, name)

    def value(self, initial: float, k: int, group: dict) -> float:
        return initial if self.climbs else 0.0

    def watch(self, closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The closure, after whose first evaluation in a step the radius of this step is decided."""

        def watched() -> Tensor:
            loss = closure()
            if not self.optimizer._perturbed:
                self.decide(self._squared_norm())
            return loss

        return watched

    def decide(self, squared_norm: float | Tensor) -> bool:
        """Whether this step is SAM's, given ||g||^2 at w; sets the groups' values. A second call replaces the first."""
        n = float(squared_norm)
        self.climbs, self._met = True, (self.mean, self.variance)
        if math.isfinite(n):
            mean = self.decay * self.mean + (1 - self.decay) * n
            variance = self.decay * self.variance + (1 - self.decay) * (n - mean) ** 2
            c = self.start + (self.end - self.start) * min(self.steps_taken / self.steps, 1.0)
            self.climbs, self._met = n >= mean + c * math.sqrt(variance), (mean, variance)
        self._apply()
        return self.climbs

    def step(self) -> None:
        """After each step of the optimizer. Raises ``RuntimeError`` if nothing was decided in it."""
        if self._met is None:
            raise RuntimeError(
                "GradientNormSchedule.step() met no gradient in this step: write "
                "optimizer.step(schedule.watch(closure)), or call schedule.decide(squared_norm) between the passes"
            )
        (self.mean, self.variance), self._met, self.climbs = self._met, None, True
        super().step()

    @torch.no_grad()
    def _squared_norm(self) -> Tensor:
        squares: list[Tensor] = []
        for group in self.optimizer.param_groups:
            for p in (p for p in group["params"] if group["perturb"] and p.grad is not None):
                dtype = torch.float64 if p.grad.dtype == torch.float64 else torch.float32
                square = torch.linalg.vector_norm(p.grad, dtype=dtype).square()
                squares.append(square.full_tensor() if is_dtensor(square) else square)
        return sum((square.to(squares[0].device) for square in squares), torch.zeros(()))
