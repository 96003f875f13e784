"""What every implementation is run with: the methods, the base optimizers and their hyper-parameters."""

from __future__ import annotations

from typing import Any

import torch

METHODS = {"sam": "SAM", "fsam": "F-SAM", "eigensam": "Eigen-SAM"}
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.05}),
}
RHO, SIGMA, LMBDA, ALPHA = 0.05, 1.0, 0.9, 0.2
