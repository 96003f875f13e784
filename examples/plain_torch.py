"""F-SAM in a loop of one's own: ``python examples/plain_torch.py``."""

import torch
from digits import accuracy, loaders, network

from fastsam import FriendlySAM

torch.manual_seed(0)
train, test = loaders()
model, loss_fn = network(), torch.nn.CrossEntropyLoss()
optimizer = FriendlySAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.05, momentum=0.9)
for _epoch in range(5):
    for x, y in train:

        def closure(x=x, y=y):
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure, model=model)  # both passes; BatchNorm and dropout as in one
print(f"test accuracy {accuracy(model, test):.3f}")
