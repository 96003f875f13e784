"""F-SAM in the Trainer of Transformers: ``python examples/with_transformers.py``."""

import tempfile

import torch
from digits import accuracy, loaders, network
from transformers import TrainingArguments, set_seed

from fastsam import FriendlySAM
from fastsam.integrations.transformers import SAMTrainer


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = network()

    def forward(self, x, labels):
        logits = self.model(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


set_seed(0)
train, test = loaders()
model = Classifier()
recipe = (FriendlySAM, {"base_optimizer": torch.optim.AdamW, "rho": 0.1, "lr": 5e-3})
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, num_train_epochs=5, per_device_train_batch_size=64, use_cpu=True, report_to=[], disable_tqdm=True
    )
    data = [{"x": x, "labels": y} for x, y in train.dataset]
    SAMTrainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=recipe).train()
print(f"test accuracy {accuracy(model.model, test):.3f}")
