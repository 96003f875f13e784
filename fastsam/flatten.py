"""Parameters and gradients in one contiguous buffer each, for who wants it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastsam.checks import describe
from fastsam.distributed import is_dtensor
from fastsam.flat import check_dense


def flatten_parameters(model: torch.nn.Module) -> None:
    """Moves a model's parameters into one contiguous buffer for each device and dtype, gradients into another.

    The tensors keep their identity, shapes, strides and values; only their memory is new. Optimizers built from
    the model, before or after, then walk one row instead of one for each parameter. Gradients become views of
    their own buffer, which ``zero_grad`` of a fastsam optimizer zeroes in place. Parameters whose size is no
    multiple of 16 bytes go last, so that the others stay aligned. Parameters whose memory has gaps raise
    ``ValueError``; frozen ones are left where they are.
    """
    spaces: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in model.parameters():
        if is_dtensor(p):
            raise TypeError(f"{describe(p)} is a DTensor: its shards stay where they are, leave flatten_parameters out")
        if p.requires_grad:
            check_dense(p)
            spaces.setdefault((p.device, p.dtype), []).append(p)
    had_gradients = any(p.grad is not None for params in spaces.values() for p in params)
    for (device, dtype), params in spaces.items():
        params.sort(key=lambda p: p.numel() * p.element_size() % 16 != 0)
        total = sum(p.numel() for p in params)
        weights = torch.empty(total, dtype=dtype, device=device)
        gradients = torch.zeros(total, dtype=dtype, device=device)
        offset, views = 0, []
        for p in params:
            weight, gradient = (
                flat[offset : offset + p.numel()].as_strided(p.shape, p.stride()) for flat in (weights, gradients)
            )
            weight.copy_(p.detach())
            if p.grad is not None:
                gradient.copy_(p.grad)
            p.data = weight
            p.grad = gradient
            flat_gradients[p] = (gradients, gradient, gradient.data_ptr())
            views.append(id(gradient))
            offset += p.numel()
        if not had_gradients:
            _zeroed[gradients] = gradients._version, frozenset(views)


flat_gradients: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> (whole buffer, its view, where that lay)
#: whole buffer -> torch's count of writes to it when it was zeroed, and the identities of the views that were
_zeroed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_cleared(p: Tensor) -> bool:
    """Whether p has no gradient, or a flattened one that nobody wrote to since it was zeroed; no value is looked at."""
    if p.grad is None:
        return True
    whole, view = _home(p)
    if view is None or p.grad is not view:
        return False
    version, zeroed = _zeroed.get(whole) or (None, ())
    return version == whole._version and id(view) in zeroed


def clear_gradients(params: Sequence[Tensor], set_to_none: bool) -> None:
    """``zero_grad``, except that gradients flattened by :func:`flatten_parameters` stay where they are."""
    homes: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
    for p in params:
        whole, view = _home(p)
        if view is not None:
            homes.setdefault(id(whole), (whole, {}))[1][id(view)] = view
            if p.grad is not view:
                p.grad = view
        elif p.grad is not None:
            if set_to_none:
                p.grad = None
                continue
            if p.grad.grad_fn is None:  # as torch does it: views, such as those of a bucket, cannot be detached
                p.grad.requires_grad_(False)
            else:
                p.grad.detach_()
            p.grad.zero_()
    for whole, views in homes.values():
        if sum(view.numel() for view in views.values()) == whole.numel():
            whole.zero_()
        else:  # the others may be another optimizer's
            torch._foreach_zero_(list(views.values()))
        _zeroed[whole] = whole._version, frozenset(views)


def _home(p: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The buffer that p's gradient was flattened into, and its view; none if p is frozen, or either was moved since.

    ``model.to(...)`` gives the view itself other memory, or p another dtype or device.
    """
    whole, view, address = (flat_gradients.get(p) if flat_gradients else None) or (None, None, 0)
    stayed = view is not None and view.data_ptr() == address and (view.dtype, view.device) == (p.dtype, p.device)
    return (whole, view) if stayed and p.requires_grad else (None, None)
