"""Fine-tune a vision transformer of Transformers with F-SAM: ``python examples/finetune_vit.py [MODEL_FOLDER]``.

The loop of one's own. ``fastsam finetune`` does the same with more around it: any data, resuming, mixed precision.
MODEL_FOLDER is a checkpoint that ``AutoModelForImageClassification`` opens; without it a small transformer is made.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, interpolate
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from fastsam import FriendlySAM

EPOCHS, BATCH = 8, 50
torch.manual_seed(0)

if len(sys.argv) > 1:
    # Safetensors alone: a pickle can run code. A head for another number of classes is replaced by a new one.
    model = AutoModelForImageClassification.from_pretrained(
        sys.argv[1], num_labels=10, ignore_mismatched_sizes=True, use_safetensors=True
    )
else:
    width = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128)
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.1, **width)
    model = ViTForImageClassification(config)

# Digits as the model wants them: its number of channels and its size, values from -1 to 1.
pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
images = images.expand(-1, model.config.num_channels, -1, -1)
labels = torch.tensor(labels)
order = torch.randperm(len(labels))
train, test = order[:1400], order[1400:]


def inputs(which):
    side = model.config.image_size
    return interpolate(images[which], size=(side, side), mode="bilinear")


# Weight decay is for matrices: not for biases, norms, tokens and position embeddings.
decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith(("token", "embeddings"))]
others = [p for p in model.parameters() if not any(p is d for d in decayed)]
groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
optimizer = FriendlySAM(groups, torch.optim.AdamW, rho=0.05, lr=1e-3)
steps = EPOCHS * (len(train) // BATCH)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, cycle_momentum=False)

model.train()
for epoch in range(EPOCHS):
    shuffled = train[torch.randperm(len(train))]
    for batch in shuffled.split(BATCH):
        x, y = inputs(batch), labels[batch]

        def closure(x=x, y=y):
            loss = cross_entropy(model(pixel_values=x).logits, y)
            loss.backward()
            return loss

        loss = optimizer.step(closure, model=model)
        schedule.step()
    print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")

model.eval()
with torch.no_grad():
    predicted = torch.cat([model(pixel_values=inputs(part)).logits.argmax(1) for part in test.split(100)])
print(f"test accuracy {(predicted == labels[test]).float().mean():.3f}")
