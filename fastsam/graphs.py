"""A whole training step as one CUDA graph: forward, backward, climb, forward, backward, descend.

    step = graphs.capture(optimizer, closure, x, y, model=model)
    for x, y in loader:
        loss = step(x, y)
        scheduler.step()

A replay costs the host one launch instead of some hundreds, which are most of a small model's time. What a graph reads
is fixed: addresses, and any number that was in Python when it was captured. So a batch is copied into the example's
place; hyper-parameters are in tables on the device, brought up to date before a replay in the order of its stream; and
every address is compared with the captured one first, and another one is an error. F-SAM reads one average and writes
another, which change places each step: that takes two graphs, replayed in turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastsam.closures import ClosureSteps
from fastsam.descent import fused_rule
from fastsam.flat import FlatSpace
from fastsam.flatten import is_cleared
from fastsam.graph_capture import (
    AGAIN,
    Addresses,
    Gpu,
    Unchanged,
    cannot_capture,
    check_optimizer,
    check_spaces,
    check_tensors,
)
from fastsam.interrupts import uninterrupted
from fastsam.kernels import Ascent, Descent
from fastsam.kernels.device import Recording, table_of
from fastsam.kernels.launches import closed_form, refresh
from fastsam.optimizer import SharpnessAware
from fastsam.passes import check_clipping

_WARM_UP_STEPS = 4  # even, so that F-SAM's averages are back in their places


def capture(
    optimizer: SharpnessAware,
    closure: Callable[..., Tensor],
    *batch: Tensor,
    model: nn.Module | None = None,
    shared_masks: bool = True,
    max_norm: float | None = None,
    clip_value: float | None = None,
) -> CapturedStep:
    """A function of a batch that takes one whole step of ``optimizer`` by replaying a CUDA graph.

    ``closure(*batch)`` does a full forward and backward pass on the tensors it is given and returns the scalar loss;
    autocast goes inside it. ``batch`` are examples, on the optimizer's GPU: every later batch has their shapes and
    dtypes. ``model``, ``shared_masks``, ``max_norm`` and ``clip_value`` are those of ``optimizer.step``; with ``model``
    it is noticed, too, if one of its tensors is replaced later. ``step(*batch)`` then does what
    ``optimizer.step(lambda: closure(*batch), model=model, ...)`` would, bit for bit where the model is deterministic.

    Takes a few steps to warm up and puts everything back as it was: weights, state, buffers, random generators. Weights
    and state are there twice meanwhile. Afterwards the graphs keep the memory of one step.

    Raises ``RuntimeError`` without a GPU, for parameters on several devices or backends that do not launch kernels, a
    base optimizer without a fused update, several processes, within autocast, and where the closure does what a graph
    cannot hold (``.item()``, a copy from the CPU, a branch on a value); ``TypeError`` or ``ValueError`` for the batch.

    Example:
        >>> step = fastsam.graphs.capture(optimizer, closure, x, y, model=model)
        >>> loss = step(x, y)  # a 0-dimensional tensor, which the next call overwrites
    """
    return CapturedStep(optimizer, closure, batch, model, shared_masks, dict(max_norm=max_norm, clip_value=clip_value))


class CapturedStep:
    """What :func:`capture` returns: call it with a batch. Deleting it frees the graphs and their memory.

    A step with a structure that was not met before (Eigen-SAM's first vector, a momentum that is no longer 0) is
    captured when it comes. Between calls the optimizer is as after ``optimizer.step``: steps without the graph, state
    dicts and loaded checkpoints all fit in.
    """

    def __init__(self, optimizer, closure, batch, model, shared_masks: bool, clipping: dict) -> None:
        check_clipping(**clipping)
        self._optimizer, self._closure, self._model = optimizer, closure, model
        self._shared_masks, self._clipping = shared_masks and model is not None, clipping
        self._device = check_optimizer(optimizer)
        check_tensors(batch, self._device)
        self._gpu = Gpu(self._device)
        self._inputs = tuple(tensor.detach().clone() for tensor in batch)
        self._loss: Tensor | None = None
        self._graphs: dict[tuple, _Graph] = {}
        self._refuse_gradients()
        optimizer._forget_empty_state()
        optimizer._spaces.refresh(optimizer.param_groups, optimizer.state)
        self._spaces: list[FlatSpace] = list(optimizer._spaces)
        check_spaces(self._spaces)
        self._addresses = Addresses(optimizer, model)
        self._own_numbers = _own_numbers(optimizer)
        self._capture()

    def __call__(self, *batch: Tensor) -> Tensor:
        """One step on ``batch``; returns the loss of its first pass, in a tensor that the next call overwrites.

        Raises ``ValueError`` or ``TypeError`` for a batch unlike the example, ``RuntimeError`` within a step and
        where a captured address changed; nothing has changed then.
        """
        optimizer = self._optimizer
        self._check(batch)
        optimizer._forget_empty_state()
        for place, given in zip(self._inputs, batch, strict=True):
            place.copy_(given, non_blocking=True)
        if optimizer.uses_eigenvector and optimizer.eigenvector_due():
            optimizer._refresh(lambda: self._closure(*self._inputs), {"model": self._model})
            optimizer._clear_gradients()
        plan = self._plan()
        if _key(plan) not in self._graphs:
            self._capture()
            plan = self._plan()
        graph = self._graphs[_key(plan)]
        with uninterrupted():
            for part, updated in zip(plan, graph.updated, strict=True):
                refresh(part.space, part.ascent, part.rule.kernel, part.descent, updated)
            self._gpu.align_masks()
            graph.replay()
            self._finish(plan, graph)
        return self._loss

    # ---- capturing ---------------------------------------------------------------------------------------

    def _capture(self) -> None:
        """Captures the step as it is now, for F-SAM in both places of its averages; leaves no trace of it."""
        with Unchanged(self._optimizer, self._model) as unchanged:
            with self._gpu.warming_up():
                for _ in range(_WARM_UP_STEPS - 1):
                    self._whole_step()
                try:
                    with self._gpu.waiting_refused():
                        self._whole_step()
                except RuntimeError as error:
                    raise cannot_capture(error) from error
            unchanged.all_modules_seen()
            for _ in range(2 if self._optimizer.uses_ema else 1):
                key = _key(self._plan())
                self._graphs[key] = self._record()
        self._optimizer._clear_gradients()

    def _record(self) -> _Graph:
        graph = _Graph([Recording(table_of(space), space) for space in self._spaces])
        try:
            graph.replay = self._gpu.record(lambda: self._whole_step(graph))
            self._addresses.check()
        except Exception as error:
            for recording in graph.recordings:
                recording.abandon()
            self._optimizer._perturbed = False  # nothing ran, and nothing can be restored in a broken capture
            raise cannot_capture(error) from error
        for recording in graph.recordings:
            recording.fill()
        graph.sums = self._optimizer._sums
        return graph

    def _whole_step(self, graph: _Graph | None = None) -> None:
        """The step itself: run to warm up, or captured as ``graph``."""
        passes = 0

        def evaluate() -> Tensor:
            nonlocal passes
            passes += 1
            again = graph is not None and passes == 2 and self._shared_masks
            with self._gpu.masks_again() if again else contextlib.nullcontext():
                loss = self._closure(*self._inputs)
            if graph is not None:
                found = [[p.grad is not None for p in space.owners] for space in self._spaces]
                graph.climbed, graph.updated = (found, []) if passes == 1 else (graph.climbed, found)
            return loss

        # Not optimizer.step, which may estimate an eigenvector, and which schedulers count.
        loss = ClosureSteps.step(self._optimizer, evaluate, model=self._model, shared_masks=False, **self._clipping)
        if not isinstance(loss, Tensor):
            raise TypeError(f"the closure returned a {type(loss).__name__}: a captured step needs the loss as a tensor")
        if self._loss is None:
            self._loss = torch.empty_like(loss.detach())
        self._loss.copy_(loss.detach())

    # ---- replaying ---------------------------------------------------------------------------------------

    def _check(self, batch) -> None:
        optimizer = self._optimizer
        if optimizer._perturbed or optimizer._accumulated is not None:
            raise RuntimeError("a captured step within a step: call second_step(), descend() or restore() first")
        if len(batch) != len(self._inputs):
            raise ValueError(f"the step was captured with {len(self._inputs)} tensors and is called with {len(batch)}")
        for i, (place, given) in enumerate(zip(self._inputs, batch, strict=True)):
            if not isinstance(given, Tensor):
                raise TypeError(f"argument {i} of the captured step is a {type(given).__name__}: give a tensor")
            if given.shape != place.shape or given.dtype != place.dtype:
                raise ValueError(
                    f"argument {i} of the captured step has shape {tuple(given.shape)} and {given.dtype}, the example "
                    f"had {tuple(place.shape)} and {place.dtype}: call optimizer.step(closure) for such a batch, or "
                    "capture another step (a DataLoader's drop_last=True leaves out a short last batch)"
                )
        self._refuse_gradients()
        if list(optimizer._spaces) != self._spaces:
            raise RuntimeError(f"the optimizer was rebuilt for other parameters since the step was captured: {AGAIN}")
        self._addresses.check()
        if _own_numbers(optimizer) != self._own_numbers:
            raise RuntimeError(
                f"{type(optimizer).__name__}.coefficients() computes with numbers of the groups, which are in the "
                f"graph therefore, and they changed: {AGAIN}, or keep what changes in a tensor on the GPU"
            )
        for group in optimizer._method_groups():
            optimizer.check_group(group)

    def _refuse_gradients(self) -> None:
        if not all(map(is_cleared, self._optimizer._every_parameter())):
            raise RuntimeError(
                "a captured step found gradients that it did not compute: call optimizer.zero_grad() first"
            )

    def _plan(self) -> list[_Part]:
        """What the step's launches are given for each space now; state put there by others is copied into place."""
        optimizer, rule = self._optimizer, fused_rule(self._optimizer.base_optimizer)
        if rule is None:
            raise RuntimeError(f"the base optimizer runs its own step() now (a hook?), which is in no graph: {AGAIN}")
        optimizer._spaces.find_states(optimizer.state)
        groups, options = optimizer._method_groups(), dict(grad_scale=1.0, **self._clipping)
        plan = []
        for space in self._spaces:
            ascent = optimizer._ascent(space, groups, 1.0, None) if space.perturbed else None
            descent, buffers = optimizer._descent(space, rule, options, None)
            plan.append(_Part(space, rule, ascent, descent, buffers))
        return plan

    def _finish(self, plan: list[_Part], graph: _Graph) -> None:
        """What ``optimizer.step`` does on the host when its launches are on their way."""
        optimizer = self._optimizer
        for part, climbed, updated in zip(plan, graph.climbed, graph.updated, strict=True):
            if not all(part.descent.started):
                optimizer._publish_base_state(part.space, part.rule, part.buffers, updated)
            if optimizer.uses_ema and part.space.perturbed:
                kept = [had or now for had, now in zip(part.ascent.ema_started, climbed, strict=True)]
                buffer = part.space.buffer("momentum_next")
                optimizer._spaces.publish(part.space, optimizer.state, "momentum", buffer, kept)
                part.space.swap("momentum", "momentum_next")
        optimizer._sums = graph.sums
        optimizer._step_taken()


@dataclass
class _Graph:
    """One captured step, and what the host has to know of it."""

    recordings: list[Recording]  # the tables that its launches read
    replay: Callable[[], None] | None = None
    climbed: list[list[bool]] = field(default_factory=list)  # by space: parameters with a gradient in the first pass
    updated: list[list[bool]] = field(default_factory=list)  # and in the second
    sums: Tensor | None = None  # of the second pass: whether the step counts


@dataclass
class _Part:
    """What the launches for one space are given."""

    space: FlatSpace
    rule: object
    ascent: Ascent | None
    descent: Descent
    buffers: dict


def _key(plan: list[_Part]) -> tuple:
    """Everything in which the launches of two steps may differ, and tables on the device do not."""
    key = []
    for part in plan:
        ascent, descent = part.ascent, part.descent
        buffers = [descent.ema, descent.ema_next, *descent.state.values()]
        if ascent is not None:
            buffers += [ascent.ema, ascent.ema_next, ascent.vector]
            key.append(ascent.weighted and any(g["adaptive"] for g in ascent.groups))
        key += [part.rule.kernel, *descent.state, *(0 if b is None else b.data_ptr() for b in buffers)]
    return tuple(key)


def _own_numbers(optimizer: SharpnessAware) -> list[dict]:
    """The numbers that a method's own coefficients may have read; none where the kernels compute them."""
    if closed_form(Ascent((), optimizer.coefficients)):
        return []
    return [{k: v for k, v in g.items() if isinstance(v, (int, float))} for g in optimizer._method_groups()]
