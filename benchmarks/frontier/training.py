"""One run: a network, a row of the table, numbers, a seed."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from time import process_time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.frontier.problems import Problem, problem
from benchmarks.frontier.table import BY_NAME, Numbers, Row
from fastsam.commands.training.evaluate import evaluate
from fastsam.commands.training.schedule import warmup_then_cosine
from fastsam.schedules import GradientNormSchedule

PLAIN_EVERY = 5  # steps of a timed run from one plain step to the next
WARM_UP = 3  # steps at the start that no time is taken of


@dataclass(frozen=True)
class Job:
    """One run to do. ``phase`` is first, second or test; only test runs see the test set, and are timed."""

    network: str
    row: str
    phase: str
    numbers: tuple[tuple[str, float], ...]
    seed: int
    quick: bool = False

    def key(self) -> str:
        return repr(dataclasses.astuple(self))


def run(job: Job) -> dict:
    """Trains and measures; the record of the run.

    The seed fixes initial weights and the order of the batches, alike for every row. The price is the mean time of a
    step over that of plain SGD's, which takes a step of its own on a copy of the network every few steps. Times are
    the processor's, of one thread, so that what else the machine does hardly shows.
    """
    given, row, numbers = problem(job.network, job.quick), BY_NAME[job.row], dict(job.numbers)
    if row.method is None:
        numbers.pop("rho", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = given.build()
        started = process_time()
        times = _train(model, given, row, numbers, job.seed, timed=job.phase == "test")
        seconds = process_time() - started
    images, labels = given.test if job.phase == "test" else given.validation
    accuracy = evaluate(model, model, [(images, labels)])[1]
    with torch.no_grad():
        loss = F.cross_entropy(model(images), labels).item()
    return {
        **dataclasses.asdict(job),
        "numbers": dict(job.numbers),
        "key": job.key(),
        "accuracy": accuracy,
        "loss": loss if math.isfinite(loss) else None,
        "seconds": round(seconds, 3),
        **times,
    }


def _train(model: nn.Module, given: Problem, row: Row, numbers: Numbers, seed: int, timed: bool) -> dict:
    optimizer = row.build(model, given.momentum, numbers)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        getattr(optimizer, "base_optimizer", optimizer), warmup_then_cosine(max(1, given.steps // 10), given.steps)
    )
    policy = row.policy(optimizer, given.steps) if row.policy else None
    plain = copy.deepcopy(model)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.0, momentum=given.momentum)  # stays in place
    order, evaluated = torch.Generator().manual_seed(seed), 0
    step_s, plain_s = [], []
    (images, labels), size = given.train, given.batch_size
    for step in range(given.steps):
        place = step % (len(labels) // size)
        if place == 0:
            epoch = torch.randperm(len(labels), generator=order)
        batch = epoch[place * size : (place + 1) * size]
        x, y = images[batch], labels[batch]
        model.train()
        begin = process_time()
        evaluated += _step(model, optimizer, policy, x, y, row.share)
        step_s.append(process_time() - begin)
        if timed and step % PLAIN_EVERY == 0:
            begin = process_time()
            _step(plain, plain_optimizer, None, x, y, 1.0)
            plain_s.append(process_time() - begin)
        schedule.step()
        if policy is not None:
            policy.step()
    found = {"gradients": evaluated / (size * given.steps), "step_ms": round(1000 * mean(step_s[WARM_UP:]), 4)}
    if timed:
        found["plain_ms"] = round(1000 * mean(plain_s[1:]), 4)
        found["price"] = round(found["step_ms"] / found["plain_ms"], 4)
    return found


def _step(model, optimizer, policy, x: Tensor, y: Tensor, share: float) -> int:
    """One step; returns of how many samples gradients were taken."""
    samples = 0

    def closure_of(images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            nonlocal samples
            samples += len(labels)
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            return loss

        return closure

    closure = closure_of(x, y)
    if not hasattr(optimizer, "base_optimizer"):
        closure()
        optimizer.step()
        optimizer.zero_grad()
        return samples
    if isinstance(policy, GradientNormSchedule):
        closure = policy.watch(closure)
    part = {}
    if share < 1:
        few = math.ceil(share * len(y))
        part = {"ascent_closure": closure_of(x[:few], y[:few])}
    optimizer.step(closure, model=model, **part)
    return samples


def plain_milliseconds(network: str, quick: bool, steps: int = 8) -> float:
    """The time of a plain step here and now, after one to warm up; to estimate how long everything takes."""
    given = problem(network, quick)
    model = given.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = given.train[0][: given.batch_size], given.train[1][: given.batch_size]
    _step(model, optimizer, None, x, y, 1.0)
    begin = process_time()
    for _ in range(steps):
        _step(model, optimizer, None, x, y, 1.0)
    return 1000 * (process_time() - begin) / steps
