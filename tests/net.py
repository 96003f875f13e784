"""A model with everything in it that a captured step has to get right, and batches for it."""

import torch

BATCH, FEATURES, CLASSES = 8, 6, 3


class Net(torch.nn.Module):
    """Buffers that a pass changes, masks that it draws, and a parameter that no pass reaches."""

    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Linear(FEATURES, 16)
        self.norm = torch.nn.BatchNorm1d(16)
        self.dropout = torch.nn.Dropout(0.3)
        self.unused = torch.nn.Linear(2, 2)
        self.out = torch.nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.out(self.dropout(torch.relu(self.norm(self.hidden(x)))))


def batch(k):
    generator = torch.Generator().manual_seed(k)
    return torch.randn(BATCH, FEATURES, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator)
