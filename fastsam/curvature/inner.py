"""Inner products of vectors over the weights, which several processes may hold together.

A process holds its parts of the parameters. Those of its vector that count for it come first: a part that other
processes hold as well is counted by one of them. So <x, y> is the sum over all processes of the products of what
counts, one all-reduce of one number over each mesh dimension that shards any parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastsam.distributed.shards import local, shard_groups

_BLOCK = 1 << 18  # elements that a sum forms in the vectors' precision before it goes on in float64


class Inner:
    """The inner product of vectors of which the first ``counted`` elements (None: all) are summed over ``groups``.

    ``dimension`` is the number of elements over all processes, None for that of the vector at hand.
    """

    def __init__(
        self, counted: int | None = None, groups: Sequence[dist.ProcessGroup] = (), dimension: int | None = None
    ) -> None:
        self.counted, self.groups, self.dimension = counted, tuple(groups), dimension

    def dot(self, x: Tensor, y: Tensor) -> float:
        """<x, y>, in float64 from blocks summed in their own precision."""
        x, y = x[: self.counted], y[: self.counted]
        if x.numel() <= _BLOCK:
            return float(self._total(torch.dot(x, y).double()))
        blocks = zip(x.split(_BLOCK), y.split(_BLOCK), strict=True)
        return float(self._total(torch.stack([torch.dot(a, b) for a, b in blocks]).double().sum()))

    def norm(self, x: Tensor) -> float:
        """||x||"""
        return math.sqrt(self.dot(x, x))

    def distance(self, x: Tensor, y: Tensor, scale: float) -> float:
        """||x - scale y||, without a third vector."""
        blocks = zip(x[: self.counted].split(_BLOCK), y[: self.counted].split(_BLOCK), strict=True)
        squares = torch.stack([(a - scale * b).square().sum().double() for a, b in blocks])
        return math.sqrt(float(self._total(squares.sum())))

    def project(self, basis: Tensor, x: Tensor) -> Tensor:
        """<q, x> for every row q of ``basis``, in the vectors' dtype."""
        return self._total(torch.mv(basis[:, : self.counted], x[: self.counted]))

    def _total(self, sums: Tensor) -> Tensor:
        for group in self.groups:
            dist.all_reduce(sums, group=group)
        return sums


#: For vectors that one process holds whole.
LOCAL = Inner()


def counted_first(params: Sequence[Tensor]) -> tuple[list[Tensor], Inner]:
    """``params`` in the order of their parts in a vector, those that count here first, and the inner product."""
    groups = {p: shard_groups(p) for p in params}
    every = list(dict.fromkeys(group for own in groups.values() for group in own))
    if not every:
        return list(params), LOCAL
    # Where a parameter is not sharded over a group, its members hold the same: the first of them counts it.
    counts = {p: all(group in own or dist.get_rank(group) == 0 for group in every) for p, own in groups.items()}
    order = sorted(params, key=lambda p: not counts[p])
    counted = sum(local(p).numel() for p in order if counts[p])
    return order, Inner(counted, every, sum(p.numel() for p in params))
