"""How parameters lie in memory: whether each is dense, which of them are neighbours, which overlap."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from fastsam.flat.runs import place
from fastsam.support.checks import describe


def check_dense(p: Tensor) -> None:
    """Non-overlapping and dense: some order of the dimensions makes it contiguous."""
    if p.is_meta:
        raise ValueError(f"{describe(p)} is on the meta device and has no memory: build the optimizer after to_empty()")
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(p.stride(), p.shape, strict=True) if n != 1):
        if p.numel() and stride != expected:
            raise ValueError(
                f"{describe(p)} has strides {p.stride()}, which leave gaps or overlap; "
                "make it dense first: p.data = p.data.contiguous()"
            )
        expected *= size


def check_separate(params: Sequence[Tensor]) -> None:
    """Raises ``ValueError`` for two that share memory."""
    joined([params[i] for i in memory_order(params)])


def memory_order(params: Sequence[Tensor]) -> list[int]:
    """Indices of ``params``, those of one memory (a storage, or a run) side by side in the order they lie there.

    Never by address: that would let the allocator choose the order of summation.
    """
    # Parameters without elements lie nowhere, whatever the address they give.
    places = [place(p) if p.numel() else (-i - 1, 0) for i, p in enumerate(params)]
    first: dict[Hashable, int] = {}
    for i, (memory, _) in enumerate(places):
        first.setdefault(memory, i)
    return sorted(range(len(params)), key=lambda i: (first[places[i][0]], places[i][1], i))


def joined(params: Sequence[Tensor]) -> list[bool]:
    """For each parameter whether it begins where the one before it ends, in the same memory."""
    found = [False] * len(params)
    for i in range(1, len(params)):
        before, p = params[i - 1], params[i]
        if not (p.numel() and before.numel()):
            continue
        (memory_before, begin_before), (memory, begin) = place(before), place(p)
        if memory != memory_before:
            continue
        gap = begin - begin_before - before.numel() * before.element_size()
        if gap < 0:
            raise ValueError(
                f"{describe(before)} and {describe(p)} share memory but are two Parameters; "
                "tie weights by using one Parameter in both places"
            )
        found[i] = gap == 0
    return found
