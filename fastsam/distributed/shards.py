"""A parameter spread over processes (a DTensor), and the part of it that this process holds."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from fastsam.support.checks import describe

if TYPE_CHECKING:  # whoever does without DTensor does not pay for its import
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(p: Tensor) -> TypeIs[DTensor]:
    module = sys.modules.get("torch.distributed.tensor")  # whoever has not imported it has no DTensor
    return module is not None and isinstance(p, module.DTensor)


def local(p: Tensor) -> Tensor:
    """This process's part of p, in p's own memory; p itself if it is no DTensor."""
    # to_local() would make a new tensor, through the dispatcher, for each parameter of each pass.
    return p._local_tensor if is_dtensor(p) else p


def placed_like(p: Tensor, part: Tensor) -> Tensor:
    """The tensor of p's shape and placement of which ``part`` is the local part; ``part`` if p is no DTensor."""
    if not is_dtensor(p):
        return part
    return type(p).from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def distributed_like(p: Tensor, whole: Tensor) -> Tensor:
    """``whole``, which every process has, placed as p is; no communication."""
    if not is_dtensor(p) or is_dtensor(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def local_gradient(p: Tensor) -> Tensor | None:
    """This process's part of ``p.grad``, which is first brought to p's placement if it has another."""
    g = p.grad
    if g is None or not is_dtensor(p):
        return g
    if not is_dtensor(g):
        raise TypeError(
            f"the gradient of {describe(p)} is a plain tensor, the parameter a DTensor: "
            "let backward() make it, or place it with distribute_tensor"
        )
    if g.placements != p.placements:
        g = p.grad = g.redistribute(placements=p.placements)
    part = g._local_tensor
    return part.wait() if hasattr(part, "wait") else part  # a collective still under way


def first_element(p: Tensor) -> int:
    """The number, within the whole of p, of the first element of this process's part, where that is a stretch of rows.

    0 for a part of another form, whose elements are numbered by themselves.
    """
    if not is_dtensor(p) or not p.numel():
        return 0
    sharded = [i for i, placement in enumerate(p.placements) if placement.is_shard()]
    if len(sharded) != 1 or not p.placements[sharded[0]].is_shard(0):
        return 0
    size, rank = p.device_mesh.size(sharded[0]), p.device_mesh.get_local_rank(sharded[0])
    rows = p.shape[0]
    return min(rank * -(-rows // size), rows) * (p.numel() // rows)


def shard_groups(p: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which p's elements are spread: one for each mesh dimension that shards it."""
    if not is_dtensor(p):
        return ()
    mesh = p.device_mesh
    return tuple(mesh.get_group(i) for i, placement in enumerate(p.placements) if not placement.is_replicate())
