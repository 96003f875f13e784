"""What the launches of a captured step are given, and everything in which two steps may differ."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from torch import Tensor

from fastsam.engine.base_rules import Rule
from fastsam.engine.step import Step
from fastsam.flat.space import FlatSpace
from fastsam.graphs.second_side import is_number
from fastsam.kernels import Ascent, Descent, Mixture
from fastsam.kernels.device import Recording
from fastsam.kernels.launches import closed_form
from fastsam.optimizer import SharpnessAware


def _nothing_captured() -> None:
    raise AssertionError("a graph is replayed once it is captured")


@dataclass
class Graph:
    """One captured step, and what the host has to know of it."""

    recordings: list[Recording]  # the tables that its launches read
    replay: Callable[[], None] = _nothing_captured
    climbed: list[list[bool]] = field(default_factory=list)  # by space: parameters with a gradient in the first pass
    updated: list[list[bool]] = field(default_factory=list)  # and in the second
    sums: Tensor | None = None  # of the second pass: whether the step counts


@dataclass
class Part:
    """What the launches for one space are given."""

    space: FlatSpace
    rule: Rule
    ascent: Ascent | None
    descent: Descent
    buffers: dict
    along_momentum: bool  # of the parameters that have one


def in_the_graph(*_: object) -> Mixture:
    raise AssertionError("the second side is computed within the graph")


def without_momentum(plan: list[Part]) -> bool:
    """Whether this is Momentum-SAM's first step."""
    return all(part.along_momentum and not any(part.descent.started) for part in plan)


def key(step: Step, plan: list[Part]) -> tuple:
    """Everything in which two steps may differ, and tables on the device do not."""
    found: list[Hashable] = [step.stands_still()]
    for part in plan:
        ascent, descent = part.ascent, part.descent
        buffers = [descent.ema, descent.ema_next, *descent.state.values()]
        found.append(ascent is not None)
        if ascent is not None:
            buffers += [ascent.ema, ascent.ema_next, ascent.vector]
            found.append(ascent.weighted and any(g["adaptive"] for g in ascent.groups))
        if part.along_momentum:
            found.append(tuple(descent.started))
        found += [part.rule.kernel, *descent.state, *(0 if b is None else b.data_ptr() for b in buffers)]
    return tuple(found)


def own_numbers(optimizer: SharpnessAware) -> list[tuple]:
    """The numbers that a method's own coefficients may have read, and how its second side reads those that it does."""
    names = optimizer.recipe.descends_by or ()
    whole = not closed_form(Ascent((), optimizer.recipe.climb))
    return [
        (
            {k: v for k, v in g.items() if whole and isinstance(v, (int, float)) and k != "steps"},
            [is_number(g.get(k)) or g.get(k) for k in names if isinstance(g.get(k), (int, float))],
        )
        for g in optimizer.two_pass.groups()
    ]
