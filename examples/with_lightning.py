"""F-SAM under Lightning's automatic optimization: ``python examples/with_lightning.py``."""

import lightning
import torch
from digits import accuracy, loaders, network

from fastsam import FriendlySAM
from fastsam.integrations.lightning import SAMCallback


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = network()

    def training_step(self, batch, _):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.model(x), y)

    def configure_optimizers(self):  # the one line that says F-SAM
        return FriendlySAM(self.parameters(), torch.optim.SGD, rho=0.1, lr=0.05, momentum=0.9)


lightning.seed_everything(0, verbose=False)
train, test = loaders()
module = Classifier()
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = lightning.Trainer(
    max_epochs=5,
    accelerator="cpu",
    accumulate_grad_batches=2,
    gradient_clip_val=1.0,
    callbacks=[SAMCallback()],
    **quiet,
)
trainer.fit(module, train)
print(f"test accuracy {accuracy(module.model, test):.3f}")
