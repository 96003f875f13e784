"""Checks of hyper-parameters: each error names the parameter, its value and what it must be."""

from __future__ import annotations

from torch import Tensor


def describe(p: Tensor) -> str:
    return f"a parameter of shape {tuple(p.shape)}"


def at_least(low: float, name: str, value) -> None:
    """Raises ``ValueError`` unless ``value`` is a finite number >= ``low``."""
    if not (_number(name, value) >= low and value < float("inf")):
        raise ValueError(f"{name}={value!r} must be a finite number, at least {low}")


def in_range(low: float, high: float, name: str, value) -> None:
    """Raises ``ValueError`` unless ``low`` <= ``value`` < ``high``."""
    if not low <= _number(name, value) < high:
        raise ValueError(f"{name}={value!r} must be in [{low}, {high})")


def flag(name: str, value) -> None:
    """Raises ``ValueError`` unless ``value`` is True or False, or 1 or 0."""
    try:
        known = value in (True, False)
    except (RuntimeError, ValueError):  # tensors and arrays
        known = False
    if not known:
        raise ValueError(f"{name}={value!r} must be True or False")


def check_clipping(max_norm: float | None, clip_value: float | None) -> None:
    """Raises ``ValueError`` for gradients that are to be clipped in two ways, or by less than nothing."""
    if max_norm is not None and clip_value is not None:
        raise ValueError(f"max_norm={max_norm!r} and clip_value={clip_value!r}: clip by one of them")
    for name, value in (("max_norm", max_norm), ("clip_value", clip_value)):
        if value is not None:
            at_least(0, name, value)


def _number(name: str, value):
    try:
        bool(value < 0)  # numbers and 0-dimensional tensors compare; strings, lists and other tensors do not
    except (TypeError, RuntimeError, ValueError):
        raise ValueError(f"{name}={value!r} must be a number") from None
    return value


def check_real(p: Tensor) -> None:
    """Raises ``TypeError`` for a parameter that cannot be perturbed."""
    if not p.is_floating_point():
        raise TypeError(
            f"{describe(p)} has dtype {p.dtype}; only real floating-point parameters can be perturbed, "
            "leave it out of the groups"
        )
