"""Time of one step of the optimizer, ``first_step`` + ``second_step``, with the gradients given and no model.

Every implementation gets its own copy of the same weights and the same gradients. In float32 the first three steps
check that all agree to rounding, perturbations included, so that what is timed is the same thing; they also warm up.
Then the implementations take turns, in an order that is shuffled each round, because the machine's own noise comes
and goes.

On the CPU a gradient is handed over before each pass, outside the timed region, through autograd as a backward pass
would. A GPU works behind the host: there steps follow each other without a pause, as in training, and a sample is the
time between two marks in the device's own order of work, divided by the steps in between. A host that cannot keep
up is thus in the time; one that can is not.

A time of LookSAM, most of whose steps take one gradient and do not climb, is the mean over its k steps in turn.

The floor of a step is the time that plain kernels with the same mix of reads and writes take on this machine,
measured between the rounds. ``share`` is floor / time.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from fastsam.commands.bench import clock, rivals, step_time
from fastsam.commands.bench.agreement import AGREEMENT_STEPS, Outcome, check_agreement, flat
from fastsam.commands.bench.bandwidth import Bandwidth, bytes_per_parameter, cycle_passes
from fastsam.commands.bench.clock import Deadline, OutOfMemory
from fastsam.commands.bench.compiled import CompileLimit, compile_limit
from fastsam.commands.bench.gradients import GradientSequence
from fastsam.commands.bench.parameter_sets import ParameterSet, host_only_set, parameter_set

SMALL_SET = 1_000_000  # smaller sets stay in the caches: no share of the bandwidth, more steps a round
CHECKED_SET = 100_000_000  # larger sets have not the memory for a comparison
STEPS_A_ROUND_WHEN_SMALL = 10
BANDWIDTH_SAMPLES = 3
TIME_OVER = "the time was over"
HOST_TENSORS, HOST_ROUNDS = parameter_set("vit-b16").tensors, 30
# Arrays as large as the weights: weights, gradients, backup; the state; and what an implementation allocates besides.
_BASE_ARRAYS = {"sgd": 1, "adamw": 2}
_METHOD_ARRAYS = {"fsam": 2, "vasso": 2, "gsam": 1, "wsam": 1, "looksam": 2}
_TEMPORARIES = {"fastsam": 0, "fastsam-flat": 0, "fastsam-triton": 0, "authors": 4, "foreach-fused": 1}
_SHARED_ARRAYS = 6  # weights to copy, eigenvector, gradients

Show = Callable[[str, float], None]  # what is going on, and which part of the whole is done


class Cell:
    """The measurement of one parameter set, base optimizer and method.

    The first of ``names`` is what the others' times are compared with. ``dtype`` is that of weights, gradients and
    state. ``queued=True`` times a CPU in the way of a GPU, to try it. ``floor=False`` leaves out the floor, as is done
    for sets that stay in the caches. With ``keep_going`` an implementation that raises gets a note, and the others are
    measured.
    """

    def __init__(
        self,
        shapes: ParameterSet,
        base: str,
        method: str,
        names: list[str],
        threads: int,
        limit: float,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        queued: bool = False,
        floor: bool = True,
        keep_going: bool = False,
    ):
        self.shapes, self.base, self.method, self.names, self.limit = shapes, base, method, names, limit
        self.dtype, self.device = dtype, torch.device(device)
        self.queued = queued or self.device.type != "cpu"
        self.keep_going = keep_going
        self.notes: dict[str, str] = {}
        self.compile_seconds: dict[str, float] = {}
        self.peak_mib: dict[str, float | None] = {}
        self.cycle = cycle_passes(method, base)
        self.threads = threads
        self.bandwidth: Bandwidth | None = None
        self.floor = floor and shapes.parameters >= SMALL_SET
        self._reference: tuple[str, Outcome] | None = None

    def measure(
        self, repeats: int, show: Show = lambda what, done: None, deadline: Deadline | None = None
    ) -> dict[str, Any]:
        """``repeats`` rounds over all implementations; the cell of the result.

        As many implementations as fit in memory take turns. Past the deadline ``clock.LEAST_ROUNDS`` are enough.
        """
        deadline = deadline or Deadline(math.inf)
        groups = self._groups()
        times: dict[str, list[tuple[float, float]]] = {}
        for number, group in enumerate(groups):
            show("agreement", number / len(groups))
            runners = self.build(group, deadline)
            self._prepare_bandwidth()

            def done(rounds: int, before: int = number) -> None:
                show("rounds", (before + rounds / repeats) / len(groups))

            times |= self._rounds(runners, repeats, deadline, done)
            del runners
            gc.collect()  # the next group needs the memory
        return self._summary(times)

    def build(self, names: list[str], deadline: Deadline | None = None) -> dict[str, rivals.Runner]:
        """Every implementation that offers the method, three steps old and seen to agree with the first.

        Past the deadline there is only the first.
        """
        place: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        self.gradients = GradientSequence(self.shapes, **place)
        weights = self.shapes.random(seed=0, scale=0.02, **place)
        eigenvector = []
        if self.method == "eigensam":
            eigenvector = self.shapes.random(seed=3, scale=1 / math.sqrt(self.shapes.parameters), **place)
        runners: dict[str, rivals.Runner] = {}
        for name in names:
            if runners and deadline is not None and deadline.left < 0:
                self.notes[name] = TIME_OVER
                continue
            try:
                _first_use(name, self.method, self.base, self.device)
                with (
                    clock.PeakMemory(self.device) as peak,
                    clock.out_of_memory(),
                    compile_limit(self.limit if name == "compiled" else 0),
                ):
                    module = self.shapes.module(weights)
                    runner = rivals.build(name, self.method, self.base, module, eigenvector)
                    self.gradients.restart()
                    seconds = [sum(self._timed_step(runner)) for _ in range(AGREEMENT_STEPS - 1)]
                self.peak_mib[name] = peak.mib
                with clock.out_of_memory():
                    last = self._last_warm_up_step(name, runner, weights)
            except (rivals.NotOffered, CompileLimit, OutOfMemory) as reason:
                self.notes[name] = str(reason)
                continue
            except Exception as error:
                if not self.keep_going:
                    raise
                self.notes[name] = clock.failure(error)
                continue
            if name == "compiled":
                self.compile_seconds[name] = sum(seconds) - last * len(seconds)
            runners[name] = runner
        return runners

    def _last_warm_up_step(self, name: str, runner: rivals.Runner, start: list[torch.Tensor]) -> float:
        """Seconds of a step whose outcome is compared with that of the first implementation, where that can be done."""
        if self.dtype != torch.float32 or self.shapes.parameters > CHECKED_SET:
            return sum(self._timed_step(runner))
        outcome = self._observed_step(runner)
        self._reference = self._reference or (name, outcome)
        check_agreement(name, outcome, *self._reference, flat(start))
        return outcome.seconds

    def _groups(self) -> list[list[str]]:
        """The implementations in groups that fit in memory together; a note for one that does not fit alone."""
        array = self.shapes.parameters * self.dtype.itemsize
        state = 3 + _BASE_ARRAYS[self.base] + _METHOD_ARRAYS.get(self.method, 0)
        needs = {name: (state + _TEMPORARIES.get(name, 3)) * array for name in self.names}
        shared = _SHARED_ARRAYS * array
        if self.floor:
            shared += 6 * self.shapes.parameters * 4 if self.device.type == "cpu" else 2 << 30
        groups, too_large = clock.groups_that_fit(needs, shared, self.device)
        self.notes |= too_large
        return groups

    def _prepare_bandwidth(self) -> None:
        if self.bandwidth is None and self.floor:
            numel = self.shapes.parameters * self.dtype.itemsize // 4
            mixes = (mix for step in self.cycle for mix in step.values())
            self.bandwidth = Bandwidth(mixes, numel, self.threads, self.device)

    def _rounds(
        self, runners: dict[str, rivals.Runner], repeats: int, deadline: Deadline, done: Callable[[int], None]
    ) -> dict[str, list[tuple[float, float]]]:
        gap = (repeats - 1) / (BANDWIDTH_SAMPLES - 1)
        sampling_rounds = {round(i * gap) for i in range(BANDWIDTH_SAMPLES)}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
        timers = {name: self._timer(runner) for name, runner in runners.items()}
        many = self.shapes.parameters < SMALL_SET and not self.queued

        def take_turns(number: int, order: list[str]) -> None:
            for name in order:
                times[name] += [timers[name]() for _ in range(STEPS_A_ROUND_WHEN_SMALL if many else 1)]
            if self.bandwidth is not None and number in sampling_rounds:
                self.bandwidth.sample()
            done(number + 1)

        clock.in_rounds(runners, repeats, deadline, take_turns)
        return times

    def _timer(self, runner: rivals.Runner) -> Callable[[], tuple[float, float]]:
        """What takes one sample of the seconds of both passes."""
        if not self.queued:
            return lambda: self._timed_step(runner)
        steps = step_time.queue_length(runner, self.gradients, self.device)
        return lambda: step_time.queued_steps(runner, self.gradients, steps, self.device)

    def _observed_step(self, runner: rivals.Runner) -> Outcome:
        """A cycle of steps; the perturbation is that of the climb with which it begins."""
        before, perturbed = flat(runner.parameters), None
        seconds = 0.0
        for kind in runner.cycle:
            if kind.climbs:
                seconds += step_time.timed_climb(runner, kind, self.gradients, self.device)
                perturbed = flat(runner.parameters) if perturbed is None else perturbed
            seconds += step_time.timed_pass(runner, runner.optimizer.second_step, self.gradients, self.device)
            runner.drop_gradients()
        assert perturbed is not None
        return Outcome(seconds / len(runner.cycle), perturbed.sub_(before), flat(runner.parameters))

    def _timed_step(self, runner: rivals.Runner) -> tuple[float, float]:
        return step_time.step(runner, self.gradients, self.device)

    def _summary(self, times: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
        moved = bytes_per_parameter(self.method, self.base, self.dtype.itemsize)
        floor = self._floor() if times else None
        medians = {name: statistics.median(map(sum, taken)) for name, taken in times.items()}
        implementations, ours = {}, self.names[0]
        for name, taken in times.items():
            q1, seconds, q3 = clock.quartiles(map(sum, taken))
            implementations[name] = {
                "ms": _ms(seconds), "q1_ms": _ms(q1), "q3_ms": _ms(q3),
                "first_ms": _ms(statistics.median(first for first, _ in taken)),
                "second_ms": _ms(statistics.median(second for _, second in taken)),
                "gb_per_s": round(moved * self.shapes.parameters / seconds / 1e9, 2),
                "share": round(floor["ms"] / (seconds * 1e3), 3) if floor else None,
                "times_fastsam": round(seconds / medians[ours], 2) if ours in medians else None,
                "compile_s": round(self.compile_seconds[name], 1) if name in self.compile_seconds else None,
                "peak_mib": self.peak_mib[name] if self.shapes.parameters >= SMALL_SET else None,
            }  # fmt: skip
        implementations |= {name: {"ms": None, "note": note} for name, note in self.notes.items()}
        return {
            "set": self.shapes.name, "title": self.shapes.title, "base": self.base, "method": self.method,
            "tensors": self.shapes.tensors, "parameters": self.shapes.parameters,
            "bytes_per_parameter": moved, "floor": floor, "implementations": implementations,
        }  # fmt: skip

    def _floor(self) -> dict[str, Any] | None:
        if self.bandwidth is None:
            return None
        seconds = dict.fromkeys(self.cycle[0], 0.0)
        for step in self.cycle:
            for name, mix in step.items():
                seconds[name] += self.bandwidth.seconds(mix) / len(self.cycle)
        total = sum(seconds.values())
        moved = bytes_per_parameter(self.method, self.base, self.dtype.itemsize) * self.shapes.parameters
        return {
            "ms": _ms(total),
            "passes_ms": {name: _ms(each) for name, each in seconds.items()},
            "gb_per_s": round(moved / total / 1e9, 2),
            "source": self.bandwidth.source,
        }


def host_time(bases: list[str], methods: list[str]) -> list[dict[str, Any]]:
    """fastsam's step on ``HOST_TENSORS`` tensors of one or two elements, each pass with new gradients."""
    shapes = host_only_set(HOST_TENSORS)
    host = []
    for base, method in itertools.product(bases, methods):
        cell = Cell(shapes, base, method, ["fastsam"], torch.get_num_threads(), limit=0)
        measured = cell.measure(HOST_ROUNDS)["implementations"]["fastsam"]
        keys = ("ms", "q1_ms", "q3_ms", "first_ms", "second_ms")
        times = {key: measured[key] for key in keys}
        host.append({"base": base, "method": method, "tensors": HOST_TENSORS, **times})
    return host


@functools.cache
def _first_use(name: str, method: str, base: str, device: torch.device) -> None:
    """Has the implementation import what it imports, so that this is not counted as memory of its first step."""
    if name == "compiled":
        return
    one = [torch.ones(1, device=device)]
    runner = rivals.build(name, method, base, ParameterSet("one", "one", ((1,),)).module(one), one)
    for scale, run in ((1, runner.optimizer.first_step), (2, runner.optimizer.second_step)):
        runner.load_gradients([scale * g for g in one])
        run()


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)
