"""The three passes over memory, in every backend under the same names, and how a backend is chosen.

A backend is a module with five functions over a :class:`~fastsam.flat.space.FlatSpace`:

=====================================  ==========================================================================
``gram(space, ascent)``                the sums <d,d>, <d,v>, <v,v> as a float64 tensor on the space's device
``climb(space, ascent, sums)``         back up w, mark it climbed, write w + e and the average
``descend_sgd(space, descent, sums)``  restore w and apply torch.optim.SGD's update in the same pass
``descend_adam(space, descent, sums)``  the same with torch.optim.Adam's or AdamW's
``restore(space)``                     write the backup back to every climbed weight
=====================================  ==========================================================================

``descend`` gets the sums of the second gradient, not finite if the first pass's (``Ascent.met``) were not.
Where ``sums`` is not finite, ``climb`` only backs up and ``descend`` only restores: a step that met a NaN or an
infinity changes nothing.
``DECIDES_ON_HOST`` says whether the host waits for the sums to see that; a backend that decides on the device is
never waited for. ``kernels/torch.py`` is the specification the others are tested against.

m, v and s are of the space's ``state_dtype``; the backup and the base optimizer's state are of the weights' dtype.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

#: Every backend, the fastest first. ``auto`` takes the first that is available and serves the device.
NAMES = ("cuda", "triton", "cpu", "torch")


#: A number of the host, or a 0-dimensional tensor on a device, whose value nobody waits for.
Scalar = float | Tensor


class Mixture(NamedTuple):
    """What one group's second side does with the second gradient g and the stored vector s; without one, s is 0.

    Numbers, or 0-dimensional tensors on the device.
    """

    gradient: Scalar  # h = gradient g + stored s goes to the base optimizer's rule in the place of g
    stored: Scalar
    direct_gradient: Scalar = 0.0  # w <- w - (direct_gradient g + direct_stored s), after the base optimizer's update
    direct_stored: Scalar = 0.0
    keep_gradient: Scalar = 0.0  # s_next <- keep_gradient g + keep_stored s, where the descent has an s_next
    keep_stored: Scalar = 0.0


@dataclass
class Ascent:
    """What the first pass needs to know of a method, for one space."""

    groups: Sequence[dict]
    coefficients: Callable[[Scalar, Scalar, Scalar, dict], tuple[Scalar, Scalar]] | None = None
    ema: Tensor | None = None  # m, flat: the direction is d = g - sigma m
    ema_next: Tensor | None = None  # where lmbda m + (1 - lmbda) g goes
    ema_started: Sequence[bool] = ()  # parameters that m has met before; for the others d = g
    vector: Tensor | None = None  # v, flat
    weighted: bool = False  # adaptive groups count |w| d in <d,d>
    grad_scale: Scalar = 1.0  # gradients are multiplied by it as they are read
    met: Tensor | None = None  # an earlier pass's sums: where they are not finite, gram's are not
    # ema_next without an ema, or before ema_started, takes g itself: a first gradient that is kept for the second side.


@dataclass
class Descent:
    """What the second pass needs to know of the base optimizer, for one space.

    Gradients are scaled as they are read; then s_next is written, h is formed from g and s, h is clipped and goes to
    the base optimizer's rule, and last comes what is subtracted from w directly.
    """

    groups: Sequence[dict]
    state: dict[str, Tensor]  # the base optimizer's flat buffers by their names
    started: Sequence[bool]  # parameters that have base state already
    grad_scale: Scalar = 1.0  # gradients are multiplied by it as they are read, then clipped
    max_norm: float | None = None  # to this norm, where <g,g> is sums[0] (not with mixtures, which know of it), or
    clip_value: float | None = None  # each to this magnitude
    ema: Tensor | None = None  # m and the one climb wrote: a backend that decides on the device copies
    ema_next: Tensor | None = None  # m over it where the step does not count
    stored: Tensor | None = None  # s, flat
    stored_next: Tensor | None = None  # another flat buffer; not written where the step does not count
    rounding: tuple[int, int] | None = None  # the keys by which bfloat16 weights are rounded up or down at random
    mixtures: Callable[[Sequence[Scalar], dict], Mixture] | None = (
        None  # of <g,g>, <g,s>, <s,s> and a group; without it h = g
    )


def backends() -> dict[str, str]:
    """Every backend by name, with ``"available"`` or the reason why it is not.

    >>> fastsam.backends()["torch"]
    'available'
    """
    return {name: reason or "available" for name, reason in ((n, _module(n).unavailable()) for n in NAMES)}


def check(name: str) -> None:
    """Raises ``ValueError`` for an unknown backend, ``RuntimeError`` for one that is not available."""
    if name == "auto":
        return
    if name not in NAMES:
        near = difflib.get_close_matches(str(name).lower(), (*NAMES, "auto"), 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"backend={name!r} is unknown: {hint}choose one of {', '.join(('auto', *NAMES))}")
    reason = _module(name).unavailable()
    if reason:
        raise RuntimeError(f"backend={name!r} is not available: {reason}")


def choose(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend for tensors of one device and dtype; ``auto`` is the fastest that serves them.

    Raises ``RuntimeError`` if the named backend, or under ``auto`` every one, does not serve that device and dtype.
    """
    reasons = {}
    for candidate in NAMES if name == "auto" else (name,):
        module = _module(candidate)
        reasons[candidate] = module.unavailable() or module.refuses(device, dtype)
        if reasons[candidate] is None:
            return module
    because = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
    raise RuntimeError(f"backend={name!r} cannot serve {dtype} parameters on {device}: {because}")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
