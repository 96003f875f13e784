"""The GPU benchmark: optimizer and training steps against what they must reach, within a given time.

    python -m benchmarks.gpu OUTDIR --seconds 300

``benchmarks/gpu.sh`` builds, tests and then runs this. It needs torch and nothing else, and writes ``gpu.json`` (in the
form of ``fastsam/bench/throughput.py``) and ``gpu.md`` into the folder after each measurement, so that a run that
is stopped keeps what it had. The sections come in order of importance; what the time does not allow is named, and so
is what raised, which makes the exit status 1.

With ``FASTSAM_BENCH_DEVICE=cpu`` every line runs on a CPU at tiny sizes: the numbers say nothing then.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastsam.bench.clock import FAILED
from fastsam.bench.settings import METHODS
from fastsam.bench.tables import markdown
from fastsam.bench.throughput import PARTS, Plan, run

LEAST_SHARE, LEAST_OVER_FOREACH, LEAST_OVER_LOOP = 0.9, 2.5, 20.0
MOST_PLAIN_STEPS, LEAST_GRAPH_OVER_FOREACH = 2.05, 1.5
LARGE = ("vit-b16", "vit-l16", "gpt-1.3b")
TRAINED = ("vit-b16", "resnet18")

_RIVALS = ("fastsam-triton", "authors", "foreach", "foreach-fused")


def _optimizer_steps(*models: str, **options: Any) -> Plan:
    return Plan(parts=("optimizer",), models=models, **{"rivals": _RIVALS, **options})


def _training_steps(*methods: str) -> Plan:
    return Plan(
        parts=("training",), training_models=TRAINED, methods=methods, dtypes=("bf16-autocast",), batches=(8, 128)
    )


# Each with the most seconds it may take.
SECTIONS = (
    (20, _optimizer_steps("resnet18")),
    (30, _optimizer_steps("vit-b16")),
    (60, _optimizer_steps("vit-l16", "gpt-1.3b", rivals=("foreach", "foreach-fused"))),
    (30, _optimizer_steps("vit-b16", "resnet18", dtypes=("bf16",))),
    (100, _training_steps("sam")),
    (140, _optimizer_steps("vit-b16", rivals=("compiled",), compile_limit=45)),
    (30, _optimizer_steps("vit-l16", "gpt-1.3b", "resnet50", "wrn28-10", dtypes=("bf16",), rivals=("foreach",))),
    (20, _optimizer_steps("resnet50", "wrn28-10")),
    (30, Plan(parts=("parameters", "tensors"), methods=("fsam",), rivals=("foreach", "authors"))),
    (60, _training_steps("fsam", "eigensam")),
)


class Target(NamedTuple):
    """What must be reached, what was measured (None: it was not), and whether that is enough."""

    what: str
    measured: str | None
    met: bool | None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path, help="folder for gpu.json and gpu.md")
    parser.add_argument("--seconds", type=float, default=400, help="about how long it may take (default 400)")
    parser.add_argument("--note", action="append", default=[], help="a line for gpu.md, such as how the tests ended")
    options = parser.parse_args(arguments)
    device = os.environ.get("FASTSAM_BENCH_DEVICE", "cuda")
    if device == "cpu":
        options.note.insert(0, "A stand-in: tiny sizes on a CPU, timed as a GPU is. No number here means anything.")
    elif not torch.cuda.is_available():
        parser.error("torch finds no GPU; FASTSAM_BENCH_DEVICE=cpu tries every line without one")
    options.output.mkdir(parents=True, exist_ok=True)

    def write(result: dict[str, Any]) -> None:
        result["notes"] = options.note
        _replace(options.output / "gpu.json", json.dumps(result, indent=1) + "\n")
        _replace(options.output / "gpu.md", report(result))

    result = measure(device, options.seconds, write)
    print(report(result))
    failed = list(failures(result))
    print("\n".join(failed))
    return 1 if failed else 0


def measure(device: str, seconds: float, write) -> dict[str, Any]:
    """All sections, each within its own seconds and what is left of the whole."""
    result: dict[str, Any] | None = None
    spent = 0.0
    for most, section in SECTIONS:
        seconds_left = max(0.0, seconds - spent)
        plan = dataclasses.replace(section, device=device, rounds=15, seconds=min(most, seconds_left), keep_going=True)
        if device == "cpu":
            plan = dataclasses.replace(plan, quick=True, queued=True, rounds=2)
        result = run(plan, lambda what, done: print(what, flush=True), write, result)
        spent = result["seconds"]
    write(result)
    return result


def failures(result: dict[str, Any]) -> Iterator[str]:
    """What raised, a line each; the tables name it, too."""
    for row in (*result["optimizer"], *result["training"]):
        if row["ms"] is None and row["note"].startswith(FAILED):
            yield f"{row['model']} {row['method']} {row['dtype']} by {row['implementation']} {row['note']}"
    for each in result["left_out"]:
        if each["why"].startswith(FAILED):
            yield f"{each['what']} {each['why']}"


def report(result: dict[str, Any]) -> str:
    """The notes, the targets as a table, and the report's own tables."""
    lines = ["| must reach | measured | |", "| --- | --- | --- |"]
    for target in targets(result):
        verdict = {True: "met", False: "**missed**", None: "–"}[target.met if result["machine"].get("gpu") else None]
        lines.append(f"| {target.what} | {target.measured or 'not measured'} | {verdict} |")
    title, rest = markdown(result).split("\n\n", 1)
    return "\n\n".join([title, *result.get("notes", []), "\n".join(lines), rest])


