"""Parameters and gradients in one contiguous buffer each, for who wants it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastsam.distributed.shards import is_dtensor
from fastsam.flat.left import is_left, leave
from fastsam.flat.neighbours import check_dense, check_separate
from fastsam.flat.runs import Run, home, runs
from fastsam.support.checks import describe


def flatten_parameters(model: torch.nn.Module) -> None:
    """Moves a model's parameters into one contiguous buffer for each device and dtype, gradients into another.

    The tensors keep their identity, shapes, strides and values; only their memory is new. Optimizers built from
    the model, before or after, then walk one row instead of one for each parameter. Parameters whose size is no
    multiple of 16 bytes go last, so that the others stay aligned. Every tensor has a storage of its own, exactly as
    large as the tensor, so that the model is saved, moved and shared as before; a copy of it is not flattened. On a
    GPU, torch cannot hand such tensors themselves to another process (CUDA IPC): hand over clones.

    ``zero_grad`` of a fastsam optimizer moves the gradients that it finds into their buffer and zeroes them there. One
    that nobody has written to since is no gradient: a step sets it to None before it looks at gradients, and
    ``zero_grad`` leaves it so, as without ``flatten_parameters``. (Code that writes to every gradient before the step
    does, such as ``clip_grad_norm_`` before ``first_step``, makes zeros of one that only the previous pass computed;
    weight decay and momentum then move its parameter.)

    Raises ``ValueError`` for a parameter whose memory has gaps or is shared with another's, ``TypeError`` for a
    DTensor; nothing has changed then. Frozen parameters and those without elements are left where they are.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    weights: Iterable[Tensor] = model.parameters()
    for p in weights:
        if is_dtensor(p):
            raise TypeError(f"{describe(p)} is a DTensor: its shards stay where they are, leave flatten_parameters out")
        if p.requires_grad and (p.numel() or p.is_meta):
            check_dense(p)
            kinds.setdefault((p.device, p.dtype), []).append(p)
    for params in kinds.values():
        check_separate(params)
        params.sort(key=lambda p: p.numel() * p.element_size() % 16 != 0)
    with torch.inference_mode(False), torch.no_grad():
        made = [(Run(params), params) for params in kinds.values()]
        for run, params in made:
            gradients = [None if is_cleared(p) else p.grad for p in params]
            run.settle(params)
            for i, (p, gradient) in enumerate(zip(params, gradients, strict=True)):
                p.grad = None if gradient is None else run.views[i].copy_(gradient)
                if gradient is not None and is_left(gradient):
                    leave([p])


def is_cleared(p: Tensor) -> bool:
    """Whether p has no gradient, or a flattened one that nobody wrote to since it was zeroed; no value is looked at."""
    gradient = p.grad
    if gradient is None:
        return True
    run, i = home(p) or (None, 0)
    return run is not None and run.holds(i, gradient) and run.is_cleared(i)


def drop_cleared(params: Sequence[Tensor]) -> None:
    """Sets flattened gradients to None that nobody wrote to since they were zeroed.

    To be called before gradients are looked at. What counts is torch's count of writes; values are read, and a GPU
    waited for, only where that says that there was none, as some write behind torch's back (a collective, ``.data``).
    """
    if not any(run.has_cleared() for run in runs()):
        return
    for p in params:
        if p.grad is None or not is_cleared(p):
            continue
        capturing = p.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing and bool(p.grad.any()):
            found = home(p)
            assert found is not None
            found[0].mark(found[1], cleared=False)
        else:
            p.grad = None


def clear_gradients(params: Sequence[Tensor], set_to_none: bool) -> None:
    """``zero_grad``, except that gradients flattened by :func:`flatten_parameters` stay where they are."""
    known: dict[Run, set[int]] = {}  # every part of a run that may be overwritten, and
    zeroed: dict[Run, dict[int, bool]] = {}  # those that are gradients: whether they are none from now on
    for p in params:
        gradient, place = p.grad, home(p)
        if place is not None:
            run, i = place
            known.setdefault(run, set()).add(i)
            # Another's view stays another's: a bucket of DistributedDataParallel would be back after the next backward.
            if gradient is not None and (run.holds(i, gradient) or not gradient._is_view()):
                zeroed.setdefault(run, {})[i] = set_to_none or is_cleared(p)
                p.grad = run.views[i]
                continue
        if gradient is not None:
            if set_to_none:
                p.grad = None
                continue
            if gradient.grad_fn is None:  # as torch does it: views, such as those of a bucket, cannot be detached
                gradient.requires_grad_(False)
            else:
                gradient.detach_()
            gradient.zero_()
    for run, parts in zeroed.items():
        views = [run.views[i] for i in parts]
        if len(known[run]) == len(run.views):
            run.gradients.zero_()
            increment_version(views)
        else:  # the others may be another optimizer's
            torch._foreach_zero_(views)
        for i, none in parts.items():
            run.mark(i, cleared=none)
