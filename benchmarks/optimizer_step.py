"""Time of one step of the optimizer, ``first_step`` + ``second_step``, with the gradients given and no model.

    python -m benchmarks.optimizer_step --output benchmarks/results/cpu.json

For each parameter set, base optimizer and method, every implementation gets its own copy of the same weights
and the same sequence of gradients. The first three steps check that all agree to rounding, perturbations
included, so that what is timed is the same thing; they also warm up. Then the implementations take turns, in
an order that is shuffled each round, because the machine's own noise comes and goes. A gradient is handed
over before each pass, outside the timed region, through autograd as a backward pass would.

The floor of a step is the time that plain kernels with the same mix of reads and writes take on this machine,
measured between the rounds. ``share`` is floor / time.

The result is a JSON object:

    machine    as ``machine.py`` describes it
    settings   the arguments and hyper-parameters of the run
    cells      one for each set, base and method: tensors, parameters, bytes_per_parameter, floor (ms of
               each pass, their sum, GB/s, source; null for sets that fit the caches) and implementations,
               each with ms (median), q1_ms, q3_ms, first_ms, second_ms, gb_per_s, share, times_fastsam,
               compile_s, or with ms null and a note that says why
    host       fastsam's step on as many tensors as ViT-B/16 has, of one or two elements: the host's side
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import rivals, settings
from benchmarks.bandwidth import Bandwidth, bytes_per_parameter, passes
from benchmarks.compiled import CompileLimit, compile_limit
from benchmarks.gradients import GradientSequence
from benchmarks.machine import machine
from benchmarks.parameter_sets import ParameterSet, host_only_set, parameter_set, set_names
from benchmarks.report import print_tables

AGREEMENT_STEPS = 3
SMALL_SET = 1_000_000  # smaller sets stay in the caches: no share of the bandwidth, more steps a round
STEPS_A_ROUND_WHEN_SMALL = 10
BANDWIDTH_SAMPLES = 3
HOST_TENSORS, HOST_ROUNDS = parameter_set("vit-b16").tensors, 30


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    names = [name for name in options.rivals if not (options.no_compile and name == "compiled")]
    cells = list(itertools.product(options.sets, options.bases, options.methods))
    result: dict[str, Any] = {"machine": machine(options.threads), "settings": _settings(options)}
    earlier = json.loads(options.output.read_text()) if options.append else {"cells": [], "host": []}
    measured_now = {(c[0], c[1], c[2]) for c in cells}
    result["cells"] = [c for c in earlier["cells"] if (c["set"], c["base"], c["method"]) not in measured_now]
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cells) * options.repeats)
        for set_name, base, method in cells:

            def show(what: str, label: str = f"{set_name} {base} {method}") -> None:
                progress.update(task, description=f"{label}: {what}", advance=what == "round")

            show("agreement")
            shapes = parameter_set(set_name)
            cell = Cell(shapes, base, method, names, options.threads, options.compile_limit)
            result["cells"].append(cell.measure(options.repeats, show))
            if options.output:
                _write(result, options.output)
            del cell
            gc.collect()  # the largest sets would not fit twice
        host = host_time(options.bases, options.methods) if "fastsam" in names else []
        again = {(h["base"], h["method"]) for h in host}
        result["host"] = [h for h in earlier.get("host", []) if (h["base"], h["method"]) not in again] + host
    print_tables(result, console)
    if options.output:
        _write(result, options.output)
        console.print(f"written to {options.output}")
    return result


class Cell:
    """The measurement of one parameter set, base optimizer and method."""

    def __init__(self, shapes: ParameterSet, base: str, method: str, names: list[str], threads: int, limit: float):
        self.shapes, self.base, self.method, self.limit = shapes, base, method, limit
        self.gradients = GradientSequence(shapes)
        self.notes: dict[str, str] = {}
        self.compile_seconds: dict[str, float] = {}
        self.runners = self._agreeing_runners(names)
        self.passes = passes(method, base)
        self.bandwidth = None
        if shapes.parameters >= SMALL_SET:
            self.bandwidth = Bandwidth(self.passes.values(), shapes.parameters, threads)

    def measure(self, repeats: int, show=lambda what: None) -> dict[str, Any]:
        """``repeats`` rounds over all implementations; the cell of the result."""
        steps = STEPS_A_ROUND_WHEN_SMALL if self.bandwidth is None else 1
        gap = (repeats - 1) / (BANDWIDTH_SAMPLES - 1)
        sampling_rounds = {round(i * gap) for i in range(BANDWIDTH_SAMPLES)}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in self.runners}
        order, shuffle = list(self.runners), random.Random(0).shuffle
        gc.collect()
        gc.disable()
        try:
            for number in range(repeats):
                shuffle(order)
                for name in order:
                    times[name] += [self._timed_step(self.runners[name]) for _ in range(steps)]
                if self.bandwidth is not None and number in sampling_rounds:
                    self.bandwidth.sample()
                show("round")
        finally:
            gc.enable()
        return self._summary(times)

    def _agreeing_runners(self, names: list[str]) -> dict[str, rivals.Runner]:
        """Every implementation that offers the method, three steps old and seen to agree with the first."""
        weights = self.shapes.random(seed=0, scale=0.02)
        eigenvector = self.shapes.random(seed=3, scale=1 / math.sqrt(self.shapes.parameters))
        runners: dict[str, rivals.Runner] = {}
        reference = None
        for name in names:
            try:
                with compile_limit(self.limit if name == "compiled" else 0):
                    runner = rivals.build(name, self.method, self.base, self.shapes, weights, eigenvector)
                    self.gradients.restart()
                    seconds = [sum(self._timed_step(runner)) for _ in range(AGREEMENT_STEPS - 1)]
                    outcome = self._observed_step(runner)
            except (rivals.NotOffered, CompileLimit) as reason:
                self.notes[name] = str(reason)
                continue
            if name == "compiled":
                self.compile_seconds[name] = sum(seconds) - outcome.seconds * len(seconds)
            reference = reference or (name, outcome)
            _check_agreement(name, outcome, *reference, _flat(weights))
            runners[name] = runner
        return runners

    def _timed_step(self, runner: rivals.Runner) -> tuple[float, float]:
        first = self._timed_pass(runner, runner.optimizer.first_step)
        second = self._timed_pass(runner, runner.optimizer.second_step)
        _drop_gradients(runner)
        return first, second

    def _observed_step(self, runner: rivals.Runner) -> Outcome:
        before = _flat(runner.parameters)
        first = self._timed_pass(runner, runner.optimizer.first_step)
        perturbed = _flat(runner.parameters)
        second = self._timed_pass(runner, runner.optimizer.second_step)
        _drop_gradients(runner)
        return Outcome(first + second, perturbed.sub_(before), _flat(runner.parameters))

    def _timed_pass(self, runner: rivals.Runner, step) -> float:
        runner.load_gradients(self.gradients.next())
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def _summary(self, times: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
        moved = bytes_per_parameter(self.method, self.base)
        floor = self._floor()
        medians = {name: statistics.median(map(sum, taken)) for name, taken in times.items()}
        implementations = {}
        for name, taken in times.items():
            seconds = medians[name]
            q1, _, q3 = statistics.quantiles(map(sum, taken), n=4) if len(taken) > 1 else (seconds,) * 3
            implementations[name] = {
                "ms": _ms(seconds), "q1_ms": _ms(q1), "q3_ms": _ms(q3),
                "first_ms": _ms(statistics.median(first for first, _ in taken)),
                "second_ms": _ms(statistics.median(second for _, second in taken)),
                "gb_per_s": round(moved * self.shapes.parameters / seconds / 1e9, 2),
                "share": round(floor["ms"] / (seconds * 1e3), 3) if floor else None,
                "times_fastsam": round(seconds / medians["fastsam"], 2) if "fastsam" in medians else None,
                "compile_s": round(self.compile_seconds[name], 1) if name in self.compile_seconds else None,
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
        seconds = {name: self.bandwidth.seconds(mix) for name, mix in self.passes.items()}
        total = sum(seconds.values())
        moved = sum(mix.bytes_per_parameter for mix in self.passes.values()) * self.shapes.parameters
        return {
            "ms": _ms(total),
            "passes_ms": {name: _ms(each) for name, each in seconds.items()},
            "gb_per_s": round(moved / total / 1e9, 2),
            "source": self.bandwidth.source,
        }


class Outcome(NamedTuple):
    """What a step did: its seconds, the perturbation between its passes, the weights after it."""

    seconds: float
    perturbation: torch.Tensor
    weights: torch.Tensor


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


def _check_agreement(name: str, outcome: Outcome, other: str, reference: Outcome, start: torch.Tensor):
    """Raises ``RuntimeError`` where perturbations or weights differ by more than rounding allows.

    A perturbation is some 1e-4 of the weight it is added to, so its own relative rounding is near 1e-3. Torch's
    float32 norm of one flat vector, which Eigen-SAM's authors take, is off by 0.8 % at the 86.6 M elements of ViT-B/16.
    """
    climb_error = (outcome.perturbation - reference.perturbation).norm() / reference.perturbation.norm()
    step_error = (outcome.weights - reference.weights).norm() / (reference.weights - start).norm()
    if not (climb_error < 2e-2 and step_error < 1e-3):
        raise RuntimeError(
            f"{name} and {other} do not compute the same thing: after {AGREEMENT_STEPS} steps the "
            f"perturbations differ by {climb_error:.1e}, the weights by {step_error:.1e} of their way"
        )


def _write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _drop_gradients(runner: rivals.Runner) -> None:
    if not runner.keeps_gradients:
        for parameter in runner.parameters:
            parameter.grad = None


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    hyper = {"rho": settings.RHO, "sigma": settings.SIGMA, "lmbda": settings.LMBDA, "alpha": settings.ALPHA}
    used = {name: settings.BASES[name] for name in options.bases}
    bases = {name: {"class": base.__name__, **keywords} for name, (base, keywords) in used.items()}
    return {"repeats": options.repeats, "compile_limit_s": options.compile_limit, **hyper, "bases": bases}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer_step", description=__doc__.split("\n")[0])

    def choice(flag: str, known: list[str], text: str) -> None:
        parser.add_argument(flag, nargs="+", choices=known, default=known, metavar="NAME", help=f"{text}: {known}")

    choice("--sets", set_names(), "parameter sets")
    choice("--methods", list(settings.METHODS), "methods")
    choice("--bases", list(settings.BASES), "base optimizers")
    choice("--rivals", rivals.implementation_names(), "implementations")
    parser.add_argument("--repeats", type=int, default=15, help="rounds over all implementations (default 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (default: torch's)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument(
        "--append", action="store_true", help="keep the cells that --output has from earlier runs on this machine"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--compile-limit", type=float, default=300, help="seconds to compile one method (default 300)")
    options = parser.parse_args(arguments)
    if options.append and not (options.output and options.output.exists()):
        parser.error("--append needs an --output file that exists")
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    return options


if __name__ == "__main__":
    main()
