"""The flat spaces of an optimizer: one for each device, dtype, kind of group and set of processes that share it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

from torch import Tensor

from fastsam import kernels
from fastsam.distributed.ranks import Ranks
from fastsam.distributed.shards import local, shard_groups
from fastsam.engine.precision import Precision
from fastsam.flat.flatten import drop_cleared
from fastsam.flat.space import FlatSpace, same
from fastsam.support.checks import check_real, describe


def takes_part(p: Tensor) -> bool:
    """Whether an optimizer may have to do something with p: it is not frozen, or has a gradient all the same."""
    return p.requires_grad or p.grad is not None


class Spaces:
    """Every :class:`FlatSpace` of a list of groups, with the backend that serves it."""

    def __init__(self, backend: str, ranks: Ranks, precision: Precision) -> None:
        kernels.check(backend)
        self.backend = backend
        self.precision = precision
        self.ranks = ranks
        self._spaces: list[FlatSpace] = []
        self._members: list[tuple[list[Tensor], bool]] = []
        self._idle: list[Tensor] = []
        self._entries: list[dict] | None = None

    def __iter__(self) -> Iterator[FlatSpace]:
        return iter(self._spaces)

    def refresh(self, groups: Sequence[dict], state) -> None:
        """Rebuilds the spaces if parameters were added, replaced, moved, changed or unfrozen since they were built.

        Frozen parameters have no part in them, so that no buffer has room for them.
        """
        if not self._same_members(groups) or any(map(takes_part, self._idle)) or not self._still_fit():
            split: dict[tuple, dict[Tensor, int]] = {}
            idle = []
            numbers = self.precision.numbers(p for group in groups for p in group["params"])
            for g, group in enumerate(groups):
                for p in group["params"]:
                    if not takes_part(p):
                        idle.append(p)
                        continue
                    check_real(p)
                    self.precision.check(p)
                    key = (p.device, p.dtype, bool(group["perturb"]), shard_groups(p))
                    split.setdefault(key, {}).setdefault(p, g)
            spaces = [
                FlatSpace(
                    list(found),
                    list(found.values()),
                    key[2],
                    self.precision.state_dtype,
                    [numbers[p] for p in found] if numbers else None,
                )
                for key, found in split.items()
            ]
            for space in spaces:
                space.kernels = kernels.choose(self.backend, space.device, space.dtype)
            members = [(list(group["params"]), bool(group["perturb"])) for group in groups]
            self._spaces, self._members, self._idle, self._entries = spaces, members, idle, None
            self.ranks.forget()
        self.find_states(state)

    def forget_states(self) -> None:
        """Has the next :meth:`find_states` look every entry up again."""
        self._entries = None

    def find_states(self, state) -> None:
        """Has every space look up its state again if an entry of the optimizer's ``state`` was added or replaced."""
        if self._entries is None or not same(state.values(), self._entries):
            for space in self._spaces:
                space.find_states(state)
            self._entries = list(state.values())

    def _same_members(self, groups: Sequence[dict]) -> bool:
        return len(groups) == len(self._members) and all(
            same(group["params"], params) and bool(group.get("perturb", True)) == perturbed
            for group, (params, perturbed) in zip(groups, self._members, strict=True)
        )

    def _still_fit(self) -> bool:
        return all(space.still_fits() for space in self._spaces)

    def publish(self, space: FlatSpace, state, name: str, buffer, which: Sequence[bool]) -> None:
        """Makes the views of ``buffer`` the ``state[p][name]`` of the parameters of ``space`` that ``which`` marks."""
        if space.publish(state, name, buffer, which):
            self._entries = list(state.values())

    def forget_never_started(self, state) -> None:
        """Takes out of ``state`` what a device marked as never started: a first step that it found to be abandoned.

        The mark is a NaN, which no state can hold otherwise. Waits for the device.
        """
        entries = [entry for p, entry in state.items() if isinstance(p, Tensor)]  # others are a base optimizer's own
        entries = [(entry, n) for entry in entries for n in ("momentum", "momentum_buffer") if n in entry]
        entries = [(entry, n) for entry, n in entries if entry[n] is not None and local(entry[n]).numel()]
        for entry, name in entries:
            if bool(local(entry[name]).flatten()[0].isnan()):
                del entry[name]

    def follow(self, groups: Sequence[dict], state) -> None:
        """Between the passes: follows weights that moved, and raises ``RuntimeError`` for any other change."""
        if not self._same_members(groups):
            raise RuntimeError(
                "the parameters in the groups changed between first_step() and second_step(), so that the gradients "
                "are those of others than were climbed from: add, replace or remove parameters between steps"
            )
        self.find_states(state)
        if not self._still_fit():
            raise RuntimeError(
                "a parameter changed its shape, strides, dtype or device between first_step() and second_step(); "
                "change the model between steps"
            )

    def restore(self) -> None:
        """Puts back the weights that were climbed from, and raises ``RuntimeError`` for those of another shape."""
        reshaped = []
        for space in self._spaces:
            if space.still_fits():
                space.kernels.restore(space)
            else:
                reshaped += space.restore_changed()
        if reshaped:
            raise RuntimeError(
                f"{describe(reshaped[0])} was given that shape between first_step() and second_step(), so that its "
                "weights cannot be put back: give it the shape it had and call restore()"
            )

    def collect_gradients(self) -> None:
        """Reads every gradient; raises, before anything changes, for one that cannot be used."""
        for space in self._spaces:
            drop_cleared(space.owners)
        if any(p.grad is not None for p in self._idle):
            raise RuntimeError(
                "a parameter that was frozen in the first pass of this step has a gradient in the second: "
                "unfreeze parameters between steps"
            )
        for space in self._spaces:
            space.collect_gradients()
        if not any(g is not None for space in self._spaces for g in space.gradients):
            warnings.warn(
                "no parameter has a gradient, so that this pass does nothing: call loss.backward() before first_step() "
                "and, at the perturbed weights, again before second_step()",
                RuntimeWarning,
                stacklevel=2,
            )

    def release_gradients(self) -> None:
        """Lets go of the gradients of a finished pass: their memory is the next pass's."""
        for space in self._spaces:
            space.gradients = []

    def total(self, spaces: Sequence[FlatSpace], sums: Sequence[Tensor]) -> Tensor:
        """The Gram sums over ``spaces`` on every process, on the first one's device."""
        return self.ranks.total([space.shard_groups for space in spaces], sums)

    @property
    def decide_on_host(self) -> bool:
        """Whether the host knows if a step counts: one space on the CPU makes it wait for the sums of all."""
        return not self._spaces or any(space.kernels.DECIDES_ON_HOST for space in self._spaces)
