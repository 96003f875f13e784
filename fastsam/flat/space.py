"""One flat index space over many parameters.

Parameters are many small tensors; a kernel wants one long vector. A :class:`FlatSpace` maps the parameters of
one device and dtype to one range of indices. State (backup, moving average, eigenvector, momentum) is physically
flat: one allocation each, of which every parameter sees its own view. Weights and gradients stay where they are:
the kernels are given their addresses, so nothing is copied and ``param.data`` is never re-bound. Of a parameter that
is spread over several processes (a DTensor) the kernels see this process's part, and its state is placed like it.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Collection, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastsam.distributed.shards import distributed_like, is_dtensor, local, local_gradient, placed_like, shard_groups
from fastsam.flat.flatten import drop_cleared
from fastsam.flat.neighbours import check_dense, joined, memory_order
from fastsam.support.checks import describe

try:
    from fastsam import _cpu  # type: ignore[attr-defined]
except ImportError:  # kernels/cpu.py says why
    _cpu = None

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector


class FlatBuffer:
    """One allocation over a space, and each parameter's view of it (same shape and strides)."""

    def __init__(self, space: FlatSpace, dtype: torch.dtype) -> None:
        self.flat = torch.zeros(space.numel, dtype=dtype, device=space.device)
        self.views = [
            placed_like(owner, self.flat[offset : offset + p.numel()].as_strided(p.shape, p.stride()))
            for owner, p, offset in zip(space.owners, space.params, space.offsets, strict=True)
        ]
        self.used = [False] * len(self.views)  # parts that are somebody's state, or were


class StepCounts(FlatBuffer):
    """Adam's step counts: one float32 a parameter in one tensor, seen through 0-dimensional views."""

    def __init__(self, space: FlatSpace) -> None:
        self.flat = torch.zeros(len(space.params), dtype=torch.float32, device=space.device)
        self.views = list(self.flat.unbind())
        self.used = [False] * len(self.views)  # parts that are somebody's state, or were


