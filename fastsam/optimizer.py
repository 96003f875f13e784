"""The optimizer that every method is: a step, in every form in which training loops write one.

A :class:`SharpnessAware` optimizer *has* a :class:`~fastsam.engine.step.Step`, ``two_pass``, and is none itself. Whole
steps from a closure are in ``fastsam/closures.py``; groups, state and checkpoints in ``fastsam/engine/wrapper.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypedDict

from torch import Tensor, nn
from torch.amp import GradScaler
from typing_extensions import Unpack

from fastsam import closures
from fastsam.closures import Closure, StepOptions
from fastsam.engine.wrapper import BaseOptimizer, Params, Wrapper
from fastsam.loop.amp import Scaling
from fastsam.support.untraced import leave_untraced

__all__ = [
    "BaseOptimizer",
    "Closure",
    "ClosureOptions",
    "FinishOptions",
    "MicroBatchOptions",
    "Params",
    "SharpnessAware",
    "StepOptions",
]


class FinishOptions(StepOptions, total=False):
    """The options of :meth:`SharpnessAware.finish`."""

    model: nn.Module | None


class ClosureOptions(FinishOptions, total=False):
    """The options of :meth:`SharpnessAware.step`."""

    ascent_closure: Closure | None
    shared_masks: bool


class MicroBatchOptions(TypedDict, total=False):
    """The options of :meth:`SharpnessAware.accumulate`."""

    ascent_closure: Closure | None
    grad_scaler: GradScaler | None
    model: nn.Module | None
    shared_masks: bool


class SharpnessAware(Wrapper):
    """Base class of the methods, which name a recipe and the arguments of their hyper-parameters.

    Args:
        params: parameters or groups.
        base_optimizer: an optimizer class, such as ``torch.optim.SGD``.
        defaults: the method's hyper-parameters.
        backend: ``"auto"``, or a name from :func:`fastsam.backends`.
        base_kwargs: arguments of the base optimizer; also ``m_sharpness``, ``process_group``, and those of
            :class:`~fastsam.engine.precision.Precision`: ``state_dtype``, ``stochastic_rounding``, ``rounding_seed``.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        leave_untraced(cls)

    # ---- the two passes --------------------------------------------------------------------------------

    def first_step(self, zero_grad: bool = False, *, grad_scaler: GradScaler | None = None) -> None:
        """Climbs: w <- w + e, from the gradients at w. ``zero_grad`` clears them afterwards.

        With a ``grad_scaler`` the gradients are those of ``grad_scaler.scale(loss)`` (see ``fastsam.loop.amp``).

        Raises ``RuntimeError`` if the weights are perturbed already, ``ValueError`` or ``TypeError`` for
        gradients or hyper-parameters that cannot be used; nothing has changed then.
        """
        if self.two_pass.perturbed:
            raise RuntimeError(
                "first_step() was called twice in a row: the weights are perturbed already; "
                "call second_step(), or restore() to abandon the step"
            )
        if self.two_pass.accumulated is not None:
            raise RuntimeError(
                "first_step() after accumulate(closure): call descend() for the step's update, or zero_grad() before "
                "the backward pass to abandon it"
            )
        if not self.two_pass.climbs():
            raise RuntimeError(
                f"first_step() where {self.two_pass.method} takes no second gradient: with those at w call "
                "second_step(); optimizer.evaluations says how many a step takes"
            )
        self.two_pass.climb(Scaling(grad_scaler, self))
        if zero_grad:
            self.zero_grad()

    def second_step(
        self,
        zero_grad: bool = False,
        *,
        grad_scaler: GradScaler | None = None,
        max_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        """Restores w and applies the base optimizer's update with the gradients at w + e.

        ``max_norm`` clips these to a global norm, ``clip_value`` each to a magnitude, as torch's ``clip_grad_norm_``
        and ``clip_grad_value_`` do, without a pass of its own. ``grad_scaler``: the one given to ``first_step``.

        After any exception the weights are restored and no state has changed. Raises ``RuntimeError`` without a
        ``first_step`` before it in a step of two :attr:`evaluations`, and in MomentumSAM's.
        """
        if not self.two_pass.perturbed and self.two_pass.climbs():
            if not self.two_pass.stands_still():
                raise RuntimeError(
                    "second_step() without first_step(): compute gradients, call first_step(), then again"
                )
            if self.two_pass.accumulated is not None:
                raise RuntimeError("second_step() after accumulate(closure): call descend() for the step's update")
            scaling = Scaling(grad_scaler, self)
            self.two_pass.climb(scaling)  # by 0, so that averages move on
            scaling.read_again()
        self._update(grad_scaler, max_norm, clip_value)
        if zero_grad:
            self.zero_grad()

    def descend(self, zero_grad: bool = False, **options: Unpack[StepOptions]) -> None:
        """The base optimizer's update at w with the gradients of every :meth:`accumulate` since the last step.

        ``options`` as in :meth:`second_step`; clipping is of the accumulated gradient. If any pass of any micro-batch
        met a NaN or an infinity, nothing changes. Raises ``RuntimeError`` without an ``accumulate`` before it; the
        weights and the state have not changed then, nor after any other exception.
        """
        if self.two_pass.perturbed:
            raise RuntimeError("descend() between first_step() and second_step(): call second_step()")
        if self.two_pass.accumulated is None:
            raise RuntimeError("descend() without accumulate(closure): after first_step() call second_step()")
        self._update(**options)
        if zero_grad:
            self.zero_grad()

    @property
    def evaluations(self) -> int:
        """How many times the next step has its loss evaluated, for loops by hand: 2, or 1.

        1 where ``rho`` is 0 in every group and in LookSAM's steps between, in which ``first_step()`` is left out, and
        for MomentumSAM, whose ``first_step()`` comes before the only backward pass.
        """
        return self.two_pass.evaluations()

    def restore(self) -> None:
        """Puts the weights back and abandons the step; does nothing if they are not perturbed.

        Wherever they lie by now: a model may have been moved or cast meanwhile. Raises ``RuntimeError``, when all
        others are back, for a parameter that was given another shape.
        """
        self.two_pass.restore()

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """``with opt.perturbed(): ...``: climbs on entry, restores the weights on exit whatever happens.

        No update is made. The gradients at entry give the perturbation.
        """
        self.first_step()
        try:
            yield
        finally:
            self.restore()

    def _update(
        self,
        grad_scaler: GradScaler | None = None,
        max_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        """The second half of a step in any form, around it the hooks that torch runs around a step.

        The base optimizer's hooks and the global ones are run by its own ``step()``, which makes the update where
        there are any; those before a step see the weights w and the gradients that the update is made with.
        Lightning's manual optimization counts the steps of its own wrapper, whose class inherits from this one.
        """
        begins, ends = getattr(self, "_on_before_step", None), getattr(self, "_on_after_step", None)
        if begins is not None:
            begins()
        hooks = self._run_pre_hooks if self._optimizer_step_pre_hooks else None
        clipping = dict(max_norm=max_norm, clip_value=clip_value)
        self.two_pass.update(Scaling(grad_scaler, self), clipping, self.two_pass.accumulated, hooks)
        self._step_taken()
        for hook in self._optimizer_step_post_hooks.values():
            hook(self, (), {})
        if ends is not None:
            ends()

    def _run_pre_hooks(self) -> None:
        for hook in self._optimizer_step_pre_hooks.values():
            if hook(self, (), {}) is not None:
                raise TypeError(
                    "a hook before the step of a fastsam optimizer cannot change its arguments: return None"
                )

    def _step_taken(self) -> None:
        """At the end of every step, whether it counted or not."""
        self._opt_called = self.two_pass.base._opt_called = True  # what schedulers look for
        if "steps" in self.two_pass.defaults:
            self.param_groups[0]["steps"] += 1

    # ---- whole steps from a closure ----------------------------------------------------------------------

    def step(
        self,
        closure: Closure | None = None,
        *,
        ascent_closure: Closure | None = None,
        model: nn.Module | None = None,
        shared_masks: bool = True,
        **options: Unpack[StepOptions],
    ) -> Any:
        """One whole step. ``closure`` does a full forward and backward pass and returns the loss.

        It is evaluated :attr:`evaluations` times: at w and at w + e, or once. ``ascent_closure``, the same for a part
        of the batch, is what the first of two passes evaluates then: with a quarter of it a step costs 1.25 gradients.
        Gradients are cleared before each pass; those of the last one are left, and the first loss is returned. With
        ``model`` the second pass leaves its buffers (BatchNorm's statistics) and frozen weights alone and draws the
        dropout masks of the first, or fresh ones without ``shared_masks`` and after a part of the batch, whose masks
        and statistics are the part's (see ``fastsam.loop.model_state``). ``options`` are those of :meth:`second_step`.

        Raises ``RuntimeError`` if gradients from elsewhere are present: they would be lost (see :meth:`finish`), and
        ``TypeError`` for a closure that is missing or returns no scalar loss.
        """
        if closure is None and closures.asks_for_blank_state(self.two_pass):
            return closures.make_blank_state(self.two_pass)
        return closures.step(
            self, closure, ascent_closure=ascent_closure, model=model, shared_masks=shared_masks, **options
        )

    def finish(self, closure: Closure, *, model: nn.Module | None = None, **options: Unpack[StepOptions]) -> Any:
        """The step of ``loss.backward(); optimizer.finish(closure)``, as davda54's and F-SAM's code write it.

        The gradients at hand are those of the first pass; ``closure`` (a full forward and backward pass) is
        evaluated once, at w + e. Gradients are cleared on return; the closure's loss is returned, or None in LookSAM's
        steps between, which do not evaluate it. With ``model`` the closure leaves its buffers alone; its masks are
        fresh, as nobody noted what the first pass drew.
        """
        return closures.finish(self, closure, model=model, **options)

    def accumulate(
        self,
        closure: Closure,
        *,
        ascent_closure: Closure | None = None,
        grad_scaler: GradScaler | None = None,
        model: nn.Module | None = None,
        shared_masks: bool = True,
    ) -> Any:
        """One micro-batch of a step with a perturbation for each (m-sharpness); :meth:`descend` ends the step.

        Climbs from the micro-batch's own gradients, evaluates ``closure`` again at w + e (not where ``rho`` is 0, as in
        :meth:`step`), restores w, and adds these second gradients to ``.grad``. Divide the loss by the number of
        micro-batches for their mean. The first loss is returned; the other arguments are those of :meth:`step`.
        F-SAM's average is fed once a micro-batch: that is the batch of this perturbation: d = g - sigma m then
        subtracts like from like whatever the loss was divided by, and ``lmbda`` counts micro-batches. It becomes state
        in :meth:`descend`, for which it takes one more weight-sized buffer. Eigen-SAM refreshes an eigenvector that is
        due before the first micro-batch of a step.

        After any exception weights, state and accumulated gradients are as before the call. ``zero_grad()`` abandons
        what was accumulated. Raises ``RuntimeError`` for gradients from elsewhere, and as :meth:`first_step` does.
        Source: Foret et al. 2021, section 4.1.
        """
        return closures.accumulate(
            self,
            closure,
            ascent_closure=ascent_closure,
            grad_scaler=grad_scaler,
            model=model,
            shared_masks=shared_masks,
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears every gradient; those of :func:`fastsam.flatten_parameters` are zeroed where they are."""
        self.two_pass.accumulated = None
        self.two_pass.clear_gradients(set_to_none)

    @property
    def found_inf(self) -> Tensor:
        """1.0 where the last step met a NaN or an infinity and changed nothing, else 0.0; float32, 0-dimensional.

        A tensor on the device of the first parameter, so that reading the attribute does not wait for it.
        """
        return self.two_pass.found_inf()

    @found_inf.setter
    def found_inf(self, _: object) -> None:  # what GradScaler.step does first
        raise RuntimeError(
            "grad_scaler.step(optimizer) cannot run two passes: write optimizer.first_step(grad_scaler=scaler), "
            "then optimizer.second_step(grad_scaler=scaler) and scaler.update()"
        )

    #: Has GradScaler.step call us even where it found an overflow: nobody else would restore the weights.
    _step_supports_amp_scaling = True


leave_untraced(SharpnessAware)
