"""Evaluate a training step again and again, and leave no trace of it.

A curvature estimate runs forward and backward passes that are no part of training. :class:`Frozen` puts back what
they touch: the buffers of every module that runs (BatchNorm's statistics), in training mode its frozen weights,
training flags, gradients, and the random generators of torch, of every device in use, of NumPy and of Python.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from fastsam.flat.flatten import clear_gradients, is_cleared
from fastsam.flat.runs import home


class Frozen:
    """``with Frozen(params, model): ...``: on exit, everything but the weights is exactly as it was on entry.

    Inside, gradients start as None and :meth:`rewind` makes the next pass draw the same random numbers as the first.
    Without ``model`` the modules are found as they run: leave :meth:`watch` on for the first pass. ``eval_mode`` puts
    them in eval mode meanwhile. Generators that a loss makes for itself (``torch.Generator()``) are not covered.
    """

    def __init__(self, params: Iterable[Tensor], model: nn.Module | None = None, eval_mode: bool = False) -> None:
        self._params = list(params)
        self.model = model
        self._eval_mode = eval_mode
        #: the lowest precision seen in use by autocast, or None
        self.autocast_dtype: torch.dtype | None = None

    def __enter__(self) -> Frozen:
        self._gradients: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}
        self._cleared: list[Tensor] = []
        self._modules: dict[int, tuple[nn.Module, bool]] = {}
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor | None]] = []
        self._frozen_weights: list[tuple[Tensor, Tensor, Tensor]] = []
        self._hook: RemovableHandle | None = None
        self._devices = {p.device for p in self._params}
        self._generators = Generators(self._devices)
        for p in self._params:
            self._set_aside(p)
        if self.model is not None:
            self._admit(self.model)
        self._note_autocast()
        return self

    def watch(self) -> None:
        """Notices every module that runs from here on, and whether autocast is on then."""
        if self._hook is None:
            self._hook = register_module_forward_pre_hook(self._on_forward)

    def unwatch(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def rewind(self) -> None:
        """Makes the random generators go on from where they stood on entry."""
        self._generators.restore()

    @torch.no_grad()
    def __exit__(self, *exception) -> None:
        self.unwatch()
        self._generators.restore()
        for module, name, buffer, value in self._buffers:
            if value is not None:
                buffer.copy_(value)
            module._buffers[name] = buffer
        for p, data, value in self._frozen_weights:
            p.data = data.copy_(value)
        for module, training in self._modules.values():
            module.training = training
        for p, gradient, value in self._gradients.values():
            if gradient is not None and value is not None:
                gradient.copy_(value)
            p.grad = gradient
        clear_gradients([p for p in self._cleared if not is_cleared(p)], set_to_none=True)

    def _on_forward(self, module: nn.Module, inputs) -> None:
        self._admit(module)
        self._note_autocast()

    @torch.no_grad()
    def _admit(self, root: nn.Module) -> None:
        if id(root) in self._modules:
            return
        for module in root.modules():
            if id(module) in self._modules:
                continue
            self._modules[id(module)] = (module, module.training)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    self._buffers.append((module, name, buffer, None if is_fixed(buffer) else buffer.clone()))
            for p in module._parameters.values():
                if p is not None:
                    self._set_aside(p)
            if self._eval_mode:
                module.training = False
            elif module.training:
                self._copy_frozen(module)

    def _copy_frozen(self, module: nn.Module) -> None:
        """A forward pass in training mode may update frozen weights, as that of a momentum encoder does."""
        for p in module._parameters.values():
            if p is not None and not p.requires_grad and not is_fixed(p):
                self._frozen_weights.append((p, p.data, p.data.clone()))

    def _set_aside(self, p: Tensor) -> None:
        if id(p) in self._gradients:
            return
        gradient, value = p.grad, None
        # A gradient in one buffer with others is zeroed where it is by zero_grad(): its values need a copy.
        if gradient is not None and home(p) is not None:
            if is_cleared(p):
                self._cleared.append(p)
            else:
                value = gradient.clone()
        self._gradients[id(p)] = (p, gradient, value)
        p.grad = None

    def _note_autocast(self) -> None:
        for kind in {device.type for device in self._devices}:
            if torch.is_autocast_enabled(kind):
                dtype = torch.get_autocast_dtype(kind)
                if self.autocast_dtype is None or torch.finfo(dtype).eps > torch.finfo(self.autocast_dtype).eps:
                    self.autocast_dtype = dtype


def is_fixed(buffer: Tensor) -> bool:
    """Whether torch refuses to write to a tensor, so that it neither changes nor can be put back.

    Its elements share memory, it was made in inference mode, it is not materialised yet, or has no values.
    """
    if is_lazy(buffer) or buffer.is_meta or buffer.is_inference():
        return True
    return buffer.layout is torch.strided and any(
        stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True)
    )


class Generators:
    """The state of the global random generators: torch's on the CPU and on ``devices``, NumPy's and Python's."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = numpy.random.get_state() if numpy is not None else None
        self._cpu = torch.get_rng_state()
        self._devices = [(m, d, m.get_rng_state(d)) for m, d in _device_generators(devices)]

    def restore(self) -> None:
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        for module, device, state in self._devices:
            module.set_rng_state(state, device)


def _device_generators(devices: Iterable[torch.device]) -> Iterator[tuple]:
    in_use = {d for d in devices if d.type not in ("cpu", "meta")}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        in_use |= {torch.device("cuda", i) for i in range(torch.cuda.device_count())}
    for device in in_use:
        yield torch.get_device_module(device), device
