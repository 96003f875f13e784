"""Gradients that a finished step left where they are, as torch's optimizers do."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def leave(params: Iterable[Tensor]) -> None:
    """Marks the gradients at hand as those of a finished step.

    The mark is on the tensor, so that every optimizer of the parameter knows it, and says how often the tensor had been
    written to: a backward pass that adds to it makes it somebody's again.
    """
    for p in params:
        if p.grad is not None:
            p.grad._left_by_step = p.grad._version  # type: ignore[attr-defined]


def is_left(gradient: Tensor) -> bool:
    """Whether a finished step left this gradient, and nobody has written to it since."""
    return getattr(gradient, "_left_by_step", None) == gradient._version
