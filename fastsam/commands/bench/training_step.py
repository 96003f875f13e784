"""Time of a whole training step, and images a second: forward, backward, climb, forward, backward, descend.

A plain step of the base optimizer, one forward and one backward pass, is the unit. Momentum-SAM's step has one of each,
too, and most of LookSAM's, whose time is the mean over k steps in turn. Every variant trains its own copy of
one network on one batch that is on the device already; the variants take turns in a shuffled order. On a GPU the steps
of a sample follow each other without a pause, between two marks in the device's own order of work, and networks of
convolutions have their channels last. Eigen-SAM's vector is given: its estimates are not in the step.
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam.commands.bench import clock, rivals
from fastsam.commands.bench.clock import Deadline, OutOfMemory
from fastsam.commands.bench.compiled import CompileLimit, compile_limit
from fastsam.commands.bench.networks import Network
from fastsam.commands.bench.optimizer_step import TIME_OVER
from fastsam.commands.bench.settings import BASES, Precision, cycle

PLAIN = "plain"
#: By implementation, what has its whole step in one CUDA graph; and by that, the backend.
GRAPHS = {"fastsam": "fastsam-graph", "fastsam-triton": "fastsam-triton-graph"}
_BACKENDS = {"fastsam-graph": "auto", "fastsam-triton-graph": "triton"}
WARM_UP = 2
QUEUE_SECONDS, SHORTEST_QUEUE, LONGEST_QUEUE = 0.2, 3, 100
_BASE_ARRAYS = {"sgd": 1, "adamw": 2}
_ACTIVATION_MARGIN = 1.5  # what the layers use besides what they keep

Step = Callable[[], Any]


class Variant(NamedTuple):
    """A method by one of its implementations; ``PLAIN`` is the base optimizer alone."""

    method: str
    implementation: str


class TrainingCell:
    """The measurement of one network, base optimizer, precision and batch size over several variants."""

    def __init__(
        self,
        network: Network,
        base: str,
        precision: Precision,
        batch: int,
        variants: Iterable[Variant],
        limit: float,
        device: str = "cpu",
        keep_going: bool = False,
    ):
        self.network, self.base, self.precision, self.batch, self.limit = network, base, precision, batch, limit
        self.variants = {f"{v.method} {v.implementation}": v for v in (Variant(PLAIN, PLAIN), *variants)}
        self.device, self.keep_going = torch.device(device), keep_going
        self.notes: dict[str, str] = {}
        self.peak_mib: dict[str, float | None] = {}

    def measure(
        self,
        repeats: int,
        show: Callable[[str, float], None] = lambda what, done: None,
        deadline: Deadline | None = None,
    ) -> list[dict[str, Any]]:
        """A row of the result for each variant, after ``repeats`` rounds; ``clock.LEAST_ROUNDS`` past the deadline."""
        deadline = deadline or Deadline(math.inf)
        groups = self._groups()
        times: dict[str, list[float]] = {}
        for number, group in enumerate(groups):
            show("warm-up", number / len(groups))
            steps = self._steps(group, deadline)

            def done(rounds: int, before: int = number) -> None:
                show("rounds", (before + rounds / repeats) / len(groups))

            times |= self._rounds(steps, repeats, deadline, done)
            del steps
            gc.collect()  # the next group needs the memory
        return [self._row(name, variant, times) for name, variant in self.variants.items()]

    def _groups(self) -> list[list[str]]:
        """The variants in groups that fit in memory together; a note for one that does not fit alone."""
        weights = self.network.weight_bytes() * self.precision.weights.itemsize // 4
        arrays = 2 + _BASE_ARRAYS[self.base]  # weights, gradients, state
        needs = {name: weights * (arrays + (0 if v.method == PLAIN else 4)) for name, v in self.variants.items()}
        half = self.precision.autocast or self.precision.weights.itemsize == 2
        activations = self.network.activation_bytes(self.batch) * _ACTIVATION_MARGIN / (2 if half else 1)
        groups, too_large = clock.groups_that_fit(needs, int(activations) + weights, self.device)
        self.notes |= too_large
        return groups

    def _steps(self, names: list[str], deadline: Deadline) -> dict[str, Step]:
        """What takes one step of each variant, warmed up; a note where offer, memory or time is missing."""
        torch.manual_seed(0)
        original = self.network.build()
        images, labels = self.network.batch(self.batch, self.device)
        if not self.precision.autocast:
            images = images.to(self.precision.weights)
        if self.device.type == "cuda":
            images = images.to(memory_format=torch.channels_last)
            torch.backends.cudnn.benchmark = True  # one size of batch: its fastest convolutions
        steps: dict[str, Step] = {}
        for name in names:
            if steps and deadline.left < 0:
                self.notes[name] = TIME_OVER
                continue
            variant = self.variants[name]
            limit = self.limit if variant.implementation == "compiled" else 0
            try:
                with clock.PeakMemory(self.device) as peak, clock.out_of_memory(), compile_limit(limit):
                    step = self._step_or_cycle(variant, copy.deepcopy(original), images, labels)
                    for _ in range(WARM_UP):
                        step()
            except (rivals.NotOffered, CompileLimit, OutOfMemory) as reason:
                self.notes[name] = str(reason)
                continue
            except Exception as error:
                if not self.keep_going:
                    raise
                self.notes[name] = clock.failure(error)
                continue
            self.peak_mib[name] = peak.mib
            steps[name] = step
        return steps

    def _step_or_cycle(self, variant: Variant, module: nn.Module, images: Tensor, labels: Tensor) -> Step:
        """What takes a step, or where a method's steps differ all of them in turn."""
        step, count = self._step(variant, module, images, labels), len(cycle(variant.method))

        def steps() -> None:
            for _ in range(count):
                step()

        return steps if count > 1 else step

    def _step(self, variant: Variant, module: nn.Module, images: Tensor, labels: Tensor) -> Step:
        module.to(self.device, self.precision.weights)
        if self.device.type == "cuda":
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has no stub of it
        autocast = self.precision.autocast

        def backward(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(module(images), labels)
            loss.backward()
            return loss

        if variant.method == PLAIN:
            base, options = BASES[self.base]
            return plain_step(base(module.parameters(), **options), backward)
        eigenvector = _unit_vector(module) if variant.method == "eigensam" else []
        if variant.implementation in _BACKENDS:
            backend = _BACKENDS[variant.implementation]
            return _captured_step(variant.method, self.base, module, eigenvector, backend, backward, images, labels)
        runner = rivals.build(variant.implementation, variant.method, self.base, module, eigenvector)
        return whole_step(runner, backward)

    def _rounds(
        self, steps: dict[str, Step], repeats: int, deadline: Deadline, done: Callable[[int], None]
    ) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in steps}
        lengths = {name: self._queue_length(step) for name, step in steps.items()}

        def take_turns(number: int, order: list[str]) -> None:
            for name in order:
                seconds = self._seconds(steps[name], lengths[name])
                times[name].append(seconds / len(cycle(self.variants[name].method)))
            done(number + 1)

        clock.in_rounds(steps, repeats, deadline, take_turns)
        return times

    def _queue_length(self, step: Step) -> int:
        if self.device.type == "cpu":
            return 1
        return max(SHORTEST_QUEUE, min(LONGEST_QUEUE, math.ceil(QUEUE_SECONDS / self._seconds(step, SHORTEST_QUEUE))))

    def _seconds(self, step: Step, count: int) -> float:
        """Seconds of a call of ``step``, the mean of ``count`` without a pause."""
        start, end = clock.event(self.device), clock.event(self.device)
        clock.wait_for(self.device)
        start.record()
        for _ in range(count):
            step()
        end.record()
        clock.wait_for(self.device)
        return start.elapsed_time(end) / 1e3 / count

    def _row(self, name: str, variant: Variant, times: dict[str, list[float]]) -> dict[str, Any]:
        row = {
            "title": self.network.title, "base": self.base, "method": variant.method,
            "implementation": variant.implementation, "batch": self.batch,
        }  # fmt: skip
        if name not in times:
            return {**row, "ms": None, "note": self.notes[name]}
        q1, seconds, q3 = clock.quartiles(times[name])
        plain = times.get(f"{PLAIN} {PLAIN}")
        return {
            **row, "ms": round(seconds * 1e3, 4), "q1_ms": round(q1 * 1e3, 4), "q3_ms": round(q3 * 1e3, 4),
            "images_per_s": round(self.batch / seconds, 1),
            "times_plain": round(seconds / statistics.median(plain), 3) if plain else None,
            "peak_mib": self.peak_mib[name],
        }  # fmt: skip


def plain_step(optimizer: torch.optim.Optimizer, backward: Callable[[], Any]) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    return step


def whole_step(runner: rivals.Runner, backward: Callable[[], Any]) -> Step:
    """What takes one step, each of the runner's kinds in turn."""
    kinds = itertools.cycle(runner.cycle)

    def step() -> None:
        kind = next(kinds)
        if kind.climbs:
            runner.drop_gradients()
            if kind.first_gradient:
                backward()
            runner.optimizer.first_step()
        runner.drop_gradients()
        backward()
        runner.optimizer.second_step()

    return step


def _captured_step(method, base, module, eigenvector, backend, backward, images, labels) -> Step:
    if images.device.type != "cuda":
        raise rivals.NotOffered("needs a CUDA GPU")
    from fastsam import graphs

    optimizer = rivals.fastsam_optimizer(method, base, list(module.parameters()), eigenvector, backend)
    captured = graphs.capture(optimizer, backward, images, labels, model=module)
    return lambda: captured(images, labels)


def _unit_vector(module: nn.Module) -> list[Tensor]:
    parameters = list(module.parameters())
    length = sum(p.numel() for p in parameters) ** 0.5
    return [torch.randn_like(p) / length for p in parameters]
