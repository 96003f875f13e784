"""What fastsam must reach on a GPU, and whether a result of ``benchmarks/gpu.py`` does.

What bytes allow decides: at the same bandwidth a step of SGD is as much faster than ``foreach`` as it moves fewer
bytes. Bytes a parameter in float32, those of ``foreach`` on a GPU counted from its operations:

| | fastsam | foreach | at the same bandwidth |
|---|---|---|---|
| SAM | 44 | 84 | 1.91 |
| F-SAM | 56 | 108 | 1.93 |
| Eigen-SAM | 52 | 112 | 2.15, and a dot product for each tensor |

``authors`` launches a kernel for every operation on every tensor: there the host decides, not the bytes.

A whole step of Momentum-SAM has one forward and one backward pass, as a plain step of SGD with momentum. Over that it
moves 44 bytes a parameter for 20: gram of the momentum 4, climb 16, guard 4, descend 20.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from fastsam.commands.bench.bandwidth import bytes_per_parameter
from fastsam.commands.bench.settings import METHODS
from fastsam.commands.bench.training_step import GRAPHS

LARGE = ("vit-b16", "vit-l16", "gpt-1.3b")
TRAINED = ("vit-b16", "resnet18")
OURS = ("fastsam", "fastsam-triton")  # the first of them that was measured is judged

LEAST_SHARE = {"fp32": 0.9, "bf16": 0.85}
#: foreach over SGD with momentum and weight decay: norm 4, backup 8, scale 8, add 12, restore 8, SGD 44; F-SAM besides
#: d = g - sigma m 12 and the average 12; Eigen-SAM besides <g,v> 8 and v, scaled and added, 20.
FOREACH_BYTES = {"sam": 84, "fsam": 108, "eigensam": 112}
LEAST_OVER_FOREACH = {"sam": 1.8, "fsam": 2.0, "eigensam": 2.5}
JUDGED = tuple(LEAST_OVER_FOREACH)  # whose optimizer steps are measured; Momentum-SAM's kernels are SAM's
MOST_COMPILED_AHEAD = 1.05
LEAST_OVER_LOOP = 10.0
MOST_PLAIN_STEPS = {"sam": 2.05, "momentumsam": 1.06}
LEAST_GRAPH_OVER_FOREACH = 1.5
#: Of a plain step of SGD with momentum: g, w and momentum read, the last two written.
PLAIN_BYTES = 20


class Target(NamedTuple):
    """What must be reached, what was measured (None: it was not), and whether that is enough."""

    what: str
    measured: str | None
    met: bool | None


def targets(result: dict[str, Any]) -> Iterator[Target]:
    for dtype, least in LEAST_SHARE.items():
        for model in LARGE:
            yield _bandwidth(result, model, dtype, least)
    for method, least in LEAST_OVER_FOREACH.items():
        moved = f"{bytes_per_parameter(method, 'sgd'):g} bytes a parameter against {FOREACH_BYTES[method]}"
        what = f"vit-b16 {METHODS[method]}: {least:g} times faster than foreach ({moved})"
        yield _at_least(what, _times(result, "vit-b16", method, "foreach"), least, "{:.2f}×")
    yield _compiled(result)
    for method in JUDGED:
        what = f"resnet18 {METHODS[method]}: {LEAST_OVER_LOOP:g} times faster than authors"
        yield _at_least(what, _times(result, "resnet18", method, "authors"), LEAST_OVER_LOOP, "{:.2f}×")
    for method, most in MOST_PLAIN_STEPS.items():
        for model in TRAINED:
            yield _plain_steps(result, model, method, most)
    for model in TRAINED:
        foreach = _training(result, model, 8, "sam", "foreach")
        graph = next(filter(None, (_training(result, model, 8, "sam", GRAPHS[name]) for name in OURS)), None)
        times = foreach["ms"] / graph["ms"] if graph and foreach else None
        what = f"{model} batch 8: the graph {LEAST_GRAPH_OVER_FOREACH} times faster than foreach SAM"
        yield _at_least(what, times, LEAST_GRAPH_OVER_FOREACH, "{:.2f}×")


def _bandwidth(result: dict[str, Any], model: str, dtype: str, least: float) -> Target:
    """The method that is furthest from the bandwidth of a copy; no verdict where one is missing and the rest is met."""
    rows = next(filter(None, (list(_optimizer(result, model, dtype, name)) for name in OURS)), [])
    shares = {row["method"]: row["share"] for row in rows if row["share"] is not None}
    target = _at_least(
        f"{model} {dtype}: {least:.0%} of the copy bandwidth, every method", min(shares.values(), default=None), least
    )
    missing = sorted(set(JUDGED) - set(shares))
    if shares and missing:
        measured = f"{target.measured}, without {', '.join(METHODS[method] for method in missing)}"
        target = target._replace(measured=measured, met=None if target.met else False)
    return target


def _plain_steps(result: dict[str, Any], model: str, method: str, most: float) -> Target:
    row = next(filter(None, (_training(result, model, 128, method, name) for name in OURS)), None)
    steps = row["times_plain"] if row else None
    moved = f"{bytes_per_parameter(method, 'sgd'):g} bytes a parameter against {PLAIN_BYTES}"
    what = f"{model} batch 128: a {METHODS[method]} step is at most {most} plain steps ({moved})"
    return Target(what, None if steps is None else f"{steps:.3f}", None if steps is None else steps <= most)


def _compiled(result: dict[str, Any]) -> Target:
    """The compiled rival that is fastest beside fastsam."""
    measured = {method: _times(result, "vit-b16", method, "compiled") for method in JUDGED}
    method = min((m for m, times in measured.items() if times), key=measured.get, default=None)
    what = f"vit-b16: no compiled rival more than {MOST_COMPILED_AHEAD} times faster than fastsam"
    if method is None:
        return Target(what, None, None)
    ahead = 1 / measured[method]
    return Target(what, f"{METHODS[method]}: {ahead:.2f}×", ahead <= MOST_COMPILED_AHEAD)


def _at_least(what: str, value: float | None, least: float, form: str = "{:.1%}") -> Target:
    return Target(what, None, None) if value is None else Target(what, form.format(value), value >= least)


def _optimizer(result: dict[str, Any], model: str, dtype: str, name: str) -> Iterator[dict[str, Any]]:
    for row in result["optimizer"]:
        wanted = (row["model"], row["base"], row["dtype"], row["implementation"])
        if wanted == (model, "sgd", dtype, name) and row["ms"] is not None:
            yield row


def _times(result: dict[str, Any], model: str, method: str, rival: str) -> float | None:
    rows = _optimizer(result, model, "fp32", rival)
    return next((row["times_fastsam"] for row in rows if row["method"] == method), None)


def _training(result: dict[str, Any], model: str, batch: int, method: str, name: str) -> dict[str, Any] | None:
    for row in result["training"]:
        if (row["model"], row["batch"], row["method"], row["implementation"]) == (model, batch, method, name):
            return row if row["ms"] is not None else None
    return None
