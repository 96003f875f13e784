"""The throughput report's measurements: which there are, in which order, within which time.

``run`` returns, and hands to ``write`` after each cell, a JSON object:

    format       1; another number is another meaning
    machine      as ``fastsam/commands/machine.py`` describes it
    settings     the plans and the hyper-parameters
    bandwidth    gb_per_s of a copy (read + written), mib of the buffer, measured throughout the run
    optimizer    one row for each model, base, method, dtype and implementation: tensors, parameters,
                 bytes_per_parameter, ms (median), q1_ms, q3_ms, first_ms, second_ms, gb_per_s, share of the floor,
                 floor_ms, times_fastsam, compile_s, peak_mib; or ms null and a note that says why
    training     one row for each model, base, method, dtype, batch and implementation: ms, q1_ms, q3_ms, images_per_s,
                 times_plain, peak_mib; or ms null and a note
    parameters   one row for each size and implementation: parameters, tensors, ms, q1_ms, q3_ms, ns_per_parameter
    tensors      the same for each number of tensors
    lines        for each of the two curves and each implementation the line through it: fixed_ms, slope_ns (for each
                 parameter, or tensor), worst (relative distance of a point), points
    left_out     what was not measured, and why
    seconds      how long it took
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastsam.commands.bench import clock, curves
from fastsam.commands.bench.bandwidth import CopyBandwidth
from fastsam.commands.bench.clock import Deadline, OutOfMemory
from fastsam.commands.bench.networks import NETWORKS, SMALL_NETWORKS
from fastsam.commands.bench.optimizer_step import TIME_OVER, Cell
from fastsam.commands.bench.parameter_sets import ParameterSet, even_set, parameter_set, scaled_set
from fastsam.commands.bench.settings import BASES, DEFAULT_METHODS, METHODS, PRECISIONS, hyper_parameters
from fastsam.commands.bench.training_step import GRAPHS, TrainingCell, Variant
from fastsam.commands.machine import machine

FORMAT = 1
# The parts of a report and how the time is shared out among them.
PARTS = {"optimizer": 4, "training": 3, "tensors": 1, "parameters": 3}
CURVE_RIVALS = ("foreach", "authors")
LARGE = 100_000_000  # parameters; from here on a curve's point gets the least rounds
QUICK_COPY = 1 << 20  # bytes

Show = Callable[[str, float], None]  # what is going on, and which part of the whole is done


@dataclass(frozen=True)
class Plan:
    """What to measure. ``ours`` is always measured, and the rest compared with it; ``training_*`` are for the whole
    training step."""

    parts: tuple[str, ...] = tuple(PARTS)
    ours: str = "fastsam"
    models: tuple[str, ...] = ("resnet18", "vit-b16")
    training_models: tuple[str, ...] = ("resnet18",)
    methods: tuple[str, ...] = DEFAULT_METHODS
    bases: tuple[str, ...] = ("sgd",)
    dtypes: tuple[str, ...] = ("fp32",)
    rivals: tuple[str, ...] = ("authors", "foreach", "foreach-fused", "pytorch_optimizer")
    training_rivals: tuple[str, ...] = ("foreach",)
    batches: tuple[int, ...] = (8,)
    device: str = "cpu"
    threads: int = 1
    rounds: int = 7
    seconds: float = 180.0
    compile_limit: float = 120.0
    quick: bool = False
    queued: bool = False  # time a CPU in the way of a GPU, to try it out
    keep_going: bool = False  # what raises is noted, and the rest measured; else the exception ends the run


@dataclass(frozen=True)
class _Job:
    part: str
    title: str
    measure: Callable[[Show, Deadline], None]


def run(
    plan: Plan, show: Show, write: Callable[[dict[str, Any]], None], result: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Measures all of the plan that its time allows, and adds it to the ``result`` of earlier plans for this device."""
    began = time.monotonic()
    result = result or _empty(plan)
    result["settings"]["plans"].append(dataclasses.asdict(plan))
    before = result["seconds"]
    copy = CopyBandwidth(torch.device(plan.device), QUICK_COPY if plan.quick else None)
    jobs = list(_jobs(plan, result))
    whole = Deadline(plan.seconds)
    for part, of_part in itertools.groupby(enumerate(jobs), key=lambda numbered: numbered[1].part):
        later = sum(_weights(plan, part))
        deadline = whole.share(PARTS[part] / later)
        for number, job in of_part:
            show(job.title, number / len(jobs))
            if deadline.left < 0:
                result["left_out"].append({"what": job.title, "why": TIME_OVER})
                continue
            copy.sample()

            def shown(what: str, done: float, title: str = job.title, before: int = number) -> None:
                show(f"{title}: {what}", (before + done) / len(jobs))

            try:
                job.measure(shown, deadline)
            except OutOfMemory as reason:
                result["left_out"].append({"what": job.title, "why": str(reason)})
            except Exception as error:
                if not plan.keep_going:
                    raise
                result["left_out"].append({"what": job.title, "why": clock.failure(error)})
            gc.collect()  # the largest would not fit twice
            copy.sample()
            result["bandwidth"] = {"gb_per_s": round(copy.gb_per_s, 2), "mib": copy.bytes >> 20}
            result["lines"] = _lines(result)
            result["seconds"] = round(before + time.monotonic() - began, 1)
            write(result)
    show("done", 1.0)
    return result


