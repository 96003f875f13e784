"""Which base optimizers have a fused descend, and what it needs of them.

A base optimizer gets its update in one pass with the restore if its class is exactly ``torch.optim.SGD``,
``Adam`` or ``AdamW``, its flags are among those the kernels know, and nobody hooked into its ``step``. Any other
runs its own ``step()`` after the weights are restored: same result, more passes over memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import SGD, Adam, AdamW
from torch.optim import optimizer as torch_optimizer


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
        """Whether parameters of this group have state, where others in their space may."""
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


_RULES = {SGD: SgdRule(), Adam: AdamRule(decoupled=False), AdamW: AdamRule(decoupled=True)}


def fused_rule(base: torch.optim.Optimizer) -> SgdRule | AdamRule | None:
    """The rule for ``base`` as it stands now, or None if it has to run its own ``step()``."""
    rule = _RULES.get(type(base))
    if rule is None or not rule.serves(base.param_groups) or _step_is_hooked(base):
        return None
    return rule


def _step_is_hooked(base: torch.optim.Optimizer) -> bool:
    patched = base.__dict__.get("step")
    return bool(
        base._optimizer_step_pre_hooks
        or base._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or (patched is not None and not hasattr(patched, "_wrapped_by_lr_sched"))
    )
