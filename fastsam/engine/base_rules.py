"""Which base optimizers can be wrapped, which of them have a fused descend, and what it needs of them.

A base optimizer gets its update in one pass with the restore if its class is exactly ``torch.optim.SGD``,
``Adam`` or ``AdamW``, its flags are among those the kernels know, and nobody hooked into its ``step``. Any other
runs its own ``step()`` after the weights are restored: same result, more passes over memory.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch.optim import SGD, Adam, AdamW
from torch.optim import optimizer as torch_optimizer


class Rule(Protocol):
    """What a fused descend needs to know of a base optimizer."""

    #: the name of the kernels' function
    kernel: str

    def serves(self, groups: Sequence[dict]) -> bool:
        """Whether the kernels know every flag that is set."""

    def state_names(self, groups: Sequence[dict]) -> tuple[str, ...]:
        """The entries of the state that the update reads and writes."""

    def keeps(self, group: dict) -> bool:
        """Whether parameters of this group have state, where others in their space may."""

    def groups(self, groups: Sequence[dict]) -> Sequence[dict]:
        """The groups with everything that the kernels read."""


class SgdRule:
    kernel = "descend_sgd"

    @staticmethod
    def serves(groups: Sequence[dict]) -> bool:
        return not any(g["differentiable"] for g in groups)

    @staticmethod
    def state_names(groups: Sequence[dict]) -> tuple[str, ...]:
        return ("momentum_buffer",) if any(map(SgdRule.keeps, groups)) else ()

    @staticmethod
    def keeps(group: dict) -> bool:
        return group["momentum"] != 0

    @staticmethod
    def groups(groups: Sequence[dict]) -> Sequence[dict]:
        return groups


class AdamRule:
    kernel = "descend_adam"

    def __init__(self, decoupled: bool) -> None:
        self._decoupled = decoupled

    @staticmethod
    def serves(groups: Sequence[dict]) -> bool:
        return not any(g["differentiable"] or g["amsgrad"] for g in groups)

    @staticmethod
    def state_names(groups: Sequence[dict]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "step")

    @staticmethod
    def keeps(group: dict) -> bool:
        return True

    def groups(self, groups: Sequence[dict]) -> Sequence[dict]:
        return [{"decoupled_weight_decay": self._decoupled, **g} for g in groups]


_RULES: dict[type, Rule] = {SGD: SgdRule(), Adam: AdamRule(decoupled=False), AdamW: AdamRule(decoupled=True)}

#: The classes that have a fused descend, for messages.
NAMES = [f"torch.optim.{kind.__name__}" for kind in _RULES]


def fused_rule(base: torch.optim.Optimizer) -> Rule | None:
    """The rule for ``base`` as it stands now, or None if it has to run its own ``step()``."""
    return None if _step_is_hooked(base) else rule_of(base)


def rule_of(base: torch.optim.Optimizer) -> Rule | None:
    """The rule for a base optimizer of this class with these flags, or None; whoever hooked into its ``step()``."""
    rule = _RULES.get(type(base))
    return rule if rule is not None and rule.serves(base.param_groups) else None


def _step_is_hooked(base: torch.optim.Optimizer) -> bool:
    patched = base.__dict__.get("step")
    return bool(
        base._optimizer_step_pre_hooks
        or base._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or (patched is not None and not hasattr(patched, "_wrapped_by_lr_sched"))
    )


def check_base(base_optimizer: Any) -> None:
    """Raises ``TypeError`` for what cannot be wrapped."""
    if isinstance(base_optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"base_optimizer={type(base_optimizer).__name__}(...) is an optimizer already; pass its class and the "
            "arguments: SAM(params, torch.optim.SGD, rho=0.05, lr=0.1)"
        )
    if not callable(base_optimizer):
        raise TypeError(f"base_optimizer={base_optimizer!r} must be an optimizer class, such as torch.optim.SGD")
    if hasattr(base_optimizer, "second_step"):
        raise TypeError(
            f"base_optimizer={base_optimizer.__name__} takes two passes itself: give the optimizer that makes the "
            "update, such as torch.optim.SGD"
        )
    if _needs_closure(base_optimizer):
        raise TypeError(
            f"base_optimizer={base_optimizer.__name__} evaluates a closure in its own step() and cannot make the "
            "update of one second gradient: take one whose step() needs none, such as torch.optim.SGD"
        )


def arguments(base_optimizer: Callable) -> set[str]:
    """Names of the hyper-parameters of a base optimizer, which a subclass may pass on as ``**kwargs``."""
    if not isinstance(base_optimizer, type):
        return set(inspect.signature(base_optimizer).parameters)
    inits = (cls.__init__ for cls in base_optimizer.__mro__)  # type: ignore[misc]
    return {name for init in inits for name in inspect.signature(init).parameters}


def check_arguments(base_optimizer: Callable, given: dict[str, Any], method: str, own: Iterable[str]) -> None:
    """Raises ``TypeError`` for an argument that neither the base optimizer has nor the method, whose are ``own``."""
    known = inspect.signature(base_optimizer).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, [*own, *known], n=1, cutoff=0.5)
            raise TypeError(
                f"{name}={value!r} is an argument neither of {method} nor of its base optimizer"
                + (f": did you mean {near[0]}?" if near else "")
            )


def _needs_closure(base_optimizer: Callable) -> bool:
    """Whether it is a class like ``torch.optim.LBFGS``."""
    step = getattr(base_optimizer, "step", None)
    closure = None if step is None else inspect.signature(step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
