"""One two-pass step: what is perturbed, its sums, what is accumulated, and the two passes themselves.

    climb     u from the gradients at w;  w <- w + e
    update    w restored;  the base optimizer's update with the gradients at w + e

An optimizer *has* a :class:`Step`. Frameworks wrap optimizers and copy or delegate their attributes: all of them reach
this one object, and through it one base optimizer, which owns the groups and the state. Every method leaves weights and
state as they were if it raises, and lets nothing but whole steps into the state.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastsam.engine import averages, passes
from fastsam.engine.averages import Accumulated
from fastsam.engine.base_rules import fused_rule
from fastsam.engine.base_update import entries, update_at_weights
from fastsam.engine.groups import named
from fastsam.engine.recipe import Group, Recipe
from fastsam.engine.repeated import RepeatedGradient
from fastsam.engine.second_side import SecondSide
from fastsam.engine.spaces import Spaces
from fastsam.flat.flatten import clear_gradients, is_cleared
from fastsam.flat.left import is_left
from fastsam.kernels import Ascent
from fastsam.kernels.torch import all_finite
from fastsam.loop.amp import Scaling
from fastsam.support.checks import check_clipping
from fastsam.support.interrupts import uninterrupted
from fastsam.support.plain_mode import PlainMode


class Unbuilt:
    """Stands where the base optimizer will be, while the groups that it is built from are collected."""

    def __init__(self) -> None:
        self.param_groups: list[Group] = []
        self.state: dict = defaultdict(dict)


class Step:
    """The two-pass step of one optimizer.

    Args:
        recipe: the method's mathematics.
        method: its name, for messages.
        defaults: of its hyper-parameters, by their names in the groups.
        aliases: names in the groups of those that the base optimizer has another meaning for.
        spaces: none yet; they know the backend, the other processes and how what is kept is stored.
    """

    def __init__(self, recipe: Recipe, method: str, defaults: Group, aliases: dict[str, str], spaces: Spaces) -> None:
        self.recipe, self.method, self.defaults, self.aliases = recipe, method, defaults, aliases
        self.spaces, self.ranks, self.precision = spaces, spaces.ranks, spaces.precision
        self.base: Any = Unbuilt()
        self._begin()

    def _begin(self) -> None:
        self.perturbed = False
        #: Gram sums of the last pass: a step counts if they are finite. None before the first.
        self.sums: Tensor | None = None
        self.accumulated: Accumulated | None = None
        #: whether the state has every entry that a checkpoint can fill, and nothing in them yet
        self.state_is_blank = False
        #: whether the last update was a fused one: such marks on a device what has never started (see ``Spaces``)
        self.was_fused = True
        self._scaling: Scaling | None = None  # the climb's
        self._repeated = RepeatedGradient(self.recipe)
        self._momentum_seen = 0

    def __getstate__(self) -> dict:
        """What a copy keeps: no buffers, nothing of a step in progress, and a base optimizer that its owner sets."""
        kept = {name: self.__dict__[name] for name in ("recipe", "method", "defaults", "aliases", "ranks", "precision")}
        return {**kept, "backend": self.spaces.backend}

    def __setstate__(self, state: dict) -> None:
        backend = state.pop("backend")
        self.__dict__.update(state)
        self.spaces = Spaces(backend, self.ranks, self.precision)
        self.base = Unbuilt()
        self._begin()

    # ---- what the base optimizer owns ------------------------------------------------------------------------

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The one state of base optimizer and method; an ordinary dict put there becomes a ``defaultdict``."""
        state = self.base.state
        if not isinstance(state, defaultdict):
            state = self.base.state = defaultdict(dict, state)
        return state

    def groups(self) -> list[Group]:
        """The groups with the recipe's own names, checked; see :func:`~fastsam.engine.groups.named`."""
        return [named(group, self.recipe, self.defaults, self.aliases) for group in self.base.param_groups]

    @property
    def own_names(self) -> list[str]:
        """The names of the method's entries in the state, which no base optimizer may take for its own."""
        recipe = self.recipe
        own = {"momentum": recipe.averages, "eigenvector": True, str(recipe.stored): recipe.stored is not None}
        return [name for name, kept in own.items() if kept]

    def parameters(self) -> list[Tensor]:
        return [p for group in self.base.param_groups for p in group["params"]]

    # ---- the two passes --------------------------------------------------------------------------------------

    def climbs(self) -> bool:
        """Whether the next step has a climb; LookSAM's have one every now and then."""
        return self.recipe.along_momentum or self._gradients() == 2

    def evaluations(self) -> int:
        """How many times the next step has its loss evaluated, with backward."""
        return 1 if self.stands_still() else self._gradients()

    def _gradients(self) -> int:
        group = named(self.base.param_groups[0], self.recipe, self.defaults, self.aliases)
        return self.recipe.evaluations(group.get("steps", 0), group)

    def climb(self, scaling: Scaling, so_far: Accumulated | None = None, micro_batch: bool = False) -> None:
        """w <- w + e from the gradients at w; for a ``micro_batch`` after those ``so_far``."""
        with PlainMode():
            groups = self.refresh(so_far)
            climbing = [space for space in self.spaces if space.perturbed]
            factor: float | Tensor = 1.0
            if self.recipe.along_momentum:
                self.forget_momentum_marks()
                for space in climbing:
                    passes.along_momentum(self.base, space)
            else:
                self.spaces.collect_gradients()
                factor = scaling.factor()
            keeps = self.recipe.keeps_gradient or (micro_batch and self.recipe.descends_by is not None)
            ascents = [passes.ascent(self.recipe, space, groups, factor, so_far, keeps) for space in climbing]
            for space in climbing if keeps else ():
                passes.zero_missing(space)
            sums = [space.kernels.gram(space, a) for space, a in zip(climbing, ascents, strict=True)]
            total = self.spaces.total(climbing, sums)
            with self.or_restored(), uninterrupted():
                self.perturbed = True
                self._scaling = scaling
                self.sums = total
                for space, ascent in zip(climbing, ascents, strict=True):
                    space.kernels.climb(space, ascent, total.to(space.device))
                    increment_version(space.owners)  # backward through a graph from before the step is an error
                _weights_changed()
            self.spaces.release_gradients()

    def refresh(self, so_far: Accumulated | None = None) -> list[Group]:
        """Before the first pass of a step: the spaces as the groups are now; returns these, checked."""
        groups = self.groups()
        self.forget_blank_state()
        self.spaces.refresh(self.base.param_groups, self.state)
        self.ranks.verify(self.method, self.base, [space.shard_groups for space in self.spaces])
        if so_far is not None and so_far.spaces != list(self.spaces):
            raise RuntimeError("parameters changed between two accumulate() of a step: call zero_grad() to start again")
        for space in self.spaces:
            space.climbed = [False] * len(space.params)
        return groups

    def update(
        self,
        scaling: Scaling,
        clipping: dict,
        accumulated: Accumulated | None = None,
        at_weights: Callable[[], None] | None = None,
    ) -> None:
        """The second half of a step: after a climb, or with the gradients of ``accumulated`` micro-batches.

        ``clipping`` has ``max_norm`` and ``clip_value``. ``at_weights`` is called before the update, at w and with its
        gradients; the base optimizer then makes it in a pass of its own.
        """
        with PlainMode(), self.or_restored(), uninterrupted():
            check_clipping(**clipping)
            met = self._first_sums(scaling, accumulated)
            factor = scaling.factor()
            self.spaces.follow(self.base.param_groups, self.state)
            self.spaces.collect_gradients()
            groups = self.groups()
            second_side = None
            if self.recipe.descends_by is not None:
                second_side = SecondSide(self.recipe, groups, met, accumulated, clipping["max_norm"])
            guard = Ascent(self.base.param_groups, grad_scale=factor, met=met)
            sums = []
            for space in self.spaces:
                guard.vector = None if second_side is None else second_side.vector(space, factor)
                sums.append(space.kernels.gram(space, guard))
            self.sums = self.ranks.agreed(self.spaces.total(list(self.spaces), sums))
            if second_side is not None:
                second_side.add_up(self.spaces, sums, self.sums)
            if accumulated is None and met is not None and self.spaces.decide_on_host:
                self._repeated.look(met, self.sums, self.spaces, groups)
            rule = None if at_weights else fused_rule(self.base)
            keys = self.precision.keys(self.base.param_groups)
            if rule is None and keys is not None:
                raise RuntimeError(
                    "stochastic_rounding=True, but something hooked into step(), so that the base optimizer makes the "
                    "update itself and rounds to the nearest: remove that hook"
                )
            if rule is None and self.was_fused:  # before a hook came, say
                self.forget_marks()
            self.was_fused = rule is not None
            options = dict(grad_scale=factor, **clipping)
            if rule is None:
                for space in self.spaces:
                    space.kernels.restore(space)
                committed = self.counts()  # a base optimizer cannot decide on the device
                if committed:
                    values = self.sums.tolist()
                    update_at_weights(self.base, self.spaces, self.own_names, values, options, second_side, at_weights)
            else:
                committed = not self.spaces.decide_on_host or self.counts()
                for space in self.spaces:
                    descent, buffers = passes.descent(
                        self.recipe, self.base, space, rule, options, accumulated, second_side, keys
                    )
                    getattr(space.kernels, rule.kernel)(space, descent, self.sums.to(space.device))
                    if committed and not all(descent.started):
                        updated = [g is not None for g in space.gradients]
                        passes.publish(self.spaces, self.base, space, rule, buffers, updated)
            _weights_changed()
            if scaling.scaler is not None:
                scaling.step_taken(self.found_inf())
            if committed:
                if self.recipe.averages:
                    averages.keep(self.spaces, self.state, self.sums, accumulated)
                if self.recipe.stored is not None and met is not None:
                    passes.keep_stored(self.recipe, self.spaces, self.base)
            self.perturbed = False
            self.accumulated = None
            self.spaces.release_gradients()

    def _first_sums(self, scaling: Scaling, accumulated: Accumulated | None) -> Tensor | None:
        """The sums of the first pass of the step, or None where it made none; checks that the step can be finished."""
        if accumulated is None and not self.perturbed:
            self.refresh()
            return None
        first, met = (self._scaling, self.sums) if accumulated is None else (accumulated.scaling, accumulated.met)
        assert first is not None
        if scaling.scaler is not first.scaler:
            raise RuntimeError("give the same grad_scaler to both passes: to first_step() and second_step()")
        if accumulated is not None and accumulated.spaces != list(self.spaces):
            raise RuntimeError("parameters changed since accumulate(closure): call zero_grad() to start again")
        return met

    def forget_momentum_marks(self) -> None:
        """Before a climb along momentum that a device may not have begun: waits where parameters have a new one."""
        started = sum(name in entry for _, entry in entries(self.state) for name in passes.MOMENTA)
        if started != self._momentum_seen:
            self.forget_marks()
            self.spaces.find_states(self.state)
            self._momentum_seen = sum(name in entry for _, entry in entries(self.state) for name in passes.MOMENTA)

    def keep_micro_batch(self, so_far: Accumulated | None, scaling: Scaling) -> None:
        """Puts the weights back after a micro-batch; its sums and averages wait for the update."""
        met = None
        if self.perturbed:
            assert self.sums is not None
            met = self.sums.clone() if so_far is None or so_far.met is None else so_far.met + self.sums
        kept = Accumulated(self.spaces, scaling, met)
        if self.recipe.averages:
            averages.keep_micro_batch(kept, so_far)
        if self.recipe.descends_by is not None and self.perturbed:
            passes.add_up_gradients(kept, so_far)
        self.restore()
        for space in self.spaces:
            space.climbed = [False] * len(space.params)
        self.accumulated = kept

    def restore(self) -> None:
        """Puts the weights back and abandons the step; does nothing if they are not perturbed."""
        if not self.perturbed:
            return
        with PlainMode():
            self.spaces.restore()
            _weights_changed()
            self.spaces.release_gradients()
            self.perturbed = False
            assert self._scaling is not None
            self._scaling.abandoned()

    @contextlib.contextmanager
    def or_restored(self) -> Iterator[None]:
        """Whatever exception leaves the block, the weights are back before it goes on."""
        try:
            yield
        except BaseException:
            self.restore()
            raise

    # ---- whether the step counts -----------------------------------------------------------------------------

    def counts(self) -> bool:
        """Whether the last pass met nothing but finite numbers: waits for the sums."""
        assert self.sums is not None
        return all_finite(self.sums.tolist())

    def found_inf(self) -> Tensor:
        """1.0 where the last pass met a NaN or an infinity, else 0.0: float32, 0-dimensional, without waiting."""
        if self.sums is None:
            return torch.zeros((), device=self.parameters()[0].device)
        return (~self.sums.isfinite().all()).float()

    def stands_still(self) -> bool:
        """Whether the second pass would be the first again, as the radius is 0 in every group.

        Not under m-sharpness, where the first is not reduced, nor among pipeline stages, each with groups of its own.
        """
        radii = [group["rho"] for group in self.groups() if group["perturb"]]
        alone = not self.ranks.m_sharpness and self.ranks.process_group is None
        return alone and all(isinstance(rho, (int, float)) and rho == 0 for rho in radii)

    # ---- gradients -------------------------------------------------------------------------------------------

    def clear_gradients(self, set_to_none: bool = True) -> None:
        clear_gradients(self.parameters(), set_to_none)

    def drop_left_gradients(self) -> None:
        """Clears the gradients that a finished step left."""
        clear_gradients([p for p in self.parameters() if p.grad is not None and is_left(p.grad)], set_to_none=True)

    def has_gradients(self) -> bool:
        return not all(map(is_cleared, self.parameters()))

    # ---- state -----------------------------------------------------------------------------------------------

    def forget_marks(self) -> None:
        """Takes out of the state what a device marked as never started, before anybody else reads it; waits for it."""
        if not self.spaces.decide_on_host and not self.state_is_blank:
            self.spaces.forget_never_started(self.state)

    def forget_blank_state(self) -> None:
        if self.state_is_blank:
            self.state.clear()
            self.state_is_blank = False


def _weights_changed() -> None:
    """Inside one autocast around both passes the second would be given the casts of the first one's weights."""
    torch.clear_autocast_cache()
