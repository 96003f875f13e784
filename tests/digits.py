"""A tiny model on scikit-learn's digits, and the plain loop that the frameworks are held against."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


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


def by_hand(model, optimizer, groups, *, divide_by=None, max_norm=None, scaler=None, autocast=None):
    """Both passes over each group of micro-batches with first_step and second_step; returns every first loss.

    Losses are divided by the size of their group, or by ``divide_by``.
    """
    losses = []
    for group in groups:
        for second in (False, True):
            kept = {name: b.clone() for name, b in model.named_buffers()}
            for x, y in group:
                with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                    loss = nn.functional.cross_entropy(model(x), y)
                if not second:
                    losses.append(loss.item())
                loss = loss / (divide_by or len(group))
                (loss if scaler is None else scaler.scale(loss)).backward()
            if not second:
                optimizer.first_step(zero_grad=True, grad_scaler=scaler)
            else:
                for name, b in model.named_buffers():
                    b.copy_(kept[name])
                if scaler is not None:
                    scaler.unscale_(optimizer)
                if max_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.second_step(zero_grad=True, grad_scaler=scaler)
                if scaler is not None:
                    scaler.update()
    return losses


def in_groups(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def same(model: nn.Module, other: nn.Module, tolerance: float = 1e-6) -> None:
    """Weights and buffers agree to rounding."""
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
