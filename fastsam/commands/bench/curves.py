"""Cost of a step against the number of parameters and against the number of tensors, and the lines through them.

The sizes have the tensors of ViT-B/16, all scaled by one factor; the counts share 100,000 parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SIZES = tuple(round(10 ** (k / 2)) for k in range(10, 20))  # 1e5, 3.2e5, 1e6, ... 3.2e9
QUICK_SIZES = (1_000, 3_000, 10_000)
COUNTS = (1, 4, 16, 64, 256, 1024, 4096)
QUICK_COUNTS = (1, 16)
PARAMETERS_OF_COUNTS = 100_000


class Line(NamedTuple):
    """ms = fixed_ms + slope_ms * x, and the largest relative distance of a point from it."""

    fixed_ms: float
    slope_ms: float
    worst: float


def line_through(xs: Sequence[float], ms: Sequence[float]) -> Line:
    """The straight line of least relative squares: sum of ((fixed + slope x - ms) / ms)².

    Relative, because x runs over powers of ten: otherwise the largest alone would decide. Neither number is
    negative. Raises ``ValueError`` for fewer than two points.
    """
    if len(xs) < 2 or len(xs) != len(ms):
        raise ValueError(f"a line needs two points or more, not {len(xs)} and {len(ms)}")
    # Normal equations of (1 / ms, x / ms) against 1.
    a11 = sum(1 / m**2 for m in ms)
    a12 = sum(x / m**2 for x, m in zip(xs, ms, strict=True))
    a22 = sum(x * x / m**2 for x, m in zip(xs, ms, strict=True))
    b1 = sum(1 / m for m in ms)
    b2 = sum(x / m for x, m in zip(xs, ms, strict=True))
    determinant = a11 * a22 - a12 * a12
    fixed, slope = (b1 * a22 - b2 * a12) / determinant, (b2 * a11 - b1 * a12) / determinant
    if fixed < 0:
        fixed, slope = 0.0, b2 / a22
    elif slope < 0:
        fixed, slope = b1 / a11, 0.0
    worst = max(abs(fixed + slope * x - m) / m for x, m in zip(xs, ms, strict=True))
    return Line(fixed, slope, worst)
