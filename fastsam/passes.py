"""The two passes of a step underneath the optimizer's public face.

Every method here leaves weights and state as they were if it raises, and lets nothing but whole steps into the state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.autograd.graph import increment_version

from fastsam.amp import record_step, unscaling_factor
from fastsam.checks import at_least
from fastsam.descent import fused_rule
from fastsam.flat import FlatSpace
from fastsam.flatten import clear_gradients
from fastsam.interrupts import uninterrupted
from fastsam.kernels import Ascent, Descent
from fastsam.kernels.torch import all_finite, clipped
from fastsam.spaces import Spaces
from fastsam.untraced import leave_untraced

_UNTOUCHED = dict(grad_scale=1.0, max_norm=None, clip_value=None)


class Accumulated:
    """What micro-batches leave behind until ``descend``, besides the gradients themselves.

    ``met`` are the Gram sums of every first pass, added up: not finite if one of them was not. ``averages`` says, for
    each space, which parameters F-SAM's average in progress has met.
    """

    def __init__(self, spaces: Spaces, scaler: GradScaler | None) -> None:
        self.spaces = list(spaces)
        self.scaler = scaler
        self.met: Tensor | None = None
        self.averages: dict[int, list[bool]] = {}


class Passes(torch.optim.Optimizer):
    """Climb and descend over every flat space; :class:`~fastsam.optimizer.SharpnessAware` says when."""

    #: whether the last update was a fused one: such marks on a device what has never started (see ``Spaces``)
    _was_fused = True

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        leave_untraced(cls)

    @torch.no_grad()
    def _climb(self, grad_scaler: GradScaler | None, accumulated: Accumulated | None = None) -> None:
        groups = self._method_groups()
        for group in groups:
            self.check_group(group)
        self._forget_empty_state()
        self._spaces.refresh(self.param_groups, self.state)
        self._ranks.verify(self, [space.shard_groups for space in self._spaces])
        if accumulated is not None and accumulated.spaces != list(self._spaces):
            raise RuntimeError("parameters changed between two accumulate() of a step: call zero_grad() to start again")
        self._spaces.collect_gradients()
        for space in self._spaces:
            space.climbed = [False] * len(space.params)
        climbing = [space for space in self._spaces if space.perturbed]
        factor = unscaling_factor(grad_scaler, self)
        ascents = [self._ascent(space, groups, factor, accumulated) for space in climbing]
        sums = [space.kernels.gram(space, a) for space, a in zip(climbing, ascents, strict=True)]
        sums = self._spaces.total(climbing, sums)
        with self._or_restored(), uninterrupted():
            self._perturbed = True
            self._first_scaler = grad_scaler
            self._sums = sums
            for space, ascent in zip(climbing, ascents, strict=True):
                space.kernels.climb(space, ascent, sums.to(space.device))
                increment_version(space.owners)  # backward through a graph from before the step is an error
            self._weights_changed()
        self._spaces.release_gradients()

    @torch.no_grad()
    def _update(self, accumulated: Accumulated | None, options: dict) -> None:
        """The second half of a step: after a climb, or with the gradients of ``accumulated`` micro-batches."""
        grad_scaler, clipping = options.pop("grad_scaler", None), {"max_norm": None, "clip_value": None, **options}
        expected, first = (
            (self._first_scaler, self._sums) if accumulated is None else (accumulated.scaler, accumulated.met)
        )
        with self._or_restored(), uninterrupted():
            check_clipping(**clipping)
            if grad_scaler is not expected:
                raise RuntimeError("give the same grad_scaler to both passes: to first_step() and second_step()")
            if accumulated is not None and accumulated.spaces != list(self._spaces):
                raise RuntimeError("parameters changed since accumulate(closure): call zero_grad() to start again")
            factor = unscaling_factor(grad_scaler, self)
            self._spaces.find_states(self.state)
            self._spaces.follow()
            self._spaces.collect_gradients()
            guard = Ascent(self._method_groups(), grad_scale=factor, met=first)
            sums = [space.kernels.gram(space, guard) for space in self._spaces]
            self._sums = self._ranks.agreed(self._spaces.total(self._spaces, sums))
            options = dict(grad_scale=factor, **clipping)
            rule = fused_rule(self.base_optimizer)
            if rule is None and self._was_fused:  # before a hook came, say
                self._forget_marks()
            self._was_fused = rule is not None
            if rule is None:
                committed = self._restore_then_base_step(options)
                self._spaces.find_states(self.state)  # of which that may have added some
            else:
                committed = not self._spaces.decide_on_host or self._finite()
                for space in self._spaces:
                    self._descend(space, rule, options, accumulated, committed)
            self._weights_changed()
            if grad_scaler is not None:
                record_step(grad_scaler, self, self.found_inf)
            if self.uses_ema and committed:
                self._keep_averages(accumulated)
            self._perturbed = False
            self._accumulated = None
        self._spaces.release_gradients()
        self._step_taken()

    @staticmethod
    def _weights_changed() -> None:
        """Inside one autocast around both passes the second would be given the casts of the first one's weights."""
        torch.clear_autocast_cache()

    def _step_taken(self) -> None:
        """At the end of every step, whether it counted or not."""
        self._opt_called = self.base_optimizer._opt_called = True  # what schedulers look for

    @torch.no_grad()
    def _keep_micro_batch(self, so_far: Accumulated | None, scaler: GradScaler | None) -> None:
        """Puts the weights back after a micro-batch; its sums and averages wait for ``descend``."""
        kept = Accumulated(self._spaces, scaler)
        kept.met = self._sums.clone() if so_far is None else so_far.met + self._sums
        for i, space in enumerate(self._spaces):
            if self.uses_ema and space.perturbed:
                before = "momentum" if so_far is None else "momentum_accumulated"
                started = self._averaged(space) if so_far is None else so_far.averages[i]
                kept.averages[i] = _carry_over(space, before, started)
                space.buffer("momentum_accumulated")
                space.swap("momentum_next", "momentum_accumulated")
        self.restore()
        for space in self._spaces:
            space.climbed = [False] * len(space.params)
        self._accumulated = kept

    def _ascent(self, space: FlatSpace, groups: list[dict], grad_scale, accumulated: Accumulated | None) -> Ascent:
        ascent = Ascent(groups, self.coefficients, weighted=self.weighted_norm, grad_scale=grad_scale)
        if self.uses_ema:
            ascent.ema_started = space.adopt("momentum", space.buffer("momentum"))
            ascent.ema = space.buffer("momentum").flat
            if accumulated is not None:
                ascent.ema_started = accumulated.averages[accumulated.spaces.index(space)]
                ascent.ema = space.buffer("momentum_accumulated").flat
            ascent.ema_next = space.buffer("momentum_next").flat
        if self.uses_eigenvector and any(space.adopt("eigenvector", space.buffer("eigenvector"))):
            ascent.vector = space.buffer("eigenvector").flat
        return ascent

    def _finite(self) -> bool:
        """Whether the step counts: waits for the sums."""
        return all_finite(self._sums.tolist())

    def _descend(self, space: FlatSpace, rule, options: dict, accumulated: Accumulated | None, committed: bool) -> None:
        """The fused update of one space. ``committed``: the step counts, as far as the host knows without waiting.

        Where a device decides, its kernels leave every buffer as it was if the sums are not finite.
        """
        descent, buffers = self._descent(space, rule, options, accumulated)
        getattr(space.kernels, rule.kernel)(space, descent, self._sums.to(space.device))
        if committed and not all(descent.started):
            self._publish_base_state(space, rule, buffers, [g is not None for g in space.gradients])

    def _publish_base_state(self, space: FlatSpace, rule, buffers: dict, updated: list[bool]) -> None:
        """What a fused update of the ``updated`` parameters wrote becomes the base optimizer's state."""
        kept = [rule.keeps(group) for group in self.param_groups]
        which = [u and kept[i] for u, i in zip(updated, space.groups, strict=True)]
        for name, buffer in buffers.items():
            self._spaces.publish(space, self.state, name, buffer, which)

    def _descent(self, space: FlatSpace, rule, options: dict, accumulated: Accumulated | None) -> tuple[Descent, dict]:
        """What the second pass over one space is given, and the base optimizer's buffers there by their names."""
        buffers = {
            name: space.step_counts() if name == "step" else space.buffer(name)
            for name in rule.state_names(self.param_groups)
        }
        started = [True] * len(space.params)
        for name, buffer in buffers.items():
            started = space.adopt(name, buffer)
        descent = Descent(rule.groups(self.param_groups), {k: b.flat for k, b in buffers.items()}, started, **options)
        if self.uses_ema and space.perturbed:
            latest = "momentum_next" if accumulated is None else "momentum_accumulated"
            descent.ema, descent.ema_next = space.buffer("momentum").flat, space.buffer(latest).flat
        return descent, buffers

    def _restore_then_base_step(self, options: dict) -> bool:
        """The update of a base optimizer without a fused descend; whether the step counts."""
        for space in self._spaces:
            space.kernels.restore(space)
        if not self._finite():  # a base optimizer cannot decide on the device
            return False
        if options != _UNTOUCHED:
            descent, squared_norm = Descent(self.param_groups, {}, (), **options), self._sums[0].item()
            for g in (g for space in self._spaces for g in space.gradients if g is not None):
                g.copy_(clipped(g * descent.grad_scale, descent, squared_norm))
        with self._own_state_hidden():
            self.base_optimizer.step()
        return True

    def _forget_marks(self) -> None:
        """Takes out of the state what a device marked as never started, before anybody else reads it; waits for it."""
        if not self._spaces.decide_on_host and not self._state_is_empty:
            self._spaces.forget_never_started(self.state)

    @contextlib.contextmanager
    def _own_state_hidden(self) -> Iterator[None]:
        """Lets the base optimizer see its own state alone.

        Optimizers take a parameter whose state is not empty for one they have met. An entry of theirs that is called
        as one of the method's is called ``base_<name>`` outside.
        """
        names = [name for name, own in (("momentum", self.uses_ema), ("eigenvector", True)) if own]
        hidden = []
        for p, state in self._entries():
            for name in names:
                if name in state:
                    hidden.append((p, name, state.pop(name)))
                if f"base_{name}" in state:
                    state[name] = state.pop(f"base_{name}")
        try:
            yield
        finally:
            for _, state in self._entries():
                for name in names:
                    if name in state:
                        state[f"base_{name}"] = state.pop(name)
            for p, name, value in hidden:
                self.state[p][name] = value

    def _entries(self) -> list[tuple[Tensor, dict]]:
        """Each parameter's state; what base optimizers keep beside it under a name is none of ours."""
        return [(p, entry) for p, entry in self.state.items() if isinstance(p, Tensor)]

    def _averaged(self, space: FlatSpace) -> list[bool]:
        """Which parameters F-SAM's average has met."""
        return [entry is not None and "momentum" in entry for entry in space.states]

    def _keep_averages(self, accumulated: Accumulated | None) -> None:
        """The averages written by climb become the state."""
        for i, space in enumerate(self._spaces):
            if not space.perturbed:
                continue
            if accumulated is None:
                kept = space.climbed
                if not all(kept):
                    kept = _carry_over(space, "momentum", self._averaged(space))
            else:
                space.swap("momentum_accumulated", "momentum_next")
                kept = accumulated.averages[i]
                if not self._spaces.decide_on_host:
                    self._abandon_averages(space, kept)
            self._spaces.publish(space, self.state, "momentum", space.buffer("momentum_next"), kept)
            space.swap("momentum", "momentum_next")

    def _abandon_averages(self, space: FlatSpace, kept: list[bool]) -> None:
        """What descend's kernels do where the step does not count, for parameters without a gradient there."""
        old, new, finite = space.buffer("momentum"), space.buffer("momentum_next"), self._sums.isfinite().all()
        for i, g in enumerate(space.gradients):
            if kept[i] and g is None:
                new.views[i].copy_(torch.where(finite.to(space.device), new.views[i], old.views[i]))

    def _clear_gradients(self, set_to_none: bool = True) -> None:
        clear_gradients(self._every_parameter(), set_to_none)

    @contextlib.contextmanager
    def _or_restored(self) -> Iterator[None]:
        """Whatever exception leaves the block, the weights are back before it goes on."""
        try:
            yield
        except BaseException:
            self.restore()
            raise


def _carry_over(space: FlatSpace, before: str, started: list[bool]) -> list[bool]:
    """Parameters without a gradient in this pass keep the average they had; says which have one now."""
    old, new = space.buffer(before), space.buffer("momentum_next")
    for i, (had, climbed) in enumerate(zip(started, space.climbed, strict=True)):
        if had and not climbed:
            new.views[i].copy_(old.views[i])
    return [had or climbed for had, climbed in zip(started, space.climbed, strict=True)]


def check_clipping(max_norm: float | None, clip_value: float | None) -> None:
    if max_norm is not None and clip_value is not None:
        raise ValueError(f"max_norm={max_norm!r} and clip_value={clip_value!r}: clip by one of them")
    for name, value in (("max_norm", max_norm), ("clip_value", clip_value)):
        if value is not None:
            at_least(0, name, value)