def _empty(plan: Plan) -> dict[str, Any]:
    bases = {name: {"class": base.__name__, **keywords} for name, (base, keywords) in BASES.items()}
    return {
        "format": FORMAT,
        "machine": machine(plan.threads, plan.device),
        "settings": {"plans": [], **hyper_parameters(), "bases": bases},
        "bandwidth": None,
        **{key: [] for key in ("optimizer", "training", "parameters", "tensors", "lines", "left_out")},
        "seconds": 0.0,
    }


def _weights(plan: Plan, first: str) -> list[int]:
    """How the time is shared out among the plan's parts from ``first`` on."""
    chosen = [part for part in PARTS if part in plan.parts]
    return [PARTS[part] for part in chosen[chosen.index(first) :]]


def _jobs(plan: Plan, result: dict[str, Any]) -> Iterator[_Job]:
    chosen = [part for part in PARTS if part in plan.parts]
    for part in chosen:
        yield from _JOBS[part](plan, result)


def _optimizer_jobs(plan: Plan, result: dict[str, Any]) -> Iterator[_Job]:
    names = [plan.ours, *(name for name in plan.rivals if name != plan.ours)]
    dtypes = [name for name in plan.dtypes if not PRECISIONS[name].autocast]
    if not dtypes:
        dtypes = ["fp32"]  # what the weights are under autocast
    for model, base, dtype, method in itertools.product(plan.models, plan.bases, dtypes, plan.methods):

        def measure(show: Show, deadline: Deadline, model=model, base=base, dtype=dtype, method=method) -> None:
            cell = _cell(plan, _shapes(plan, model), base, method, names, dtype).measure(plan.rounds, show, deadline)
            result["optimizer"] += _optimizer_rows(cell, model, dtype)

        yield _Job("optimizer", f"optimizer step, {model} {METHODS[method]} over {base}, {dtype}", measure)


def _training_jobs(plan: Plan, result: dict[str, Any]) -> Iterator[_Job]:
    graph = [GRAPHS[plan.ours]] if torch.device(plan.device).type == "cuda" and plan.ours in GRAPHS else []
    names = [plan.ours, *graph, *plan.training_rivals]
    variants = [Variant(method, name) for method in plan.methods for name in dict.fromkeys(names)]
    networks = SMALL_NETWORKS if plan.quick else NETWORKS
    for model, base, dtype, batch in itertools.product(plan.training_models, plan.bases, plan.dtypes, plan.batches):
        title = f"training step, {model} over {base}, {dtype}, batch {batch}"
        if model not in networks:
            result["left_out"].append({"what": title, "why": "a set of shapes, no network to train"})
            continue

        def measure(show: Show, deadline: Deadline, model=model, base=base, dtype=dtype, batch=batch) -> None:
            cell = TrainingCell(
                networks[model],
                base,
                PRECISIONS[dtype],
                batch,
                variants,
                plan.compile_limit,
                plan.device,
                plan.keep_going,
            )
            rows = cell.measure(plan.rounds, show, deadline)
            result["training"] += [{"model": model, "dtype": dtype, **row} for row in rows]

        yield _Job("training", title, measure)


