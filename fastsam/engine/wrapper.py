"""An optimizer around another one, whose groups and state are the other's.

The base optimizer stays a real ``torch.optim`` optimizer and owns the groups and the state: wrapper, base and step
cannot differ in them, whoever assigns to, adds to or loads into either.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsam.distributed.ranks import Ranks
from fastsam.engine import loading
from fastsam.engine.base_rules import arguments, check_arguments, check_base
from fastsam.engine.base_update import own_state_hidden
from fastsam.engine.precision import Precision
from fastsam.engine.recipe import Recipe
from fastsam.engine.spaces import Spaces, takes_part
from fastsam.engine.step import Step, Unbuilt
from fastsam.support.checks import check_real, flag

#: What optimizers are built from, and what makes the one that makes the update: a class, such as ``torch.optim.SGD``.
Params = Iterable[Tensor] | Iterable[dict[str, Any]]
BaseOptimizer = Callable[..., torch.optim.Optimizer]


class Wrapper(torch.optim.Optimizer):
    """What torch and frameworks around it expect of an optimizer: groups, state, checkpoints, copies.

    Arguments as of :class:`~fastsam.optimizer.SharpnessAware`. ``two_pass`` is the step, which copies of the attributes
    share.
    """

    #: The method's mathematics.
    recipe: ClassVar[Recipe]

    def __init__(
        self, params: Params, base_optimizer: BaseOptimizer, defaults: dict, backend: str, base_kwargs: dict
    ) -> None:
        check_base(base_optimizer)
        names = [field.name for field in dataclasses.fields(Precision)]
        precision = Precision(**{name: base_kwargs.pop(name) for name in names if name in base_kwargs})
        precision.check_method(self.recipe, type(self).__name__)
        ranks = Ranks(base_kwargs.pop("process_group", None), base_kwargs.pop("m_sharpness", False))
        check_arguments(
            base_optimizer, base_kwargs, type(self).__name__, [*defaults, *names, "process_group", "m_sharpness"]
        )
        # Where base optimizer and method use one name for two things (RMSprop's alpha, Adadelta's rho), the
        # method's is called sam_<name> in the groups.
        taken = arguments(base_optimizer)
        aliases = {name: f"sam_{name}" for name in defaults if name in taken}
        own = {aliases.get(name, name): value for name, value in defaults.items()} | {"perturb": True}
        own |= precision.defaults()
        self.two_pass = Step(self.recipe, type(self).__name__, own, aliases, Spaces(backend, ranks, precision))
        super().__init__(params, {**own, **base_kwargs})
        base = base_optimizer(self.param_groups, **base_kwargs)
        if not isinstance(base, torch.optim.Optimizer):
            raise TypeError(f"base_optimizer made a {type(base).__name__}: it must make a torch.optim.Optimizer")
        self.defaults.update(base.defaults)
        self.two_pass.base = base
        self.two_pass.groups()
        precision.check_rounding(self.two_pass.parameters(), base)
        base.register_load_state_dict_pre_hook(loading.keep_present_values)

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The ``torch.optim`` optimizer that makes the update."""
        return self.two_pass.base

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups. Groups assigned without the method's hyper-parameters get the defaults."""
        return self.two_pass.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._refuse_within_a_step("assigning param_groups")
        loading.check_groups(groups)
        self.two_pass.base.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The one state of base optimizer and method, by parameter."""
        return self.two_pass.state

    @state.setter
    def state(self, state: dict) -> None:
        self._refuse_within_a_step("assigning state")
        loading.check_state(state, self.param_groups)
        self.two_pass.base.state = state

    @property
    def _perturbed(self) -> bool:
        return self.two_pass.perturbed

    def _refuse_within_a_step(self, what: str) -> None:
        if self.two_pass.perturbed or self.two_pass.accumulated is not None:
            raise RuntimeError(f"{what} within a step: call second_step(), or descend(), first")

    def add_param_group(self, param_group: dict) -> None:
        """``torch.optim.Optimizer.add_param_group``; a group may also say ``perturb=False``.

        Such a group is updated, but neither climbed nor backed up. Raises ``ValueError`` or ``TypeError`` for
        hyper-parameters out of range and for parameters that are not real floating-point tensors.
        """
        self._refuse_within_a_step("add_param_group()")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            flag("perturb", group["perturb"])
            if not isinstance(self.two_pass.base, Unbuilt):
                self.two_pass.groups()
            self.two_pass.ranks.check_parameters(group["params"])
            for p in group["params"]:
                if takes_part(p) or not isinstance(p, torch.nn.Parameter):  # a layer may keep frozen integers
                    check_real(p)
                    self.two_pass.precision.check(p)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def train(self) -> None:
        """Has a base optimizer with modes of its own, such as a schedule-free one, go on training.

        Within a step, where frameworks call it before every pass, nothing is done: the base optimizer is in that mode,
        or refuses its update.
        """
        if not self.two_pass.perturbed:
            self._base_mode("train")

    def eval(self) -> None:
        """Has a base optimizer with modes of its own, such as a schedule-free one, show its weights for evaluation."""
        self._refuse_within_a_step("eval()")
        self._base_mode("eval")

    def _base_mode(self, name: str) -> None:
        change = getattr(self.base_optimizer, name, None)
        if change is not None:
            with own_state_hidden(self.base_optimizer, self.two_pass.own_names):
                change()
            torch.clear_autocast_cache()  # of the weights as they were

    # ---- checkpoints and copies ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's own: the base optimizer's state, saved its own way, and the method's; never the backup.

        Raises ``RuntimeError`` between the passes: a checkpoint written there would hold perturbed weights.
        """
        if self.two_pass.perturbed:
            raise RuntimeError(
                "state_dict() between first_step() and second_step(): the weights are perturbed; "
                "take the checkpoint after second_step(), or call restore() first"
            )
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self.two_pass.forget_marks()
        found = loading.packed(self.two_pass)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, found)
            found = found if changed is None else changed
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this method, of the authors' code, or of the base optimizer alone.

        The base optimizer loads its part its own way. What the checkpoint's groups do not name keeps its present
        value; their ``old_p`` is left out. After any exception groups and state are as before.
        """
        if self.two_pass.perturbed:
            raise RuntimeError("load_state_dict() between first_step() and second_step(): finish the step first")
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        loading.load(self.two_pass, state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict:
        if self.two_pass.perturbed:
            raise RuntimeError("copying an optimizer between first_step() and second_step(): finish the step first")
        self.two_pass.forget_marks()
        own = {k: v for k, v in self.__dict__.items() if k != "step"}  # a scheduler's wrapper is bound to this one
        # The base optimizer finds the state here again; of its own, it would take the method's for its own.
        base = object.__new__(type(self.base_optimizer))
        base.__dict__.update(self.base_optimizer.__dict__, state=defaultdict(dict))
        return {**own, "base_optimizer": base, "state": self.state, "param_groups": self.param_groups}

    def __setstate__(self, state: dict) -> None:
        """Restores a copied or unpickled optimizer; with ``state`` and ``param_groups`` alone, as torch does, those."""
        shared = {k: v for k, v in state.items() if k in ("state", "param_groups")}
        own = {k: v for k, v in state.items() if k not in ("state", "param_groups", "base_optimizer")}
        if own:
            super().__setstate__(own)
        if "base_optimizer" in state:
            self.two_pass.base = state["base_optimizer"]
        for name, value in shared.items():
            setattr(self.base_optimizer, name, value)
