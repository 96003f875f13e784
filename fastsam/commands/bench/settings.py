"""What every implementation is run with: methods, base optimizers, hyper-parameters, precisions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

METHODS = {
    "sam": "SAM",
    "fsam": "F-SAM",
    "eigensam": "Eigen-SAM",
    "momentumsam": "Momentum-SAM",
    "gsam": "GSAM",
    "wsam": "WSAM",
    "looksam": "LookSAM",
    "stablesam": "Stable SAM",
    "vasso": "VaSSO",
}
DEFAULT_METHODS = ("sam", "fsam", "eigensam", "momentumsam")  # of the commands; the others by --method
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.05}),
}
RHO, SIGMA, LMBDA, ALPHA = 0.05, 1.0, 0.9, 0.2
#: What the methods besides SAM, F-SAM and Eigen-SAM take.
FAMILY: dict[str, dict[str, Any]] = {
    "momentumsam": {"rho": 0.3},
    "gsam": {"rho": RHO, "alpha": 0.4},
    "wsam": {"rho": RHO, "gamma": 0.9, "decouple": True},
    "looksam": {"rho": RHO, "k": 5, "alpha": 0.7},
    "stablesam": {"rho": RHO},
    "vasso": {"rho": RHO, "theta": 0.4},
}


def hyper_parameters() -> dict[str, Any]:
    return {"rho": RHO, "sigma": SIGMA, "lmbda": LMBDA, "alpha": ALPHA, **FAMILY}


class Kind(NamedTuple):
    """What a step has besides ``second_step`` and the gradient that it takes."""

    climbs: bool = True  # first_step is called
    first_gradient: bool = True  # and takes a gradient


def cycle(method: str) -> tuple[Kind, ...]:
    """The kinds of steps that a method takes in turn; a time of the method is their mean."""
    if method == "momentumsam":
        return (Kind(first_gradient=False),)
    if method == "looksam":
        return (Kind(), *[Kind(climbs=False, first_gradient=False)] * (FAMILY["looksam"]["k"] - 1))
    return (Kind(),)


@dataclass(frozen=True)
class Precision:
    """The dtype of weights, gradients and state, and whether passes run under bfloat16 autocast."""

    weights: torch.dtype
    autocast: bool = False

    @property
    def bytes(self) -> int:
        return self.weights.itemsize


PRECISIONS = {
    "fp32": Precision(torch.float32),
    "bf16": Precision(torch.bfloat16),
    "bf16-autocast": Precision(torch.float32, autocast=True),
}


def known(kind: str, names: Iterable[str], choices: Iterable[str]) -> list[str]:
    """``names`` as a list without repetition. Raises ``ValueError`` for one that is not among ``choices``."""
    choices = list(choices)
    for name in names:
        if name not in choices:
            near = difflib.get_close_matches(str(name).lower(), choices, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{kind} {name!r} is unknown: {hint}choose from {', '.join(choices)}")
    return list(dict.fromkeys(names))