class FlatSpace:
    """The index space of parameters, which share a device, a dtype and the processes that they are spread over.

    ``owners`` are the optimizer's parameters, ``params`` what the kernels walk: their local parts. ``groups[i]`` is
    the index of parameter i's group. ``perturbed`` says whether these parameters take part in the climb;
    ``state_dtype`` is that of a method's own vectors, or None for the dtype of the weights. ``first[i]`` is the number
    of parameter i's first element, by which stochastic rounding draws. Raises ``ValueError`` for a parameter whose
    memory has gaps or is shared with another's.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        groups: Sequence[int],
        perturbed: bool,
        state_dtype: torch.dtype | None = None,
        first: Sequence[int] | None = None,
    ) -> None:
        order = memory_order(list(map(local, params)))
        self.owners = [params[i] for i in order]
        self.params = list(map(local, self.owners))
        self.groups = [groups[i] for i in order]
        self.spread = any(map(is_dtensor, self.owners))
        self.shard_groups = shard_groups(self.owners[0])
        self.perturbed = perturbed
        self.device = self.params[0].device
        self.dtype = self.params[0].dtype
        self.state_dtype = state_dtype or self.dtype
        for p in self.params:
            check_dense(p)
        self.weights = packed(p.data_ptr() for p in self.params)
        self.layouts = [_layout(p) for p in self.params]
        self.sizes = [p.numel() for p in self.params]
        self.some_empty = 0 in self.sizes
        self.joined = joined(self.params)
        self.offsets, self.numel = _offsets(self.params, self.joined)
        self.first = self.offsets if first is None else [first[i] for i in order]
        self.gradients: list[Tensor | None] = [None] * len(self.params)
        self.gradient_addresses = bytes(len(self.weights))
        self.gradient_dtypes = self._dtypes = (self.dtype,) * len(self.params)
        self.climbed = [False] * len(self.params)
        self.states: list[dict | None] = [None] * len(self.params)
        self.kernels: ModuleType  # the backend that serves this space: set by whoever made it
        self.table: Any = None  # that backend's own view of the addresses
        self._scanner = _scanner(self.owners)
        self._buffers: dict[str, FlatBuffer] = {}

    def buffer(self, name: str) -> FlatBuffer:
        """The flat buffer called ``name``, in the dtype of the weights, allocated at its first use."""
        return self._buffer(name, self.dtype)

    def vector(self, name: str) -> FlatBuffer:
        """The flat buffer of the method's own vector called ``name``, in ``state_dtype``."""
        return self._buffer(name, self.state_dtype)

    def _buffer(self, name: str, dtype: torch.dtype) -> FlatBuffer:
        if name not in self._buffers:
            self._buffers[name] = FlatBuffer(self, dtype)
        return self._buffers[name]

    def step_counts(self) -> FlatBuffer:
        if "step" not in self._buffers:
            self._buffers["step"] = StepCounts(self)
        return self._buffers["step"]

    def swap(self, first: str, second: str) -> None:
        self._buffers[first], self._buffers[second] = self._buffers[second], self._buffers[first]

    def find_states(self, state) -> None:
        """Looks up each parameter's entry in the optimizer's ``state``; None where it has none yet."""
        self.states = [state.get(p) for p in self.owners]

    def adopt(self, name: str, buffer: FlatBuffer) -> list[bool]:
        """Makes ``state[p][name]`` a view of ``buffer`` for every parameter that has one; says which have.

        Tensors put there by anyone else (a loaded checkpoint, the base optimizer's own step) are copied in; of a whole
        one for a parameter that is spread over processes, this process's part.
        """
        values = [None if s is None else s.get(name) for s in self.states]
        if same(values, buffer.views):
            return [True] * len(values)
        own = set(map(id, buffer.views))
        foreign = {i: v for i, v in enumerate(values) if v is not None and v is not buffer.views[i]}
        for i, v in foreign.items():
            if v.shape != buffer.views[i].shape:
                raise ValueError(
                    f"{name!r} in the state of {describe(self.owners[i])} has shape {tuple(v.shape)}: the "
                    "parameter was given another shape since, clear its state"
                )
            if id(v) in own:  # another's view, whose memory is about to be written
                foreign[i] = v.clone()
        for i, v in foreign.items():
            entry = self.states[i]
            assert entry is not None
            buffer.views[i].copy_(distributed_like(buffer.views[i], v))
            entry[name] = buffer.views[i]
        cleared = [value is None and used for value, used in zip(values, buffer.used, strict=True)]
        for view, was_cleared in zip(buffer.views, cleared, strict=True):
            if was_cleared:
                view.zero_()
        if self.table is not None:
            self.table.written(buffer.flat, cleared)
        buffer.used = [value is not None for value in values]
        return buffer.used.copy()

    def publish(self, state, name: str, buffer: FlatBuffer, which: Sequence[bool]) -> bool:
        """Makes the views of ``buffer`` the ``state[p][name]`` of the parameters that ``which`` marks.

        Returns whether ``state`` has new entries.
        """
        grows = None in self.states
        if grows:
            self.states = [
                state[p] if marked and entry is None else entry
                for p, entry, marked in zip(self.owners, self.states, which, strict=True)
            ]
        for entry, view, marked in zip(self.states, buffer.views, which, strict=True):
            if marked:
                assert entry is not None
                entry[name] = view
        buffer.used = [a or b for a, b in zip(buffer.used, which, strict=True)]
        return grows

    def still_fits(self) -> bool:
        """Whether the parameters are still what the space was built for; follows weights that only moved."""
        if self.spread:
            self.params = list(map(local, self.owners))
        weights = self._scanner.weights() if self._scanner is not None else self._python_weights()
        if weights is None:
            return False
        if weights != self.weights:
            in_order = memory_order(self.params) == list(range(len(self.params)))
            if not in_order or joined(self.params) != self.joined:
                return False
            self.weights = weights
        return True

    def restore_changed(self) -> list[Tensor]:
        """``restore`` for weights that are not what the kernels were told; returns those that have another shape."""
        reshaped = []
        for p, weights, climbed in zip(self.owners, self.buffer("backup").views, self.climbed, strict=True):
            if climbed and p.shape == weights.shape:
                p.copy_(weights)
            elif climbed:
                reshaped.append(p)
        return reshaped

    def _python_weights(self) -> bytes | None:
        """The parameters' addresses, or None if one is not laid out as it was, which may be where it lies."""
        return packed(map(Tensor.data_ptr, self.params)) if list(map(_layout, self.params)) == self.layouts else None

    def collect_gradients(self) -> None:
        """Reads ``p.grad`` of every parameter and checks that the kernels can walk it beside the weight.

        A dense gradient with other strides is replaced by a copy in the weight's layout. Raises ``ValueError``
        or ``TypeError``, naming the parameter by its shape, for any other that does not match.
        """
        drop_cleared(self.owners)
        found = self._scanner.gradients() if self._scanner is not None else None
        if found is not None:
            self.gradients, self.gradient_addresses = found
            self.gradient_dtypes = self._dtypes
            return
        self.use_gradients([local_gradient(p) if self.spread else p.grad for p in self.owners])
        if self.spread:
            self._keep_copied_gradients()

    def use_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Takes these tensors for the gradients of a pass, after the checks of :meth:`collect_gradients`."""
        self.gradients = [
            None if g is None else _matching_gradient(p, g) for p, g in zip(self.params, gradients, strict=True)
        ]
        self.gradient_addresses = packed(0 if g is None else g.data_ptr() for g in self.gradients)
        dtypes = tuple(self.dtype if g is None else g.dtype for g in self.gradients)
        self.gradient_dtypes = self._dtypes if dtypes == self._dtypes else dtypes

    @property
    def mixed(self) -> bool:
        """Whether some gradient has another dtype than the weights."""
        return self.gradient_dtypes is not self._dtypes

    def _keep_copied_gradients(self) -> None:
        """A shard's gradient that was copied into another layout becomes the gradient, for whoever reads it next."""
        for owner, g in zip(self.owners, self.gradients, strict=True):
            if g is not None and g is not local_gradient(owner):
                owner.grad = placed_like(owner, g)


