"""The learning rate over a run: a linear warm-up, then half a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable


def warmup_then_cosine(warmup: int, steps: int) -> Callable[[int], float]:
    """Factor on lr: rises linearly to 1 within ``warmup`` steps, then falls along half a cosine to 0."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor
