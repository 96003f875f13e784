r"""One optimizer's view of the other processes that train the same model.

A parameter may be a DTensor (FSDP2, tensor parallelism), of which this process holds a part. Kernels walk the local
parts; state is placed like the parameters; and every norm and dot product is a sum over the elements, each counted
once whatever the placement: the local sums are added up over the mesh dimensions that shard a parameter, and not over
those that replicate it. That is one all-reduce of 24 bytes for each such dimension, in the climb, and another in the
descent, which decides whether the step counts: a NaN in one shard must stop them all.

Under DistributedDataParallel gradients are reduced before an optimizer sees them, so nothing is added. With
``m_sharpness=True`` each process climbs along its own gradient, as in Foret et al. 2021, section 4.1: the first pass
runs under ``no_sync``, and 24 bytes agree on whether the step counts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsam.distributed.shards import is_dtensor, shard_groups
from fastsam.support.checks import describe


class Ranks:
    """What an optimizer knows of the other processes.

    Args:
        process_group: processes that hold different parameters of one model (pipeline stages): norms are theirs
            together.
        m_sharpness: every process climbs along the gradient of its own part of the batch.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, m_sharpness: bool = False) -> None:
        if process_group is not None or m_sharpness:
            name = "m_sharpness=True" if process_group is None else "process_group"
            if not _initialised():
                raise RuntimeError(
                    f"{name} needs torch.distributed: call torch.distributed.init_process_group() first, "
                    "or start the script with torchrun"
                )
        self.process_group = process_group
        self.m_sharpness = m_sharpness
        self.model: nn.parallel.DistributedDataParallel | None = None
        self._unverified = True

    def check_parameters(self, params: Sequence[Tensor]) -> None:
        """Raises ``TypeError`` or ``ValueError`` for parameters of one group that cannot be trained together."""
        for p in params:
            if getattr(p, "_fsdp_flattened", False):
                raise TypeError(
                    f"{describe(p)} belongs to FullyShardedDataParallel, which moves its weights under an optimizer's "
                    "feet: use torch.distributed.fsdp.fully_shard (FSDP2)"
                )
            if is_dtensor(p) != is_dtensor(params[0]):
                plain, placed = (params[0], p) if is_dtensor(p) else (p, params[0])
                raise TypeError(
                    f"{describe(placed)} is a DTensor and {describe(plain)} of the same group a plain tensor: "
                    "put them into two groups, where a plain one counts as a replica on every process, or "
                    "distribute both"
                )
            if not is_dtensor(p):
                continue
            if any(placement.is_partial() for placement in p.placements):
                raise TypeError(
                    f"{describe(p)} has the placements {p.placements}: a weight that is a sum over processes has no "
                    "norm; redistribute it with Replicate() or Shard()"
                )
            if p.device_mesh.get_coordinate() is None:
                raise ValueError(
                    f"{describe(p)} lies on {p.device_mesh}, of which this process (rank {_rank()}) is no part"
                )
            if self.m_sharpness and shard_groups(p):
                raise ValueError(
                    f"m_sharpness=True, but {describe(p)} is sharded: each process has to hold whole weights to "
                    "perturb them by itself; use DistributedDataParallel, or m_sharpness=False"
                )

    def total(self, groups: Sequence[tuple], sums: Sequence[Tensor]) -> Tensor:
        """The Gram sums (3,) over the flat spaces of every process; ``groups`` are each space's shard groups.

        Float64, on the first space's device. Every process has to call it.
        """
        parts: dict[tuple, Tensor] = {}
        for key, part in zip(groups, sums, strict=True):
            parts[key] = parts[key] + part.to(parts[key].device) if key in parts else part
        for group in dict.fromkeys(group for key in parts for group in key):
            keys = [key for key in parts if group in key]
            stacked = torch.stack([parts[key] for key in keys]) if len(keys) > 1 else parts[keys[0]][None]
            dist.all_reduce(stacked, group=group)
            parts.update(zip(keys, stacked, strict=True))
        if not parts:
            result = torch.zeros(3, dtype=torch.float64)
        else:
            result, *others = parts.values()
            for other in others:
                result = result + other.to(result.device)
        if self.process_group is not None:
            dist.all_reduce(result, group=self.process_group)
        return result

    def agreed(self, sums: Tensor) -> Tensor:
        """``sums``, not finite on any process if they are not on one; communicates only under ``m_sharpness``."""
        if not self.m_sharpness:
            return sums
        flags = sums * 0
        dist.all_reduce(flags)
        return sums + flags

    def notice(self, model: nn.Module | None) -> None:
        """Looks at a model given to a step; raises for one that cannot be trained so."""
        if model is None:  # a framework may have shown it before
            return
        wrapper = data_parallel(model)
        if wrapper is not None and not wrapper.require_backward_grad_sync:
            raise RuntimeError(
                "a closure under no_sync(): the optimizer runs both passes itself and reduces their gradients; "
                "call it outside, and say m_sharpness=True for a first pass that is not reduced"
            )
        if wrapper is not None and self.process_group is not None:
            both = set(_members(wrapper.process_group)) & set(_members(self.process_group))
            if len(both) > 1:
                raise ValueError(
                    f"process_group joins the ranks {sorted(both)}, which hold replicas of one model under "
                    "DistributedDataParallel: their norms would be counted several times; leave it out"
                )
        if wrapper is not self.model:
            self.model = wrapper
            self._unverified = True

    def first_pass(self, model: nn.Module | None) -> contextlib.AbstractContextManager:
        """The context of a step's first pass, in which gradients stay on their process under ``m_sharpness``."""
        self.notice(model)
        if not self.m_sharpness:
            return contextlib.nullcontext()
        if model is None or self.model is None:
            raise TypeError(
                "m_sharpness=True: give the DistributedDataParallel model, as in step(closure, model=model), so that "
                "the first pass is not reduced over the processes"
            )
        return self.model.no_sync()

    def awaits_static_graph(self) -> bool:
        """Whether a backward pass must come before the first unreduced one.

        torch cannot run the very first pass of a static graph under ``no_sync`` (pytorch/pytorch#143580).
        """
        model = self.model if self.m_sharpness else None
        return model is not None and model.static_graph and not model._static_graph_delay_allreduce_enqueued

    def __deepcopy__(self, memo) -> Ranks:
        return Ranks(self.process_group, self.m_sharpness)

    def __reduce__(self):
        if self.process_group is not None:
            raise TypeError("an optimizer with a process_group cannot be pickled: save its state_dict()")
        return (Ranks, (None, self.m_sharpness))

    # ---- the same on every process ---------------------------------------------------------------------------

    def forget(self) -> None:
        """The optimizer has changed: the next :meth:`verify` looks again."""
        self._unverified = True

    def verify(self, method: str, base: torch.optim.Optimizer, groups: Sequence[tuple]) -> None:
        """Once: raises ``ValueError`` on every process if methods, hyper-parameters or parameters differ.

        Only where the optimizer knows of other processes: from DTensors, ``process_group``, ``m_sharpness``, or a
        DistributedDataParallel model given to ``step``.
        """
        if not self._unverified:
            return
        replicated = self.model is not None or self.m_sharpness
        whole = [dist.group.WORLD] if self.process_group is not None or self.m_sharpness else []
        model = [self.model.process_group] if self.model is not None else []
        for group in dict.fromkeys([*whole, *model, *(group for key in groups for group in key)]):
            mine = _description(method, base, self, replicated)
            every: list = [None] * dist.get_world_size(group)
            dist.all_gather_object(every, mine, group=group)
            _compare(dict(zip(_members(group), every, strict=True)))
        self._unverified = False

    @contextlib.contextmanager
    def failures_named(self) -> Iterator[None]:
        """Tells the others what was raised here, and adds what they told to an exception that was raised here.

        A process that fails leaves its peers waiting in a collective until its connection closes, or until the
        process group's timeout; their own error then says nothing of the cause.
        """
        try:
            yield
        except Exception as error:
            if processes() > 1:
                self._exchange(error)
            raise

    def _exchange(self, error: Exception) -> None:
        with contextlib.suppress(Exception):  # the store may be gone with the process that kept it
            store = dist.distributed_c10d._get_default_store()
            # torchrun's processes may share the store with those before a restart.
            place = f"fastsam/failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
            told = []
            for rank in range(processes()):
                key = f"{place}/{rank}"
                if rank != _rank() and store.check([key]):
                    told.append(f"rank {rank} failed before: {store.get(key).decode()}")
            if not told:  # the first to fail is the cause, the others are its victims
                store.set(f"{place}/{_rank()}", f"{type(error).__name__}: {error}"[:1000])
            elif hasattr(error, "add_note"):
                error.add_note("\n".join(told))


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _initialised() else 0


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if _initialised() else 1


