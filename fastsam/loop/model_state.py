"""What a model changes in itself during a pass, and how the second pass of a step leaves it alone.

A pass in training mode updates BatchNorm's running statistics and draws dropout masks. In the second pass of a step
the statistics would be those of the perturbed weights, and counted twice; other masks would make the second gradient
that of another network. :class:`TwoPasses` keeps the buffers as the first pass left them and, by default, gives both
passes the same random numbers. ``optimizer.step(closure, model=model)`` uses it. The model is an argument of the call,
as in ``update_eigenvector``, rather than kept by the optimizer: so an optimizer holds no reference to a
model, pickles and copies as before, and follows whatever wraps the model meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastsam.distributed.shards import local
from fastsam.flat.flatten import drop_cleared, is_cleared
from fastsam.loop.frozen import Generators, is_fixed
from fastsam.support.checks import describe


class TwoPasses:
    """The two passes of one step, made before the first.

    Args:
        model: every buffer of it and its submodules is kept, whatever layer it belongs to.
        shared_masks: rewind the random generators (torch's on the CPU and on the devices in use, NumPy's, Python's)
            for the second pass, so that dropout masks are the first pass's. Else it draws fresh ones.

    Example:
        >>> passes = TwoPasses(model)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.first_step(zero_grad=True)
        >>> with passes.second():
        ...     loss_fn(model(x), y).backward()
        >>> optimizer.second_step(zero_grad=True)
    """

    def __init__(self, model: nn.Module, shared_masks: bool = True) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={model!r} must be a torch.nn.Module")
        self.model = model
        # One walk over the model: on a small network each takes as long as the kernels do.
        weights = [p for module in model.modules() for p in module._parameters.values() if p is not None]
        self._devices = {p.device for p in weights}
        self._before = Generators(self._devices) if shared_masks else None
        # A forward pass may update frozen weights, as that of a momentum encoder does, in place or by other memory.
        self._frozen = [(p, _written(p)) for p in weights if not p.requires_grad and not is_fixed(p)]

    @contextlib.contextmanager
    def second(self) -> Iterator[None]:
        """The second pass. On exit, exceptional or not, buffers hold what they held on entry.

        So do frozen weights that the first pass changed: what a forward pass makes of them counts once a step, and does
        not follow w + e.
        With shared masks the random generators are on exit where the first pass left them: a step draws as many
        numbers as one pass does.
        """
        kept = [
            (module, name, buffer)
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        moved = [(p, p.data) for p, written in self._frozen if _written(p) != written]
        buffers = [local(buffer) for *_, buffer in kept if not is_fixed(buffer)]
        buffers += [local(data) for _, data in moved]
        values = [torch.empty_like(buffer) for buffer in buffers]
        _copy(values, buffers)
        after_first = None
        if self._before is not None:
            after_first = Generators(self._devices)
            self._before.restore()
        try:
            yield
        finally:
            _copy(buffers, values)
            for module, name, buffer in kept:
                module._buffers[name] = buffer  # a layer may have assigned a new tensor
            for p, data in moved:
                p.data = data
            if after_first is not None:
                after_first.restore()

    def check_parameters(self, optimizer: torch.optim.Optimizer) -> None:
        """After the first pass: raises ``RuntimeError`` if layers were replaced since the optimizer was built.

        That is, if parameters of the optimizer got no gradient and are not the model's, while the model has some
        that the optimizer does not know.
        """
        optimized = [p for group in optimizer.param_groups for p in group["params"]]
        drop_cleared(optimized)
        if not any(map(is_cleared, optimized)):
            return
        known = set(map(id, optimized))
        current = {id(p): p for p in self.model.parameters() if p.requires_grad}
        stale = [p for p in optimized if is_cleared(p) and id(p) not in current]
        unknown = [p for i, p in current.items() if i not in known]
        if stale and unknown:
            raise RuntimeError(
                f"{describe(stale[0])} is in the optimizer but no longer in the model, and {describe(unknown[0])} is "
                "in the model but not in the optimizer: a layer was replaced since the optimizer was built; "
                "build the optimizer again"
            )


def _written(p: Tensor) -> tuple[int, int]:
    """What differs as soon as somebody has written to p or given it other memory."""
    data = local(p)
    return p._version, data.data_ptr() if data.layout is torch.strided else 0


class _Step(Protocol):
    @property
    def perturbed(self) -> bool: ...


class _TwoPass(Protocol):
    """An optimizer of fastsam."""

    @property
    def two_pass(self) -> _Step: ...


def guard(model: nn.Module, optimizer: _TwoPass) -> RemovableHandle:
    """Has ``model.state_dict()`` raise ``RuntimeError`` while ``optimizer`` has the weights perturbed.

    The optimizer's own ``state_dict`` does so by itself; this is for code that saves the model alone. Returns a
    handle: ``handle.remove()`` ends the guard.
    """

    def refuse(*_: object) -> None:
        if optimizer.two_pass.perturbed:
            raise RuntimeError(
                "model.state_dict() between first_step() and second_step(): the weights are perturbed; "
                "take the checkpoint after second_step(), or call restore() first"
            )

    return model.register_state_dict_pre_hook(refuse)


@torch.no_grad()
def _copy(into: list[Tensor], values: list[Tensor]) -> None:
    """``into[i].copy_(values[i])``: one call, and on a GPU one launch, for each device and dtype."""
    kinds: dict[tuple, tuple[list[Tensor], list[Tensor]]] = {}
    for target, value in zip(into, values, strict=True):
        targets, sources = kinds.setdefault((target.device, target.dtype), ([], []))
        targets.append(target)
        sources.append(value)
    for targets, sources in kinds.values():
        torch._foreach_copy_(targets, sources)
