"""A tiny model on scikit-learn's digits, and the plain loop that the frameworks are held against."""

from __future__ import annotations

import math

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import GSAM, SAM, FriendlySAM, LookSAM, MomentumSAM


def batches(n: int, size: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images[: n * size], dtype=torch.float32) / 16, torch.tensor(labels[: n * size])
    return list(zip(images.split(size), labels.split(size), strict=True))


def loader(n: int, size: int = 16) -> DataLoader:
    images, labels = zip(*batches(n, size), strict=True)
    return DataLoader(TensorDataset(torch.cat(images), torch.cat(labels)), batch_size=size)


class Counted(nn.Module):
    """Two layers and a BatchNorm, that counts its forward passes in training."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(64, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 10)
        )
        self.forwards = 0
        self.outputs = []

    def forward(self, x):
        self.forwards += self.training
        output = self.layers(x)
        self.outputs.append(output.detach().float().clone())
        return output


METHODS = {
    "sam": lambda p: SAM(p, torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9),
    "friendly": lambda p: FriendlySAM(p, torch.optim.AdamW, rho=0.05, lr=1e-2),
    "momentum": lambda p: MomentumSAM(p, torch.optim.SGD, rho=0.3, lr=0.1, momentum=0.9),
    "gsam": lambda p: GSAM(p, torch.optim.AdamW, rho=0.05, lr=1e-2),
    "look": lambda p: LookSAM(p, torch.optim.SGD, rho=0.05, k=2, lr=0.1, momentum=0.9),
    "sam at radius 0": lambda p: SAM(p, torch.optim.SGD, rho=0.0, lr=0.1, momentum=0.9),
}


#: (method, options, share of the first pass) for frameworks that own the loop, which name their options so.
CASES = [
    *[(method, options, 1.0) for method in ("sam", "friendly")
      for options in ("plain", "accumulation", "clipping", "bf16")],
    ("momentum", "accumulation", 1.0),
    ("momentum", "clipping", 1.0),
    ("look", "accumulation", 1.0),
    ("look", "clipping", 1.0),
    ("gsam", "plain", 1.0),
    ("sam at radius 0", "accumulation", 1.0),
    ("sam", "plain", 0.25),
    ("friendly", "accumulation", 0.3),
    ("gsam", "bf16", 0.25),
    ("momentum", "plain", 0.25),
    ("look", "clipping", 0.25),
]  # fmt: skip


def by_hand(
    model, optimizer, groups, *, divide_by=None, max_norm=None, of_update=False, scaler=None, autocast=None, share=1.0
):
    """The passes over each group of micro-batches with first_step and second_step; returns every first loss.

    Losses are divided by the size of their group, or by ``divide_by``. The first of two passes takes a ``share`` of
    each micro-batch. ``max_norm`` clips the last gradient, or what the update is made with.
    """
    losses = []
    for group in groups:
        once = optimizer.evaluations == 1
        if isinstance(optimizer, MomentumSAM):
            optimizer.first_step(grad_scaler=scaler)
        for second in (True,) if once else (False, True):
            kept = {name: b.clone() for name, b in model.named_buffers()}
            for x, y in group:
                if not second:
                    x, y = x[: math.ceil(share * len(x))], y[: math.ceil(share * len(x))]
                with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                    loss = nn.functional.cross_entropy(model(x), y)
                if once or not second:
                    losses.append(loss.item())
                loss = loss / (divide_by or len(group))
                (loss if scaler is None else scaler.scale(loss)).backward()
            if not second:
                optimizer.first_step(zero_grad=True, grad_scaler=scaler)
                continue
            if not once:
                for name, b in model.named_buffers():
                    b.copy_(kept[name])
            elif optimizer.param_groups[0]["rho"] == 0:
                optimizer.first_step(grad_scaler=scaler)
            if scaler is not None:
                scaler.unscale_(optimizer)
            if max_norm is not None and not of_update:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.second_step(zero_grad=True, grad_scaler=scaler, max_norm=max_norm if of_update else None)
            if scaler is not None:
                scaler.update()
    return losses


def in_groups(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def same(model: nn.Module, other: nn.Module, tolerance: float = 1e-6) -> None:
    """Weights and buffers agree to rounding."""
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
