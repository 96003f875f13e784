"""F-SAM around an Accelerator: ``python examples/with_accelerate.py``."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import accuracy, loaders, network

from fastsam import FriendlySAM
from fastsam.integrations.accelerate import SAMOptimizer

set_seed(0)
train, test = loaders()
model, loss_fn = network(), torch.nn.CrossEntropyLoss()
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
optimizer = FriendlySAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.05, momentum=0.9)
optimizer = SAMOptimizer(optimizer, accelerator, model, max_norm=1.0)
model, optimizer, train = accelerator.prepare(model, optimizer, train)


def closure(x, y):
    loss = loss_fn(model(x), y)
    accelerator.backward(loss)
    return loss


for _epoch in range(5):
    for x, y in train:
        with accelerator.accumulate(model):
            optimizer.step(closure, x, y)
print(f"test accuracy {accuracy(model, test):.3f}")
