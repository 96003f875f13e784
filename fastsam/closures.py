"""Whole steps from a closure, on top of the two passes.

    step(closure)         two passes over one batch, then the update
    finish(closure)       the same where the first backward pass was done outside
    accumulate(closure)   two passes over a micro-batch; its second gradients are added up in ``.grad``

Every one of them is a transaction: whatever exception leaves it, weights and state are as before. Of gradients,
``step`` leaves those that the update was made with, as torch's optimizers do, ``finish`` none, unless it failed before
it climbed from those it was called with, and ``accumulate`` those of earlier micro-batches.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from typing_extensions import Unpack

from fastsam.engine.averages import Accumulated
from fastsam.engine.step import Step
from fastsam.flat.flatten import clear_gradients, drop_cleared, is_cleared
from fastsam.flat.left import leave
from fastsam.loop.amp import Scaling
from fastsam.loop.foreign import any_foreign
from fastsam.loop.frozen import Frozen
from fastsam.loop.model_state import TwoPasses
from fastsam.support.interrupts import uninterrupted

Closure = Callable[[], Any]


class StepOptions(TypedDict, total=False):
    """The options of a step's second half, in every form of a step; see ``SharpnessAware.second_step``."""

    grad_scaler: GradScaler | None
    max_norm: float | None
    clip_value: float | None


class TwoPass(Protocol):
    """What these steps are made of: a :class:`fastsam.optimizer.SharpnessAware`."""

    two_pass: Step

    def first_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None) -> None: ...

    def second_step(self, zero_grad: bool = False, **options: Unpack[StepOptions]) -> None: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...


def step(
    optimizer: TwoPass,
    closure: Closure | None,
    *,
    ascent_closure: Closure | None = None,
    model: nn.Module | None = None,
    shared_masks: bool = True,
    **options: Unpack[StepOptions],
) -> Any:
    """:meth:`fastsam.optimizer.SharpnessAware.step` with a closure."""
    closure = _check_closure(closure, "step")
    two_pass = optimizer.two_pass
    if two_pass.perturbed:
        raise RuntimeError("step(closure) between first_step() and second_step(): finish that step, or restore()")
    if any_foreign(two_pass.parameters()):
        raise RuntimeError(
            "step(closure) found gradients that it did not compute: it evaluates the closure for both passes. "
            "If loss.backward() was called just before, write optimizer.finish(closure) instead of "
            "optimizer.step(closure); otherwise call optimizer.zero_grad() first. Where a framework accumulates or "
            "clips gradients, use fastsam.integrations"
        )
    _refuse_lost_micro_batches()
    optimizer.zero_grad()
    # The masks of a part of the batch are not those of the whole.
    passes = None if model is None else TwoPasses(model, shared_masks and ascent_closure is None)
    with two_pass.ranks.failures_named(), _own_gradients(optimizer):
        still = two_pass.stands_still()
        if not two_pass.climbs() or (two_pass.recipe.along_momentum and not still):
            two_pass.ranks.notice(model)
            loss = _one_evaluation(optimizer, closure, options)
        else:
            first = closure if ascent_closure is None or still else ascent_closure
            with _first_pass(two_pass, model, first):
                loss = _evaluate(two_pass, first, "closure" if first is closure else "ascent_closure")
            # A policy may have decided on this step by its first gradient: that is the update's if it is the batch's.
            done = two_pass.stands_still() and first is closure
            _second_half(optimizer, None if done else closure, passes, options)
        leave(two_pass.parameters())
    return loss


def finish(
    optimizer: TwoPass, closure: Closure, *, model: nn.Module | None = None, **options: Unpack[StepOptions]
) -> Any:
    """:meth:`fastsam.optimizer.SharpnessAware.finish`."""
    _check_closure(closure, "finish")
    two_pass = optimizer.two_pass
    if two_pass.perturbed:
        raise RuntimeError("finish(closure) between first_step() and second_step(): finish that step, or restore()")
    if not two_pass.has_gradients():
        raise RuntimeError(
            "finish(closure) found no gradients: call loss.backward() first, or optimizer.step(closure), "
            "which evaluates the closure for both passes"
        )
    if two_pass.recipe.along_momentum:
        raise RuntimeError(
            f"finish(closure) takes the gradients at hand for the first pass, which {two_pass.method} does without: "
            "call optimizer.step(closure), and no loss.backward() before it"
        )
    if not two_pass.climbs():
        optimizer.second_step(zero_grad=True, **options)
        return None
    passes = None if model is None else TwoPasses(model, shared_masks=False)
    with two_pass.ranks.failures_named():
        two_pass.ranks.notice(model)
        loss = _second_half(optimizer, closure, passes, options)
        optimizer.zero_grad()
    return loss


