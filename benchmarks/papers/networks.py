"""The networks of the tables by name; those of the papers have a small size for ``--data digits``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.papers.settings import TrainSettings
from fastsam.commands.training import networks, pretrained


class Pretrained(nn.Module):
    """A checkpoint that Transformers' ``AutoModelForImageClassification`` opens, with a new head; gives logits.

    Grey images are repeated over the three channels it expects. A checkpoint that is a pickle is refused.
    """

    def __init__(self, classes: int, checkpoint: str, channels: int) -> None:
        super().__init__()
        try:
            from transformers import AutoModelForImageClassification
        except ImportError:
            raise ImportError("a pre-trained network needs transformers: pip install 'fastsam-optim[train]'") from None
        try:
            self.model = AutoModelForImageClassification.from_pretrained(
                checkpoint, num_labels=classes, ignore_mismatched_sizes=True, use_safetensors=True
            )
        except OSError as error:
            raise ValueError(f"checkpoint={checkpoint!r} cannot be opened: {str(error).splitlines()[0]}") from None

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images.expand(-1, 3, -1, -1)).logits


def efficientnet_lite0(classes: int, channels: int = 3, **options) -> nn.Module:
    """That of :mod:`fastsam.commands.training.pretrained`, which has three channels whatever images have.

    Channels lie last, in which order a CPU takes 1.6 times the images a second.
    """
    del channels
    return pretrained.efficientnet_lite0(classes, **options).to(memory_format=torch.channels_last)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{name: getattr(networks, name) for name in ("resnet18", "resnet50", "wrn28_10", "vgg16_bn", "pyramidnet", "vit")},
    "pretrained": Pretrained,
    "small ViT": networks.small_vit,
    "small ResNet": networks.small_resnet,
    "EfficientNet-Lite0": efficientnet_lite0,
}
#: Mean and standard deviation of the images that weights were made for; other networks take the training set's own.
INPUTS = {"EfficientNet-Lite0": (pretrained.MEAN, pretrained.STD)}


def build(settings: TrainSettings, classes: int, channels: int, side: int) -> nn.Module:
    """The network of a row for ``classes`` and images of (channels, side, side).

    Raises ``ValueError`` for options that the network does not have, and where the two do not fit.
    """
    options = dict(settings.network_options)
    if settings.checkpoint:
        options["checkpoint"] = settings.checkpoint
    if settings.network in ("vit", "small ViT"):
        options["image"] = side
    try:
        return NETWORKS[settings.network](classes, channels=channels, **options)
    except TypeError as error:  # an argument that the network does not have
        raise ValueError(f"network_options of {settings.network}: {error}") from None
