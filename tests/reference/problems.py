"""Small fixed training problems: the same weights and data every time they are made."""

from dataclasses import dataclass

import torch
from torch import nn

BATCHES, BATCH_SIZE = 5, 16


@dataclass
class Problem:
    """Batches in turn, so that F-SAM's d = g - sigma m does not shrink to rounding errors as on one batch."""

    model: nn.Module
    inputs: torch.Tensor  # (batch, sample, ...)
    targets: torch.Tensor
    batch: int = 0

    def next_batch(self):
        self.batch = (self.batch + 1) % BATCHES

    def loss(self):
        return nn.functional.cross_entropy(self.model(self.inputs[self.batch]), self.targets[self.batch])

    def closure(self):
        """One full forward and backward pass."""
        loss = self.loss()
        loss.backward()
        return loss

    def params(self):
        return list(self.model.parameters())

    def weights(self):
        """A copy of all the weights as one vector."""
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()]).clone()


def _problem(model, *input_shape):
    dtype = next(model.parameters()).dtype
    # labels are drawn by chance: they cannot be fitted, and gradients stay far from zero
    targets = torch.randint(0, 4, (BATCHES, BATCH_SIZE))
    return Problem(model, torch.randn(BATCHES, BATCH_SIZE, *input_shape, dtype=dtype), targets)


def mlp(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Linear(8, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 4)]
        return _problem(nn.Sequential(*layers).to(dtype), 8)


def convnet(dtype=torch.float64):
    """With batch normalisation, so that train and eval mode differ, and with channels_last weights.

    No bias before the normalisation: its gradient is rounding alone, and Adam would divide that by itself.
    """
    with torch.random.fork_rng():
        torch.manual_seed(2)
        layers = [nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Tanh(), nn.AvgPool2d(2)]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(54, 4))
        return _problem(model.to(dtype, memory_format=torch.channels_last), 2, 6, 6)