def accumulate(
    optimizer: TwoPass,
    closure: Closure,
    *,
    ascent_closure: Closure | None = None,
    grad_scaler: GradScaler | None = None,
    model: nn.Module | None = None,
    shared_masks: bool = True,
) -> Any:
    """:meth:`fastsam.optimizer.SharpnessAware.accumulate`."""
    _check_closure(closure, "accumulate")
    two_pass = optimizer.two_pass
    if two_pass.perturbed:
        raise RuntimeError("accumulate(closure) between first_step() and second_step(): finish that step first")
    so_far = two_pass.accumulated
    if so_far is not None and not two_pass.has_gradients():
        so_far = None  # cleared by model.zero_grad(): this is the first micro-batch of another step
    if so_far is None and any_foreign(two_pass.parameters()):
        raise RuntimeError("accumulate(closure) found gradients that it did not compute: call zero_grad() first")
    if so_far is None:
        two_pass.drop_left_gradients()
    if so_far is not None and so_far.scaling.scaler is not grad_scaler:
        raise RuntimeError("give the same grad_scaler to every accumulate() of a step, and to descend()")
    scaling = Scaling(grad_scaler, optimizer)
    passes = None if model is None else TwoPasses(model, shared_masks and ascent_closure is None)
    scaling.refuse_unscaled()
    with (
        two_pass.ranks.failures_named(),
        _accumulated_kept(two_pass, so_far),
        SetAside(two_pass.parameters()) as gradients,
        two_pass.or_restored(),
    ):
        if two_pass.recipe.along_momentum:
            two_pass.climb(scaling, so_far, micro_batch=True)
            loss = _evaluate(two_pass, closure)
        else:
            climbs = two_pass.climbs() and not two_pass.stands_still()
            first = ascent_closure if ascent_closure is not None and climbs else closure
            with _first_pass(two_pass, model, first):
                loss = _evaluate(two_pass, first, "closure" if first is closure else "ascent_closure")
            if passes is not None:
                passes.check_parameters(two_pass.base)
            if two_pass.climbs():
                scaling.refuse_unscaled()
                two_pass.climb(scaling, so_far, micro_batch=True)
                if first is not closure or not two_pass.stands_still():
                    two_pass.clear_gradients()
                    with contextlib.nullcontext() if passes is None else passes.second():
                        _evaluate(two_pass, closure)
            else:
                two_pass.refresh(so_far)
        scaling.refuse_unscaled()
        two_pass.spaces.collect_gradients()
        with uninterrupted():
            gradients.add_back()
            two_pass.keep_micro_batch(so_far, scaling)
            gradients.committed = True
    return loss


def make_blank_state(two_pass: Step) -> None:
    """Every entry that a checkpoint can fill; until one is loaded, the optimizer is as new for the next step."""
    with torch.no_grad():
        before = [p.clone() for p in two_pass.parameters()]
        two_pass.base.step()
        for p, weight in zip(two_pass.parameters(), before, strict=True):
            p.copy_(weight)
        perturbed = [p for group in two_pass.groups() if group["perturb"] for p in group["params"] if p.requires_grad]
        for p in perturbed:
            kept = two_pass.precision.of_state(p)
            if two_pass.recipe.averages:
                two_pass.state[p]["momentum"] = torch.full_like(p, math.nan, dtype=kept)  # marks one that never started
            if two_pass.recipe.eigenvector:
                two_pass.state[p]["eigenvector"] = torch.zeros_like(p, dtype=kept)
    two_pass.state_is_blank = True


def asks_for_blank_state(two_pass: Step) -> bool:
    """Whether this is torch.distributed.checkpoint: it steps with lr = 0 and zero gradients to see the state."""
    stands_still = not two_pass.state and all(float(g.get("lr", 1)) == 0 for g in two_pass.base.param_groups)
    return stands_still and not any_foreign(two_pass.parameters())


def _evaluate(two_pass: Step, closure: Closure, name: str = "closure") -> Any:
    """The closure's loss, once it is one and gradients are there."""
    with torch.enable_grad():
        loss = closure()
    if loss is None:
        raise TypeError(f"the {name} returned None: it must return the loss after loss.backward()")
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise TypeError(f"the {name} returned a tensor of shape {tuple(loss.shape)}: it must return the scalar loss")
    drop_cleared(two_pass.parameters())
    if not two_pass.has_gradients():
        raise RuntimeError(
            f"the {name} left no gradients: it must call loss.backward() before it returns the loss; if it does, "
            "the model has other parameters than those the optimizer was built with, as after "
            "load_state_dict(assign=True): build the optimizer again; or FSDP2 keeps them back, after "
            "set_requires_gradient_sync(False)"
        )
    return loss


