"""What the examples share: scikit-learn's digits and a small network for them."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def loaders(test_size: int = 360) -> tuple[DataLoader, DataLoader]:
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    train, test = torch.utils.data.random_split(data, [len(data) - test_size, test_size])
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=test_size)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))


@torch.no_grad()
def accuracy(model: nn.Module, test: DataLoader) -> float:
    model.eval()
    (x, y) = next(iter(test))
    return (model(x).argmax(1) == y).float().mean().item()
