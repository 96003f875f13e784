"""Gradients that are nobody's here: neither an optimizer's own nor what a finished step left."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastsam.distributed.shards import local
from fastsam.flat.flatten import is_cleared
from fastsam.flat.left import is_left


def any_foreign(params: Iterable[Tensor]) -> bool:
    """Whether there are gradients, other than zeros and those that a finished step left."""
    for p in params:
        g = p.grad
        if g is None or is_cleared(p) or is_left(g):
            continue
        if g.layout != torch.strided or bool(local(g).any()):
            return True
    return False