def _first_pass(two_pass: Step, model: nn.Module | None, closure: Closure) -> contextlib.AbstractContextManager:
    """In which gradients stay on their process under m-sharpness."""
    context = two_pass.ranks.first_pass(model)
    if two_pass.ranks.awaits_static_graph():
        wrapped = two_pass.ranks.model
        assert wrapped is not None
        with Frozen(wrapped.parameters(), wrapped), torch.enable_grad():
            closure()
    return context


def _one_evaluation(optimizer: TwoPass, closure: Closure, options: StepOptions) -> Any:
    """A step that takes one gradient: at w + e without another before it, or at w."""
    two_pass = optimizer.two_pass
    with two_pass.or_restored():
        if two_pass.climbs():
            optimizer.first_step(grad_scaler=options.get("grad_scaler"))
        loss = _evaluate(two_pass, closure)
        optimizer.second_step(**options)
    return loss


def _second_half(optimizer: TwoPass, closure: Closure | None, passes: TwoPasses | None, options: StepOptions) -> Any:
    """From the first gradients on; returns the second loss. Without ``closure`` they are the second ones, too."""
    two_pass = optimizer.two_pass
    loss = None
    with two_pass.or_restored():
        if passes is not None:
            passes.check_parameters(two_pass.base)
        if closure is not None:
            optimizer.first_step(zero_grad=True, grad_scaler=options.get("grad_scaler"))
            with contextlib.nullcontext() if passes is None else passes.second():
                loss = _evaluate(two_pass, closure)
        optimizer.second_step(**options)
    return loss


@contextlib.contextmanager
def _accumulated_kept(two_pass: Step, so_far: Accumulated | None) -> Iterator[None]:
    """A closure's own zero_grad() abandons the micro-batches before it as little as an exception does."""
    two_pass.accumulated = so_far
    try:
        yield
    except BaseException:
        if two_pass.accumulated is None:
            two_pass.accumulated = so_far
        raise


@contextlib.contextmanager
def _own_gradients(optimizer: TwoPass) -> Iterator[None]:
    """Gradients of a step that failed are nobody's: the next step(closure) must not take them for a caller's."""
    try:
        yield
    except BaseException:
        optimizer.zero_grad()
        raise


class SetAside:
    """``with SetAside(params) as gradients``: cleared for the block, and put back if an exception leaves it."""

    def __init__(self, params: list[Tensor]) -> None:
        self._params = params
        self.committed = False  # nothing is to be put back any more

    def __enter__(self) -> SetAside:
        # Flattened gradients are zeroed where they are, and those that lie in a bucket of DistributedDataParallel
        # are overwritten: the values of a view need a copy.
        self._found = [p.grad for p in self._params]
        values = [None if is_cleared(p) else p.grad for p in self._params]
        self._kept = [g.clone() if g is not None and g._is_view() else g for g in values]
        clear_gradients(self._params, set_to_none=True)
        return self

    @torch.no_grad()
    def add_back(self) -> None:
        """Adds them to the gradients computed in the block."""
        for p, gradient in zip(self._params, self._kept, strict=True):
            if gradient is not None and p.grad is None:
                p.grad = gradient
            elif gradient is not None and p.grad is not None:
                p.grad.add_(gradient)

    @torch.no_grad()
    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or self.committed:
            return
        for p, found in zip(self._params, self._found, strict=True):
            p.grad = found
        clear_gradients(self._params, set_to_none=True)
        for p, gradient in zip(self._params, self._kept, strict=True):
            if gradient is not None and p.grad is not None:  # flattened, and zeroed where it is
                p.grad.copy_(gradient)
            elif gradient is not None:
                p.grad = gradient


def _check_closure(closure: Closure | None, method: str) -> Closure:
    if closure is None:
        raise TypeError(
            f"{method}() needs a closure that does a full forward and backward pass and returns the loss; "
            "in a manual loop call first_step() and second_step()"
        )
    return closure


def _refuse_lost_micro_batches() -> None:
    """Raises where Accelerate accumulates and calls ``step`` itself: it evaluates no closure but the last one's."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState._shared_state or state.GradientState().num_steps == 1:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "accelerate.optimizer":
        frame = frame.f_back
    if frame is not None:
        raise RuntimeError(
            f"Accelerate accumulates gradients over {state.GradientState().num_steps} micro-batches, but would "
            "evaluate the closure of the last alone: wrap the optimizer in fastsam.integrations.accelerate.SAMOptimizer"
        )
