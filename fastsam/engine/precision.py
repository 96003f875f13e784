"""How what an optimizer keeps is stored, where float32 would take more memory than there is.

``state_dtype=torch.bfloat16`` keeps a method's own vectors (F-SAM's and VaSSO's average, Eigen-SAM's eigenvector, a
first gradient that is kept for the second side, LookSAM's part of one) in bfloat16 beside float32 weights. The kernels
compute in float32 all the same and round to the nearest as they store. The backup always has the dtype of the weights:
it is exact. The base optimizer's state is its own.

``stochastic_rounding=True`` is for weights in bfloat16 of which there is no float32 copy. Between 1 and 2 these lie
2^-7 apart, so that to the nearest most updates of a training are none. The descent rounds the updated weight up or down
instead, with the probabilities that make the update the mean. What it draws is a hash of a seed, of the number of the
step, both in the groups and so in every checkpoint, and of the number of the element among all in the groups: the same
whatever the backend, the threads, the chunks, the memory that parameters lie in, or a resume.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsam.distributed.shards import first_element
from fastsam.engine.base_rules import NAMES, rule_of
from fastsam.engine.recipe import Group, Recipe
from fastsam.support.checks import describe, flag

#: Which dtypes, besides their own, the vectors that belong to weights of a dtype may have: what the kernels are built
#: for. Not float16, in which small gradients are 0.
_NARROWER = {torch.float32: (torch.bfloat16,)}


@dataclass(frozen=True)
class Precision:
    """How an optimizer stores what it keeps.

    Args:
        state_dtype: of the method's own vectors; None is the dtype of the weights that they belong to.
        stochastic_rounding: whether the descent rounds weights in bfloat16 at random.
        rounding_seed: where their random numbers start.
    """

    state_dtype: torch.dtype | None = None
    stochastic_rounding: bool = False
    rounding_seed: int = 0

    def check_method(self, recipe: Recipe, method: str) -> None:
        """Raises ``ValueError`` for arguments that are none, or where the method has nothing to do with them."""
        flag("stochastic_rounding", self.stochastic_rounding)
        if not isinstance(self.rounding_seed, int):
            raise ValueError(f"rounding_seed={self.rounding_seed!r} must be a whole number")
        if self.state_dtype is None:
            return
        if not isinstance(self.state_dtype, torch.dtype) or not self.state_dtype.is_floating_point:
            raise ValueError(
                f"state_dtype={self.state_dtype!r} must be a floating-point dtype, such as torch.bfloat16, or None"
            )
        if not (recipe.averages or recipe.eigenvector or recipe.keeps_gradient or recipe.stored):
            raise ValueError(
                f"state_dtype={self.state_dtype}: {method} keeps nothing but the backup of the weights, which is "
                "exact, and its base optimizer's state: leave state_dtype out"
            )

    def check(self, p: Tensor) -> None:
        """Raises ``ValueError`` for a parameter that cannot be kept so."""
        if self.stochastic_rounding and p.dtype == torch.float16:
            raise ValueError(
                f"stochastic_rounding=True: {describe(p)} has dtype torch.float16, and weights in bfloat16 are rounded "
                "so: cast the model with model.to(torch.bfloat16)"
            )
        if self.state_dtype in (None, p.dtype, *_NARROWER.get(p.dtype, ())):
            return
        known = " or ".join(map(str, (*_NARROWER.get(p.dtype, ()), p.dtype)))
        raise ValueError(
            f"state_dtype={self.state_dtype}: {describe(p)} has dtype {p.dtype}, whose state may be {known}: give "
            "that, or None for the dtype of each parameter"
        )

    def check_rounding(self, params: Sequence[Tensor], base: torch.optim.Optimizer) -> None:
        """Raises ``ValueError`` where nothing would be rounded at random that was asked for."""
        if not self.stochastic_rounding:
            return
        if not any(p.dtype == torch.bfloat16 for p in params):
            raise ValueError(
                f"stochastic_rounding=True: no parameter has dtype torch.bfloat16 (the first has {params[0].dtype}), "
                "and others need no such rounding: leave it out, or cast the model with model.to(torch.bfloat16)"
            )
        if rule_of(base) is None:
            raise ValueError(
                f"stochastic_rounding=True: {type(base).__name__} with these arguments makes its update in its own "
                f"step(), which rounds to the nearest: take one of {', '.join(NAMES)} (without amsgrad and "
                "differentiable)"
            )

    def defaults(self) -> Group:
        """What groups keep of it."""
        return {"rounding_seed": self.rounding_seed, "steps": 0} if self.stochastic_rounding else {}

    def of_state(self, p: Tensor) -> torch.dtype:
        """The dtype of a method's vectors for a parameter."""
        return self.state_dtype or p.dtype

    def numbers(self, params: Iterable[Tensor]) -> dict[Tensor, int]:
        """The number of each parameter's first element, of those in this process's part; empty where none draws."""
        found, end = {}, 0
        for p in params if self.stochastic_rounding else ():
            found[p] = end + first_element(p)
            end += p.numel()
        return found

    def keys(self, groups: Sequence[Group]) -> tuple[int, int] | None:
        """The 32-bit keys that the next descent draws by, or None where it rounds to the nearest."""
        if not self.stochastic_rounding:
            return None
        mixed = _mixed(_mixed(groups[0]["rounding_seed"]) + groups[0]["steps"])
        return mixed >> 32, mixed & 0xFFFFFFFF


def _mixed(x: int) -> int:
    """SplitMix64's output for a counter: 64 bits, all of which depend on all of x. Steele, Lea, Flood, 2014."""
    x = (x + 1) * 0x9E3779B97F4A7C15 % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)
