"""What every implementation is run with: methods, base optimizers, hyper-parameters, precisions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

METHODS = {"sam": "SAM", "fsam": "F-SAM", "eigensam": "Eigen-SAM"}
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.05}),
}
RHO, SIGMA, LMBDA, ALPHA = 0.05, 1.0, 0.9, 0.2


def hyper_parameters() -> dict[str, float]:
    return {"rho": RHO, "sigma": SIGMA, "lmbda": LMBDA, "alpha": ALPHA}


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
