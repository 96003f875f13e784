"""Seconds of a step of an optimizer, one by one or in a queue."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fastsam.commands.bench import clock
from fastsam.commands.bench.gradients import GradientSequence
from fastsam.commands.bench.rivals import Runner
from fastsam.commands.bench.settings import Kind

QUEUE_SECONDS = 0.05  # of one sample
SHORTEST_QUEUE, LONGEST_QUEUE = 3, 200


def step(runner: Runner, gradients: GradientSequence, device: torch.device) -> tuple[float, float]:
    """Seconds of the first and of the second pass of one step, each with a new gradient: the means over its cycle."""
    first = second = 0.0
    for kind in runner.cycle:
        if kind.climbs:
            first += timed_climb(runner, kind, gradients, device)
        second += timed_pass(runner, runner.optimizer.second_step, gradients, device)
        runner.drop_gradients()
    return first / len(runner.cycle), second / len(runner.cycle)


def timed_climb(runner: Runner, kind: Kind, gradients: GradientSequence, device: torch.device) -> float:
    """Seconds of a first pass, which is given a gradient where it takes one."""
    return timed_pass(runner, runner.optimizer.first_step, gradients if kind.first_gradient else None, device)


def timed_pass(
    runner: Runner, run: Callable[[], None], gradients: GradientSequence | None, device: torch.device
) -> float:
    """Seconds of one pass from a device at rest until it rests again; the gradients, if any, are there before."""
    if gradients is not None:
        runner.load_gradients(gradients.next())
    start, end = clock.event(device), clock.event(device)
    clock.wait_for(device)
    start.record()
    run()
    end.record()
    clock.wait_for(device)
    return start.elapsed_time(end) / 1e3


def queued_steps(runner: Runner, gradients: GradientSequence, cycles: int, device: torch.device) -> tuple[float, float]:
    """Seconds of the first and of the second pass, the means over the steps of so many cycles without a pause.

    The same gradients are handed over in every step, by assigning them.
    """
    kinds = runner.cycle * cycles
    marks = [[clock.event(device) for _ in range(3)] for _ in kinds]
    passes = gradients.fixed()
    if runner.keeps_gradients:
        runner.load_gradients(passes[0])
    clock.wait_for(device)
    for kind, (begin, middle, end) in zip(kinds, marks, strict=True):
        begin.record()
        if kind.first_gradient:
            _hand_over(runner, passes[0])
        if kind.climbs:
            runner.optimizer.first_step()
        middle.record()
        _hand_over(runner, passes[1])
        runner.optimizer.second_step()
        end.record()
    clock.wait_for(device)
    runner.drop_gradients()
    whole = marks[0][0].elapsed_time(marks[-1][2]) / 1e3 / len(kinds)
    first = sum(begin.elapsed_time(middle) for begin, middle, _ in marks) / 1e3 / len(kinds)
    return first, whole - first


def queue_length(runner: Runner, gradients: GradientSequence, device: torch.device) -> int:
    """How many cycles of steps take about ``QUEUE_SECONDS``."""
    seconds = sum(queued_steps(runner, gradients, SHORTEST_QUEUE, device)) * len(runner.cycle)
    return max(SHORTEST_QUEUE, min(LONGEST_QUEUE, math.ceil(QUEUE_SECONDS / seconds)))


def _hand_over(runner: Runner, gradients: list[torch.Tensor]) -> None:
    if not runner.keeps_gradients:
        for parameter, gradient in zip(runner.parameters, gradients, strict=True):
            parameter.grad = gradient