def _parameter_jobs(plan: Plan, result: dict[str, Any]) -> Iterator[_Job]:
    too_large: list[int] = []
    for size in curves.QUICK_SIZES if plan.quick else curves.SIZES:
        shapes = functools.partial(scaled_set, size)
        yield _curve_job(plan, result, "parameters", f"{size:,} parameters", shapes, too_large)


def _tensor_jobs(plan: Plan, result: dict[str, Any]) -> Iterator[_Job]:
    for count in curves.QUICK_COUNTS if plan.quick else curves.COUNTS:
        shapes = functools.partial(even_set, count, curves.PARAMETERS_OF_COUNTS)
        yield _curve_job(plan, result, "tensors", f"{count:,} tensor{'s' * (count > 1)}", shapes, [])


def _curve_job(
    plan: Plan, result: dict, part: str, title: str, shapes: Callable[[], ParameterSet], too_large: list[int]
) -> _Job:
    """A point of a curve. One that does not fit in memory is noted in ``too_large``, and none follows it."""
    names = [plan.ours, *(name for name in CURVE_RIVALS if name in plan.rivals)]
    method = "fsam" if "fsam" in plan.methods else plan.methods[0]
    dtype = next((name for name in plan.dtypes if not PRECISIONS[name].autocast), "fp32")

    def measure(show: Show, deadline: Deadline) -> None:
        if too_large:
            return
        of_size = shapes()
        rounds = min(plan.rounds, 3) if of_size.parameters >= LARGE else plan.rounds
        cell = _cell(plan, of_size, plan.bases[0], method, names, dtype, floor=False).measure(rounds, show, deadline)
        for name, measured in cell["implementations"].items():
            if measured["ms"] is None:
                result["left_out"].append({"what": f"{title} by {name}", "why": measured["note"]})
                if name == plan.ours:
                    too_large.append(of_size.parameters)
                continue
            result[part].append(
                {
                    "parameters": of_size.parameters, "tensors": of_size.tensors, "base": plan.bases[0],
                    "method": method, "dtype": dtype, "implementation": name,
                    **{key: measured[key] for key in ("ms", "q1_ms", "q3_ms")},
                    "ns_per_parameter": round(measured["ms"] * 1e6 / of_size.parameters, 4),
                }
            )  # fmt: skip

    return _Job(part, title, measure)


_JOBS = {
    "optimizer": _optimizer_jobs,
    "training": _training_jobs,
    "parameters": _parameter_jobs,
    "tensors": _tensor_jobs,
}


def _cell(plan: Plan, shapes: ParameterSet, base: str, method: str, names: list[str], dtype: str, floor: bool = True):
    weights = PRECISIONS[dtype].weights
    return Cell(
        shapes, base, method, names, plan.threads, plan.compile_limit, weights, plan.device, plan.queued, floor,
        plan.keep_going,
    )  # fmt: skip


def _shapes(plan: Plan, model: str) -> ParameterSet:
    if plan.quick and model in SMALL_NETWORKS:
        network = SMALL_NETWORKS[model]
        with torch.device("meta"):
            return ParameterSet(model, network.title, tuple(tuple(p.shape) for p in network.build().parameters()))
    full = parameter_set(model)
    if not plan.quick:
        return full
    return ParameterSet(model, f"tiny {full.title}", tuple(tuple(min(8, n) for n in shape) for shape in full.shapes))


def _optimizer_rows(cell: dict[str, Any], model: str, dtype: str) -> Iterator[dict[str, Any]]:
    shared = {key: cell[key] for key in ("title", "base", "method", "tensors", "parameters", "bytes_per_parameter")}
    floor_ms = cell["floor"]["ms"] if cell["floor"] else None
    for name, measured in cell["implementations"].items():
        yield {"model": model, "dtype": dtype, **shared, "floor_ms": floor_ms, "implementation": name, **measured}


def _lines(result: dict[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for curve in ("parameters", "tensors"):
        for name in dict.fromkeys(row["implementation"] for row in result[curve]):
            points = [row for row in result[curve] if row["implementation"] == name]
            if len(points) < 2:
                continue
            line = curves.line_through([row[curve] for row in points], [row["ms"] for row in points])
            lines.append(
                {
                    "curve": curve, "implementation": name, "points": len(points),
                    "fixed_ms": round(line.fixed_ms, 4), "slope_ns": round(line.slope_ms * 1e6, 4),
                    "worst": round(line.worst, 3),
                }
            )  # fmt: skip
    return lines