def targets(result: dict[str, Any]) -> Iterator[Target]:
    for model in LARGE:
        for dtype in ("fp32", "bf16"):
            rows = _optimizer(result, model=model, dtype=dtype, implementation="fastsam")
            shares = [(row["share"], row["method"]) for row in rows if row["share"] is not None]
            worst, missing = min(shares, default=(None,))[0], set(METHODS) - {method for _, method in shares}
            what = f"{model} {dtype}: {LEAST_SHARE:.0%} of the copy bandwidth, every method"
            target = _target(what, worst, LEAST_SHARE)
            if shares and missing:
                measured = f"{target.measured}, without {', '.join(METHODS[method] for method in sorted(missing))}"
                target = target._replace(measured=measured, met=None if target.met else False)
            yield target
    for rival, model, least in (
        ("foreach", "vit-b16", LEAST_OVER_FOREACH),
        ("compiled", "vit-b16", 1.0),
        ("authors", "resnet18", LEAST_OVER_LOOP),
    ):
        for method in METHODS:
            rows = _optimizer(result, model=model, dtype="fp32", method=method, implementation=rival)
            times = next((row["times_fastsam"] for row in rows), None)
            what = f"{least:g} times faster than {rival}" if least > 1 else f"faster than {rival}"
            yield _target(f"{model} {METHODS[method]}: {what}", times, least, "{:.2f}×")
    for model in TRAINED:
        row = _training(result, model, 128, "fastsam")
        steps = row["times_plain"] if row else None
        met = None if steps is None else steps <= MOST_PLAIN_STEPS
        what = f"{model} batch 128: a SAM step is at most {MOST_PLAIN_STEPS} plain steps"
        yield Target(what, None if steps is None else f"{steps:.3f}", met)
    for model in TRAINED:
        graph, foreach = _training(result, model, 8, "fastsam-graph"), _training(result, model, 8, "foreach")
        times = foreach["ms"] / graph["ms"] if graph and foreach else None
        what = f"{model} batch 8: the graph {LEAST_GRAPH_OVER_FOREACH} times faster than foreach SAM"
        yield _target(what, times, LEAST_GRAPH_OVER_FOREACH, "{:.2f}×")


def _target(what: str, value: float | None, least: float, form: str = "{:.1%}") -> Target:
    return Target(what, None, None) if value is None else Target(what, form.format(value), value >= least)


def _optimizer(result: dict[str, Any], **wanted: str) -> Iterator[dict[str, Any]]:
    for row in result["optimizer"]:
        if row["base"] == "sgd" and row["ms"] is not None and all(row[key] == wanted[key] for key in wanted):
            yield row


def _training(result: dict[str, Any], model: str, batch: int, name: str) -> dict[str, Any] | None:
    for row in result["training"]:
        if (row["model"], row["batch"], row["method"], row["implementation"]) == (model, batch, "sam", name):
            return row if row["ms"] is not None else None
    return None


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".new")
    unfinished.write_text(text)
    os.replace(unfinished, path)


if __name__ == "__main__":
    assert set(PARTS) >= {part for _, plan in SECTIONS for part in plan.parts}
    raise SystemExit(main())
