"""The moving average m that F-SAM subtracts: where it lies from the climb to the end of a step.

A climb reads m in one flat buffer and writes the next m into another; the two change places when the step counts. While
micro-batches accumulate, m of the step in progress lies in a third one. In the state it is ``state[p]["momentum"]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsam.engine.spaces import Spaces
from fastsam.flat.space import FlatSpace
from fastsam.kernels import Ascent
from fastsam.loop.amp import Scaling


class Accumulated:
    """What micro-batches leave behind until the update, besides the gradients themselves.

    ``met`` are the Gram sums of every first pass, added up: not finite if one of them was not; None without any.
    ``averages`` says, for each space, which parameters the average in progress has met.
    """

    def __init__(self, spaces: Spaces, scaling: Scaling, met: Tensor | None) -> None:
        self.spaces = list(spaces)
        self.scaling = scaling
        self.met = met
        self.averages: dict[int, list[bool]] = {}


def prepare(space: FlatSpace, ascent: Ascent, accumulated: Accumulated | None) -> None:
    """Tells a climb where m is, which parameters it has met, and where the next m goes."""
    ascent.ema_started = space.adopt("momentum", space.vector("momentum"))
    ascent.ema = space.vector("momentum").flat
    if accumulated is not None:
        ascent.ema_started = accumulated.averages[accumulated.spaces.index(space)]
        ascent.ema = space.vector("momentum_accumulated").flat
    ascent.ema_next = space.vector("momentum_next").flat


def keep(spaces: Spaces, state: dict, sums: Tensor, accumulated: Accumulated | None) -> None:
    """The averages written by the climbs of a step that counts, by its ``sums``, become the ``state``."""
    for i, space in enumerate(spaces):
        if not space.perturbed:
            continue
        if accumulated is None:
            kept = space.climbed
            if not all(kept):
                kept = _carry_over(space, "momentum", _met(space))
        else:
            space.swap("momentum_accumulated", "momentum_next")
            kept = accumulated.averages[i]
            if not spaces.decide_on_host:
                _abandon(sums, space, kept)
        publish(spaces, state, space, kept)


def publish(spaces: Spaces, state: dict, space: FlatSpace, kept: list[bool]) -> None:
    """m of the parameters that ``kept`` marks is from now on the one that the climb wrote."""
    spaces.publish(space, state, "momentum", space.vector("momentum_next"), kept)
    space.swap("momentum", "momentum_next")


def keep_micro_batch(kept: Accumulated, so_far: Accumulated | None) -> None:
    """After the climb of a micro-batch: its m waits for the update."""
    for i, space in enumerate(kept.spaces):
        if space.perturbed:
            before = "momentum" if so_far is None else "momentum_accumulated"
            kept.averages[i] = _carry_over(space, before, _met(space) if so_far is None else so_far.averages[i])
            space.vector("momentum_accumulated")
            space.swap("momentum_next", "momentum_accumulated")


def _met(space: FlatSpace) -> list[bool]:
    """Which parameters the average has met."""
    return [entry is not None and "momentum" in entry for entry in space.states]


def _carry_over(space: FlatSpace, before: str, started: list[bool]) -> list[bool]:
    """Parameters without a gradient in this pass keep the average they had; says which have one now."""
    old, new = space.vector(before), space.vector("momentum_next")
    for i, (had, climbed) in enumerate(zip(started, space.climbed, strict=True)):
        if had and not climbed:
            new.views[i].copy_(old.views[i])
    return [had or climbed for had, climbed in zip(started, space.climbed, strict=True)]


def _abandon(sums: Tensor, space: FlatSpace, kept: list[bool]) -> None:
    """What descend's kernels do where the step does not count, for parameters without a gradient there."""
    old, new, finite = space.vector("momentum"), space.vector("momentum_next"), sums.isfinite().all()
    for i, g in enumerate(space.gradients):
        if kept[i] and g is None:
            new.views[i].copy_(torch.where(finite.to(space.device), new.views[i], old.views[i]))