def same(some: Collection, others: Collection) -> bool:
    """Whether both hold the very same objects in the same order; ``==`` would compare tensors."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def packed(addresses: Iterable[int]) -> bytes:
    """Addresses as int64: what kernels are given, and what two steps compare by, quickly at any number."""
    return array("q", addresses).tobytes()


def _scanner(params: list[Tensor]):
    """The compiled reader of weights and gradients, if it was built and torch has DLPack's exchange API (2.10 on)."""
    api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if _cpu is None or api is None or any(type(p) not in (Tensor, torch.nn.Parameter) for p in params):
        return None
    return _cpu.Scanner(params, api, Tensor)


def _layout(p: Tensor) -> tuple:
    return (p.device, p.dtype, p.shape, p.stride())


def _same_order(p: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether ``strides`` walk memory as those of p do; a dimension of size 1 may have any stride."""
    return all(a == b for a, b, n in zip(p.stride(), strides, p.shape, strict=True) if n != 1)


def _matching_gradient(p: Tensor, g: Tensor) -> Tensor:
    if g.layout != torch.strided:
        raise TypeError(
            f"the gradient of {describe(p)} is {g.layout}; fastsam needs dense gradients "
            "(torch.nn.Embedding: sparse=False)"
        )
    if g.dtype == p.dtype and g.shape == p.shape and g.stride() == p.stride() and g.device == p.device:
        return g
    if g.shape != p.shape:
        raise ValueError(
            f"the gradient of {describe(p)} has shape {tuple(g.shape)}; they must be equal: "
            "clear it with zero_grad() after changing a parameter"
        )
    if g.device != p.device:
        raise ValueError(
            f"the gradient of {describe(p)} is on {g.device}, the parameter on {p.device}: "
            "clear it with zero_grad() after moving a model"
        )
    if not g.is_floating_point():
        raise TypeError(f"the gradient of {describe(p)} has dtype {g.dtype}; it must be real floating point")
    if (g.dtype == torch.float64) != (p.dtype == torch.float64):
        raise TypeError(
            f"the gradient of {describe(p)} has dtype {g.dtype}, the parameter {p.dtype}: "
            "float64 mixes with nothing else; clear it with zero_grad() after changing a dtype"
        )
    if _same_order(p, g.stride()):
        return g
    matching = torch.empty_strided(p.shape, p.stride(), dtype=g.dtype, device=g.device).copy_(g)
    if p.grad is g:
        p.grad = matching  # so that whoever reads it next (clipping, say) sees what the kernels see
    return matching


def _offsets(params: Sequence[Tensor], joined: Sequence[bool]) -> tuple[list[int], int]:
    """Where each parameter's state begins: aligned, or right behind its neighbour's where the weights are."""
    offsets, end = [], 0
    for p, follows in zip(params, joined, strict=True):
        if not follows:
            step = _ALIGNMENT // p.element_size()
            end = -(-end // step) * step
        offsets.append(end)
        end += p.numel()
    return offsets, end
