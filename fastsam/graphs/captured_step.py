"""A whole training step as one CUDA graph: forward, backward, climb, forward, backward, descend.

    step = graphs.capture(optimizer, closure, x, y, model=model)
    for x, y in loader:
        loss = step(x, y)
        scheduler.step()

A replay costs the host one launch instead of some hundreds, which are most of a small model's time. What a graph reads
is fixed: addresses, and any number that was in Python when it was captured. So a batch is copied into the example's
place; hyper-parameters are in tables on the device, brought up to date before a replay in the order of its stream; and
every address is compared with the captured one first, and another one is an error. F-SAM reads one average and writes
another, which change places each step: that takes two graphs, replayed in turn. So do LookSAM's two kinds of steps, and
a radius that is 0 in some steps, which take one gradient then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsam import closures
from fastsam.engine import averages, passes
from fastsam.engine.base_rules import fused_rule
from fastsam.flat.flatten import drop_cleared, is_cleared
from fastsam.flat.space import FlatSpace
from fastsam.graphs.plan import Graph, Part, in_the_graph, key, own_numbers, without_momentum
from fastsam.graphs.second_side import DeviceNumbers
from fastsam.graphs.surroundings import (
    AGAIN,
    Addresses,
    Gpu,
    Unchanged,
    cannot_capture,
    check_optimizer,
    check_spaces,
    check_tensors,
    renew_accumulators,
)
from fastsam.kernels.device import Recording, table_of
from fastsam.kernels.launches import refresh
from fastsam.methods.eigen import EigenSAM
from fastsam.optimizer import SharpnessAware
from fastsam.support.checks import check_clipping
from fastsam.support.interrupts import uninterrupted

_WARM_UP_STEPS = 4  # even, so that F-SAM's averages are back in their places


def capture(
    optimizer: SharpnessAware,
    closure: Callable[..., Tensor],
    *batch: Tensor,
    ascent_closure: Callable[..., Tensor] | None = None,
    model: nn.Module | None = None,
    shared_masks: bool = True,
    max_norm: float | None = None,
    clip_value: float | None = None,
) -> CapturedStep:
    """A function of a batch that takes one whole step of ``optimizer`` by replaying a CUDA graph.

    ``closure(*batch)`` does a full forward and backward pass on the tensors it is given and returns the scalar loss;
    autocast goes inside it. ``batch`` are examples, on the optimizer's GPU: every later batch has their shapes and
    dtypes. ``ascent_closure(*batch)``, given the same tensors, does the same for a part of them, such as
    ``lambda x, y: closure(x[:32], y[:32])``, and is what the first of two passes evaluates. ``model``,
    ``shared_masks``, ``max_norm`` and ``clip_value`` are those of ``optimizer.step``; with ``model`` it is noticed,
    too, if one of its tensors is replaced later. ``step(*batch)`` then does what
    ``optimizer.step(lambda: closure(*batch), model=model, ...)`` would, bit for bit where the model is deterministic.

    Takes a few steps to warm up and puts everything back as it was: weights, state, buffers, random generators. Weights
    and state are there twice meanwhile. Afterwards the graphs keep the memory of one step.

    Raises ``RuntimeError`` without a GPU, for parameters on several devices or backends that do not launch kernels, a
    base optimizer without a fused update, several processes, within autocast, and where the closure does what a graph
    cannot hold (``.item()``, a copy from the CPU, a branch on a value); ``TypeError`` or ``ValueError`` for the batch.

    Example:
        >>> step = fastsam.graphs.capture(optimizer, closure, x, y, model=model)  # doctest: +SKIP
        >>> loss = step(x, y)  # doctest: +SKIP

    The loss is a 0-dimensional tensor, which the next call overwrites.
    """
    clipping = dict(max_norm=max_norm, clip_value=clip_value)
    return CapturedStep(optimizer, closure, batch, ascent_closure, model, shared_masks, clipping)


class CapturedStep:
    """What :func:`capture` returns: call it with a batch. Deleting it frees the graphs and their memory.

    A step with a structure that was not met before (Eigen-SAM's first vector, a momentum that is no longer 0, LookSAM's
    first step between two climbs) is captured when it comes; Momentum-SAM's first one, before there is a momentum to
    climb along, is taken without a graph. Between calls the optimizer is as after ``optimizer.step``: steps without the
    graph, state dicts and loaded checkpoints all fit in.
    """

    def __init__(
        self,
        optimizer: SharpnessAware,
        closure: Callable[..., Any],
        batch: Sequence[Tensor],
        ascent_closure: Callable[..., Any] | None,
        model: nn.Module | None,
        shared_masks: bool,
        clipping: dict,
    ) -> None:
        check_clipping(**clipping)
        self._optimizer, self._closure, self._model = optimizer, closure, model
        self._ascent_closure = ascent_closure
        # The masks of a part of the batch are not those of the whole.
        self._shared_masks = shared_masks and model is not None and ascent_closure is None
        self._clipping = clipping
        self._device = check_optimizer(optimizer)
        check_tensors(batch, self._device)
        self._gpu = Gpu(self._device)
        self._inputs = tuple(tensor.detach().clone() for tensor in batch)
        self._loss: Tensor | None = None
        self._graphs: dict[tuple, Graph] = {}
        self._refuse_gradients()
        step = optimizer.two_pass
        step.groups()
        step.forget_blank_state()
        step.spaces.refresh(optimizer.param_groups, optimizer.state)
        self._spaces: list[FlatSpace] = list(step.spaces)
        check_spaces(self._spaces)
        self._addresses = Addresses(optimizer, model)
        self._own_numbers = own_numbers(optimizer)
        self._second_side = DeviceNumbers(step, self._spaces[0])
        self._capture()

    def __call__(self, *batch: Tensor) -> Tensor:
        """One step on ``batch``; returns the loss of its first pass, in a tensor that the next call overwrites.

        Raises ``ValueError`` or ``TypeError`` for a batch unlike the example, ``RuntimeError`` within a step and
        where a captured address changed; nothing has changed then.
        """
        optimizer = self._optimizer
        self._check(batch)
        optimizer.two_pass.forget_blank_state()
        for place, given in zip(self._inputs, batch, strict=True):
            place.copy_(given, non_blocking=True)
        if optimizer.recipe.eigenvector:
            assert isinstance(optimizer, EigenSAM)
            if optimizer.eigenvector_due():
                optimizer._refresh(lambda: self._closure(*self._inputs), model=self._model)
                optimizer.two_pass.clear_gradients()
        step, plan = optimizer.two_pass, self._plan()
        if key(step, plan) not in self._graphs and not without_momentum(plan):
            self._capture()
            plan = self._plan()
        graph = self._graphs.get(key(step, plan))
        if graph is None:  # the steps before this one do not come again
            self._whole_step()
            step.clear_gradients()
            assert self._loss is not None
            return self._loss
        with uninterrupted():
            self._second_side.bring_up_to_date()
            for part, updated in zip(plan, graph.updated, strict=True):
                refresh(part.space, part.ascent, part.rule.kernel, part.descent, updated)
            self._gpu.align_masks()
            graph.replay()
            self._finish(plan, graph)
        assert self._loss is not None
        return self._loss

    # ---- capturing ---------------------------------------------------------------------------------------

    def _capture(self) -> None:
        """Captures the step as it is now, for F-SAM in both places of its averages; leaves no trace of it."""
        counted = {k: v for k, v in self._optimizer.param_groups[0].items() if k == "steps"}
        with Unchanged(self._optimizer, self._model) as unchanged, self._second_side.read():
            renew_accumulators(self._optimizer, self._model)
            with self._gpu.warming_up():
                for left in reversed(range(_WARM_UP_STEPS)):
                    try:
                        with contextlib.nullcontext() if left else self._gpu.waiting_refused():
                            self._whole_step()
                    except RuntimeError as error:
                        raise error if left else cannot_capture(error) from error
                    self._optimizer.param_groups[0].update(counted)  # LookSAM's next step is of the kind of this one
            unchanged.all_modules_seen()
            for _ in range(2 if self._optimizer.recipe.averages else 1):
                found = key(self._optimizer.two_pass, self._plan())
                self._graphs[found] = self._record()
        self._optimizer.two_pass.clear_gradients()

    def _record(self) -> Graph:
        graph = Graph([Recording(table_of(space), space) for space in self._spaces])
        try:
            graph.replay = self._gpu.record(lambda: self._whole_step(graph))
            self._addresses.check()
        except Exception as error:
            for recording in graph.recordings:
                recording.abandon()
            self._optimizer.two_pass.perturbed = False  # nothing ran, and nothing can be restored in a broken capture
            raise cannot_capture(error) from error
        for recording in graph.recordings:
            recording.fill()
        graph.sums = self._optimizer.two_pass.sums
        return graph

    def _whole_step(self, graph: Graph | None = None) -> None:
        """The step itself: run to warm up, or captured as ``graph``."""
        passes = 0

        def evaluate(closure: Callable[..., Tensor]) -> Tensor:
            nonlocal passes
            passes += 1
            again = graph is not None and passes == 2 and self._shared_masks
            with self._gpu.masks_again() if again else contextlib.nullcontext():
                loss = closure(*self._inputs)
            if graph is not None:
                for space in self._spaces:
                    drop_cleared(space.owners)
                found = [[p.grad is not None for p in space.owners] for space in self._spaces]
                graph.climbed, graph.updated = (found, found) if passes == 1 else (graph.climbed, found)
            return loss

        # Not optimizer.step, which may estimate an eigenvector, and which schedulers count.
        part = self._ascent_closure
        loss = closures.step(
            self._optimizer,
            lambda: evaluate(self._closure),
            ascent_closure=None if part is None else lambda: evaluate(part),
            model=self._model,
            shared_masks=False,
            **self._clipping,
        )
        if not isinstance(loss, Tensor):
            raise TypeError(f"the closure returned a {type(loss).__name__}: a captured step needs the loss as a tensor")
        if self._loss is None:
            self._loss = torch.empty_like(loss.detach())
        self._loss.copy_(loss.detach())

    # ---- replaying ---------------------------------------------------------------------------------------

    def _check(self, batch: Sequence[Tensor]) -> None:
        optimizer = self._optimizer
        if optimizer.two_pass.perturbed or optimizer.two_pass.accumulated is not None:
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
        if list(optimizer.two_pass.spaces) != self._spaces:
            raise RuntimeError(f"the optimizer was rebuilt for other parameters since the step was captured: {AGAIN}")
        self._addresses.check()
        if own_numbers(optimizer) != self._own_numbers:
            raise RuntimeError(
                f"the recipe of {type(optimizer).__name__} computes with numbers of the groups, which are in the "
                f"graph therefore, and they changed: {AGAIN}, or keep what changes in a tensor on the GPU"
            )
        optimizer.two_pass.groups()

    def _refuse_gradients(self) -> None:
        """Raises ``RuntimeError`` for gradients from elsewhere, whose values nobody waits for; clears a step's."""
        found = [p for p in self._optimizer.two_pass.parameters() if not is_cleared(p)]
        if found:
            self._optimizer.two_pass.drop_left_gradients()
        if not all(map(is_cleared, found)):
            raise RuntimeError(
                "a captured step found gradients that it did not compute: call optimizer.zero_grad() first"
            )

    def _plan(self) -> list[Part]:
        """What the step's launches are given for each space now; state put there by others is copied into place."""
        step, rule = self._optimizer.two_pass, fused_rule(self._optimizer.base_optimizer)
        if rule is None:
            raise RuntimeError(f"the base optimizer runs its own step() now (a hook?), which is in no graph: {AGAIN}")
        if step.recipe.along_momentum:
            step.forget_momentum_marks()
        step.spaces.find_states(step.state)
        climbs = step.climbs()
        groups, options = step.groups(), dict(grad_scale=1.0, **self._clipping)
        keys = step.precision.keys(step.base.param_groups)
        plan = []
        for space in self._spaces:
            ascent = None
            if space.perturbed and step.recipe.stored is not None:
                space.adopt(step.recipe.stored, space.buffer(step.recipe.stored))
            if space.perturbed and climbs:
                ascent = passes.ascent(step.recipe, space, groups, 1.0, None, step.recipe.keeps_gradient)
            descent, buffers = passes.descent(step.recipe, step.base, space, rule, options, None, None, keys)
            if step.recipe.descends_by is not None and space.perturbed:
                descent.mixtures = in_the_graph
            plan.append(Part(space, rule, ascent, descent, buffers, step.recipe.along_momentum))
        return plan

    def _finish(self, plan: list[Part], graph: Graph) -> None:
        """What ``optimizer.step`` does on the host when its launches are on their way."""
        step = self._optimizer.two_pass
        for part, climbed, updated in zip(plan, graph.climbed, graph.updated, strict=True):
            if not all(part.descent.started):
                passes.publish(step.spaces, step.base, part.space, part.rule, part.buffers, updated)
            if step.recipe.averages and part.space.perturbed:
                assert part.ascent is not None
                kept = [had or now for had, now in zip(part.ascent.ema_started, climbed, strict=True)]
                averages.publish(step.spaces, step.state, part.space, kept)
            if step.recipe.stored is not None and part.ascent is not None:
                both = [a and b for a, b in zip(climbed, updated, strict=True)]
                stored = part.space.vector(step.recipe.stored)
                step.spaces.publish(part.space, step.state, step.recipe.stored, stored, both)
        step.sums = graph.sums
        self._optimizer._step_taken()
