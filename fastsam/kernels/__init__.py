"""The three passes over memory, in every backend under the same names, and how a backend is chosen.

A backend is a module with five functions over a :class:`~fastsam.flat.FlatSpace`:

=====================================  ==========================================================================
``gram(space, ascent)``                the sums <d,d>, <d,v>, <v,v> as a float64 tensor on the space's device
``climb(space, ascent, sums)``         back up w, mark it climbed, write w + e and the average
``descend_sgd(space, descent, sums)``  restore w and apply torch.optim.SGD's update in the same pass
``descend_adam(space, descent, sums)``  the same with torch.optim.Adam's or AdamW's
``restore(space)``                     write the backup back to every climbed weight
=====================================  ==========================================================================

``descend`` gets the sums of the second gradient, not finite if the first pass's (``Ascent.met``) were not.
Where ``sums`` is not finite, ``climb`` only backs up and ``descend`` only restores: a step that met a NaN or an
infinity changes nothing. ``DECIDES_ON_HOST`` says whether the host waits for the sums to see that; a backend that
decides on the device is never waited for. ``kernels/torch.py`` is the specification the others are tested against.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

#: Every backend, the fastest first. ``auto`` takes the first that is available and serves the device.
NAMES = ("cuda", "triton", "cpu", "torch")


@dataclass
class Ascent:
    """What the first pass needs to know of a method, for one space."""

    groups: Sequence[dict]
    coefficients: Callable[[float, float, float, dict], tuple[float, float]] | None = None
    ema: Tensor | None = None  # m, flat: the direction is d = g - sigma m
    ema_next: Tensor | None = None  # where lmbda m + (1 - lmbda) g goes
    ema_started: Sequence[bool] = ()  # parameters that m has met before; for the others d = g
    vector: Tensor | None = None  # v, flat
    weighted: bool = False  # adaptive groups count |w| d in <d,d>
    grad_scale: float | Tensor = 1.0  # gradients are multiplied by it as they are read
    met: Tensor | None = None  # an earlier pass's sums: where they are not finite, gram's are not


@dataclass
class Descent:
    """What the second pass needs to know of the base optimizer, for one space."""

    groups: Sequence[dict]
    state: dict[str, Tensor]  # the base optimizer's flat buffers by their names
    started: Sequence[bool]  # parameters that have base state already
    grad_scale: float | Tensor = 1.0  # gradients are multiplied by it as they are read, then clipped
    max_norm: float | None = None  # to this norm, where <g,g> is sums[0], or
    clip_value: float | None = None  # each to this magnitude
    ema: Tensor | None = None  # m and the one climb wrote: a backend that decides on the device copies
    ema_next: Tensor | None = None  # m over it where the step does not count


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