def _members(group) -> list[int]:
    return dist.get_process_group_ranks(group)


def data_parallel(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel that wraps a model, or a part of it."""
    if not _initialised():  # it cannot be there, and a step should not walk all the modules to see that
        return None
    return next((m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)), None)


def _description(method: str, base: torch.optim.Optimizer, ranks: Ranks, replicated: bool) -> dict[str, Any]:
    """What has to be the same on every process, by the name an error gives it."""
    found: dict[str, Any] = {
        "the method": method,
        "the base optimizer": type(base).__name__,
        "m_sharpness": ranks.m_sharpness,
        "membership of process_group": ranks.process_group is None or _is_member(ranks.process_group),
    }
    for i, group in enumerate(base.param_groups):
        for name, value in group.items():
            if name != "params" and isinstance(value, (bool, int, float, str, Tensor)) and name != "steps":
                found[f"{name} of group {i}"] = value.item() if isinstance(value, Tensor) else value
    if ranks.process_group is not None:
        return found  # stages have their own parameters
    for i, group in enumerate(base.param_groups):
        for j, p in enumerate(group["params"]):
            found[f"parameter {j} of group {i}"] = f"{tuple(p.shape)} {p.dtype}"
            if replicated and not is_dtensor(p):
                found[f"the values of parameter {j} of group {i}, of shape {tuple(p.shape)},"] = _checksum(p)
    return found


def _is_member(group) -> bool:
    return group is not dist.GroupMember.NON_GROUP_MEMBER and dist.get_rank(group) >= 0


@torch.no_grad()
def _checksum(p: Tensor) -> int:
    """Sum of the bits as integers: exact in any order."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()]
    return int(p.detach().view(kind).sum(dtype=torch.int64))


def _compare(every: dict[int, dict[str, Any]]) -> None:
    (first, reference), *others = every.items()
    for rank, description in others:
        for name in dict.fromkeys([*reference, *description]):
            mine, theirs = reference.get(name, "absent"), description.get(name, "absent")
            if mine != theirs:
                raise ValueError(
                    f"{name} differs between processes: {mine!r} on rank {first}, {theirs!r} on rank {rank}; "
                    "build the same optimizer on every one"
                )
