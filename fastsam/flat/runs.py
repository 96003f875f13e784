"""The memory that ``flatten_parameters`` gives to parameters and their gradients.

The parameters of one device and dtype lie one behind the other in one allocation, a :class:`Run`, and so do their
gradients; yet each tensor has a storage of its own, exactly as large as the tensor. Kernels see neighbours by their
addresses; whoever saves, shares or compares tensors by their storages (``torch.save``, safetensors, Accelerate) sees
separate ones. DLPack makes such tensors: they keep the allocation alive, which ends with the last of them.

Runs are found by the addresses of the weights, which belong to a run for as long as its allocation lives. Nothing
refers to a parameter, not even weakly: ``torch.utils.swap_tensors`` refuses tensors with weak references.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack


class Run:
    """Neighbours, and the gradients that belong to them: ``gradients`` is their whole buffer, ``views[i]`` a part.

    ``cleared[i]`` is torch's count of writes to ``views[i]`` when it was zeroed instead of being set to None, or None.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._layouts = [(p.shape, p.stride()) for p in params]
        self._dtype, self._device = params[0].dtype, params[0].device
        self._size = sum(p.numel() for p in params)
        self._weights: Tensor | None = torch.empty(self._size, dtype=self._dtype, device=self._device)
        self.begin = self._weights.data_ptr()
        self.addresses: list[int] = []
        self.cleared: list[int | None] = [None] * len(params)

    def settle(self, params: Sequence[Tensor]) -> None:
        """Makes the parts of the run the memory of these parameters, with their values; it is their home from now."""
        weights = self._weights
        assert weights is not None
        for i, (weight, p) in enumerate(zip(self._parts(weights), params, strict=True)):
            p.data = weight.copy_(p.detach())
            self.addresses.append(p.data_ptr())
            _homes[p.data_ptr()] = self, i
        _runs[self] = None
        weakref.finalize(weights.untyped_storage(), _forget, self).atexit = False
        self._weights = None  # the parameters keep it, and nobody else

    @functools.cached_property
    def gradients(self) -> Tensor:
        with torch.inference_mode(False):
            return torch.zeros(self._size, dtype=self._dtype, device=self._device)

    @functools.cached_property
    def views(self) -> list[Tensor]:
        with torch.inference_mode(False):
            return self._parts(self.gradients)

    def fits(self, i: int, p: Tensor) -> bool:
        """Whether p is laid out as the i-th of the parameters was."""
        return p.dtype == self._dtype and (p.shape, p.stride()) == self._layouts[i]

    def holds(self, i: int, gradient: Tensor) -> bool:
        """Whether ``gradient`` is ``views[i]``, which are allocated with their first use."""
        return "views" in self.__dict__ and gradient is self.views[i]

    def mark(self, i: int, cleared: bool) -> None:
        """Notes whether ``views[i]``, as it stands, is no gradient."""
        self.cleared[i] = self.views[i]._version if cleared else None

    def is_cleared(self, i: int) -> bool:
        """Whether ``views[i]`` was marked as none, and nobody wrote to it since."""
        return "views" in self.__dict__ and self.views[i]._version == self.cleared[i]

    def has_cleared(self) -> bool:
        """Whether some part is no gradient."""
        return any(map(self.is_cleared, range(len(self.cleared))))

    def _parts(self, flat: Tensor) -> list[Tensor]:
        parts, offset = [], 0
        for shape, stride in self._layouts:
            end = offset + shape.numel()
            parts.append(from_dlpack(to_dlpack(flat[offset:end])).as_strided(shape, stride))
            offset = end
        return parts


_homes: dict[int, tuple[Run, int]] = {}  # address of a weight -> its run, and its index there
_runs: dict[Run, None] = {}


def _forget(run: Run) -> None:
    """When the allocation of the weights is freed: other tensors may come to lie at its addresses."""
    for address in run.addresses:
        if _homes.get(address, (None, 0))[0] is run:
            del _homes[address]
    del _runs[run]


def runs() -> list[Run]:
    """Those whose allocation lives."""
    return list(_runs)


def place(p: Tensor) -> tuple[Hashable, int]:
    """The memory that p shares with its neighbours (its run, or its storage), and the byte of it where p begins."""
    address = p.data_ptr()
    run, _ = _homes.get(address, (None, 0))
    if run is not None:
        return run, address - run.begin
    return p.untyped_storage().data_ptr(), int(p.storage_offset()) * p.element_size()


def home(p: Tensor) -> tuple[Run, int] | None:
    """The run that p's gradient has a part of, and which; None if p is frozen, or changed or was moved since."""
    found = _homes.get(p.data_ptr()) if _homes else None
    if found is None or not p.requires_grad:
        return None
    return found if found[0].fits(found[1], p) else None
