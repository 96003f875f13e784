"""What the kernels are given in either pass over one flat space, and where what they wrote goes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsam.distributed.shards import local
from fastsam.engine import averages
from fastsam.engine.averages import Accumulated
from fastsam.engine.base_rules import Rule
from fastsam.engine.recipe import Group, Recipe
from fastsam.engine.second_side import SecondSide
from fastsam.engine.spaces import Spaces
from fastsam.flat.space import FlatSpace
from fastsam.kernels import Ascent, Descent

#: What torch's optimizers call their momentum in the state.
MOMENTA = ("momentum_buffer", "exp_avg")


def ascent(
    recipe: Recipe,
    space: FlatSpace,
    groups: list[Group],
    grad_scale: float | Tensor,
    accumulated: Accumulated | None,
    keeps_gradient: bool,
) -> Ascent:
    """What the climb over one space is given."""
    given = Ascent(groups, recipe.climb, weighted=recipe.weighted_norm, grad_scale=grad_scale)
    if recipe.averages:
        averages.prepare(space, given, accumulated)
    if keeps_gradient:
        given.ema_next = space.vector("gradient").flat
    if recipe.eigenvector and any(space.adopt("eigenvector", space.vector("eigenvector"))):
        given.vector = space.vector("eigenvector").flat
    return given


def descent(
    recipe: Recipe,
    base: torch.optim.Optimizer,
    space: FlatSpace,
    rule: Rule,
    options: dict,
    accumulated: Accumulated | None,
    second_side: SecondSide | None,
    keys: tuple[int, int] | None,
) -> tuple[Descent, dict]:
    """What the descent over one space is given, and the base optimizer's buffers there by their names.

    ``keys`` are those of stochastic rounding, or None.
    """
    groups = base.param_groups
    buffers = {name: space.step_counts() if name == "step" else space.buffer(name) for name in rule.state_names(groups)}
    started = [True] * len(space.params)
    for name, buffer in buffers.items():
        started = space.adopt(name, buffer)
    named = groups if second_side is None else second_side.groups
    given = Descent(rule.groups(named), {k: b.flat for k, b in buffers.items()}, started, **options)
    if space.dtype == torch.bfloat16:
        given.rounding = keys
    if recipe.averages and space.perturbed:
        latest = "momentum_next" if accumulated is None else "momentum_accumulated"
        given.ema, given.ema_next = space.vector("momentum").flat, space.vector(latest).flat
    if second_side is not None:
        second_side.enter(given, space)
    return given, buffers


def along_momentum(base: torch.optim.Optimizer, space: FlatSpace) -> None:
    """Has a climb go along the base optimizer's momentum, as far as it has any, in the place of a gradient."""
    for name in MOMENTA:
        if not any(s is not None and name in s for s in space.states):
            continue  # before a buffer is allocated that no base optimizer has use for
        found = space.buffer(name)
        started = space.adopt(name, found)
        if any(started):
            space.use_gradients([local(v) if s else None for v, s in zip(found.views, started, strict=True)])
            return
    space.use_gradients([None] * len(space.params))


def zero_missing(space: FlatSpace) -> None:
    """Before a climb that keeps its gradient: there is none of parameters that have none."""
    for view, g in zip(space.vector("gradient").views, space.gradients, strict=True):
        if g is None:
            view.zero_()


def keep_stored(recipe: Recipe, spaces: Spaces, base: torch.optim.Optimizer) -> None:
    """What the descents of a step that climbed wrote as s becomes the state."""
    assert recipe.stored is not None
    for space in spaces:
        if space.perturbed:
            written = [g is not None for g in space.gradients]
            spaces.publish(space, base.state, recipe.stored, space.vector(recipe.stored), written)


def add_up_gradients(kept: Accumulated, so_far: Accumulated | None) -> None:
    """The first gradient of a micro-batch is added to those of the micro-batches before it."""
    for space in kept.spaces:
        if space.perturbed:
            total = space.vector("gradient_total").flat
            if so_far is None:
                total.zero_()
            total.add_(space.vector("gradient").flat)


def publish(
    spaces: Spaces, base: torch.optim.Optimizer, space: FlatSpace, rule: Rule, buffers: dict, updated: list[bool]
) -> None:
    """What a fused update of the ``updated`` parameters wrote becomes the base optimizer's state."""
    kept = [rule.keeps(group) for group in base.param_groups]
    which = [u and kept[i] for u, i in zip(updated, space.groups, strict=True)]
    for name, buffer in buffers.items():
        spaces.publish(space, base.state, name, buffer, which)
