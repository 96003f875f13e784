"""F-SAM's averages under m-sharpness, of which every process has its own.

With ``m_sharpness=True`` m averages the gradients of one process's part of the batches, so that d = g - sigma m
subtracts like from like, and m differs from process to process. A checkpoint of ``torch.distributed.checkpoint`` keeps
one copy of what every process has under the same name, so one of these for each parameter. Either they are made one
before it is written, or each is written beside it:

    average_momentum(optimizer)          # collective; the checkpoint can be loaded on any number of processes
    dcp.save(state, checkpoint_id=path)

    dcp.save({**state, "momentum": RankMomentum(optimizer)}, checkpoint_id=path)     # to go on exactly as before

    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, ...)
    dcp.load({"momentum": RankMomentum(optimizer)}, checkpoint_id=path)              # last, on as many processes
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from fastsam.distributed.shards import is_dtensor
from fastsam.optimizer import SharpnessAware


@torch.no_grad()
def average_momentum(optimizer: SharpnessAware) -> None:
    """Makes every process's m the mean of those that have one; every process has to call it.

    m then is the average of the gradients of whole batches, as without ``m_sharpness``. For each parameter it takes an
    all-reduce of its size, in its dtype. Raises as :class:`RankMomentum` does.
    """
    params = _averaged_parameters(optimizer)
    averages = [optimizer.state[p].get("momentum") if p in optimizer.state else None for p in params]
    device = params[0].device
    holders = torch.tensor([m is not None for m in averages], dtype=torch.float32, device=device)
    dist.all_reduce(holders)
    for p, m, n in zip(params, averages, holders.tolist(), strict=True):
        if n:
            total = torch.zeros_like(p) if m is None else m.clone()
            dist.all_reduce(total)
            optimizer.state[p]["momentum"] = total.div_(n)


class RankMomentum:
    """This process's m as an object that ``torch.distributed.checkpoint`` saves and loads (a ``Stateful``).

    The names of its entries hold the rank and the number of ranks. A checkpoint of another number of ranks has none of
    them: ``dcp.load`` then raises on every process, with a message that names :func:`average_momentum`. Load it
    after the optimizer's own state, which brings an m that is some process's.

    Raises ``TypeError`` for an optimizer without m, ``ValueError`` for sharded parameters, whose m every checkpoint has
    as a whole, ``RuntimeError`` without a process group, or if the optimizer's own state was not loaded before it.
    """

    def __init__(self, optimizer: SharpnessAware) -> None:
        self.params = _averaged_parameters(optimizer)
        self.optimizer = optimizer
        ranks = dist.get_world_size()
        # What DCP says of an entry that a checkpoint lacks is its name.
        self._entry = (
            f"m of rank {dist.get_rank()} of {ranks} (a checkpoint of another number than {ranks} has none: call "
            "fastsam.integrations.rank_state.average_momentum(optimizer) before saving, and load without RankMomentum)"
        )

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """m by the parameter's number in the groups; NaN for one that has met no gradient on this process."""
        state = self.optimizer.state
        found = [state[p].get("momentum") if p in state else None for p in self.params]
        return {
            self._entry: {
                str(i): torch.full_like(p, math.nan) if m is None else m.detach().clone()
                for i, (p, m) in enumerate(zip(self.params, found, strict=True))
            }
        }

    def load_state_dict(self, state_dict: dict[str, dict[str, Tensor]]) -> None:
        state = self.optimizer.state
        if self.optimizer.two_pass.state_is_blank or not state:
            raise RuntimeError(
                "RankMomentum was loaded before the optimizer's own state, which would overwrite it: "
                "call set_state_dict first, and dcp.load({'momentum': RankMomentum(optimizer)}) after it"
            )
        for p, m in zip(self.params, state_dict[self._entry].values(), strict=True):
            if bool(m.isnan().all()):
                state[p].pop("momentum", None)
            else:
                state[p]["momentum"] = m


def _averaged_parameters(optimizer: SharpnessAware) -> list[Tensor]:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("an average for each rank needs torch.distributed: call init_process_group() first")
    if not optimizer.recipe.averages:
        raise TypeError(f"{type(optimizer).__name__} keeps no average of gradients: only FriendlySAM has an m")
    params = [p for group in optimizer.param_groups if group["perturb"] for p in group["params"]]
    if any(map(is_dtensor, params)):
        raise ValueError("the parameters are DTensors: their m is sharded like them, and DCP saves all of it")
    return params
