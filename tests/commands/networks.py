"""Networks of one's own for ``fastsam finetune --model networks:...``, good and bad."""

import warnings

import torch
from torch import nn


class Patches(nn.Module):
    """A small vision transformer for images of one channel, which refuses to be trained in eval mode."""

    def __init__(self, classes):
        super().__init__()
        self.embed = nn.Conv2d(1, 16, 2, 2)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, classes)

    def forward(self, images):
        if torch.is_grad_enabled() and not self.training:
            raise RuntimeError("a training pass in eval mode")
        return self.head(self.encoder(self.embed(images).flatten(2).transpose(1, 2)).mean(dim=1))


def double(classes):
    return Patches(classes).double()


def single(classes):
    return Patches(classes)


def scripted(classes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(64, classes)))


def no_module(classes):
    return [classes]


def fails(classes):
    raise KeyError("the weights")


def no_logits(classes):
    return Patches(classes + 1)


def a_tuple(classes):
    class Two(Patches):
        def forward(self, images):
            return super().forward(images), images

    return Two(classes)


def three_channels(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.LazyLinear(classes))


def only_on_the_first(classes):
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_rank() > 0:
        raise OSError("no such disk here")
    return torch.nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


def save_tiny_vit(folder, classes, mean, std, **config):
    """A tiny vision transformer and its image processor, as ``save_pretrained`` writes them."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=classes, initializer_range=0.2, **config,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=mean, image_std=std).save_pretrained(folder)
