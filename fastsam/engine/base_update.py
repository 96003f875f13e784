"""The update of a base optimizer by its own ``step()``, and how it sees a state that it shares with a method."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastsam.engine.second_side import SecondSide
from fastsam.engine.spaces import Spaces
from fastsam.kernels import Descent
from fastsam.kernels.torch import mixtures_of, second_side_of

_UNTOUCHED = dict(grad_scale=1.0, max_norm=None, clip_value=None)


def update_at_weights(
    base: torch.optim.Optimizer,
    spaces: Spaces,
    names: Sequence[str],
    sums: Sequence[float],
    options: dict,
    second_side: SecondSide | None,
    at_weights: Callable[[], None] | None,
) -> None:
    """The update of a step that counts, by its second pass's ``sums``, where there is no fused one.

    ``options`` say how gradients are scaled and clipped; ``names`` are those of the method's entries in the state.
    """
    direct = []
    if options != _UNTOUCHED or second_side is not None:
        for space in spaces:
            descent = Descent(base.param_groups, {}, (), **options)
            if second_side is not None:
                descent.groups = second_side.groups
                second_side.enter(descent, space)
            mixtures = mixtures_of(descent, sums)
            for i, g in enumerate(space.gradients):
                if g is not None:
                    h, beside = second_side_of(space, descent, i, mixtures, sums[0])
                    g.copy_(h)
                    direct.append((space.params[i], beside))
    if at_weights is not None:
        at_weights()
    with own_state_hidden(base, names):
        base.step()
    for p, beside in direct:
        if beside is not None:
            p.sub_(beside)
    spaces.find_states(base.state)  # of which that may have added some


@contextlib.contextmanager
def own_state_hidden(base: torch.optim.Optimizer, names: Sequence[str]) -> Iterator[None]:
    """Lets the base optimizer see its own state alone.

    Optimizers take a parameter whose state is not empty for one they have met. An entry of theirs that is called
    as one of the method's is called ``base_<name>`` outside.
    """
    hidden = []
    for p, state in entries(base.state):
        for name in names:
            if name in state:
                hidden.append((p, name, state.pop(name)))
            if f"base_{name}" in state:
                state[name] = state.pop(f"base_{name}")
    try:
        yield
    finally:
        for _, state in entries(base.state):
            for name in names:
                if name in state:
                    state[f"base_{name}"] = state.pop(name)
        for p, name, value in hidden:
            base.state[p][name] = value


def entries(state: dict) -> list[tuple[Tensor, dict]]:
    """Each parameter's state; what base optimizers keep beside it under a name is none of ours."""
    return [(p, entry) for p, entry in state.items() if isinstance(p, Tensor)]
