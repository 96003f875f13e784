"""The networks of the tables by name; those of the papers have a small size for ``--data digits``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from benchmarks.papers.tables import TrainSettings
from fastsam import models
from fastsam.demo.models import ResNet, VisionTransformer

#: (classes, channels, side, options) -> network. The demo's two are for the ten digits alone.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": lambda c, channels, side, o: models.resnet18(c, channels=channels, **o),
    "resnet50": lambda c, channels, side, o: models.resnet50(c, channels=channels, **o),
    "wrn28_10": lambda c, channels, side, o: models.wrn28_10(c, channels=channels, **o),
    "vgg16_bn": lambda c, channels, side, o: models.vgg16_bn(c, channels=channels, **o),
    "pyramidnet": lambda c, channels, side, o: models.pyramidnet(c, channels=channels, **o),
    "vit": lambda c, channels, side, o: models.vit(c, channels=channels, image=side, **o),
    "pretrained": lambda c, channels, side, o: Pretrained(c, **o),
    "small ViT": lambda c, channels, side, o: VisionTransformer(**o),
    "small ResNet": lambda c, channels, side, o: ResNet(**o),
}


def build(settings: TrainSettings, classes: int, channels: int, side: int) -> nn.Module:
    """The network of a row for ``classes`` and images of (channels, side, side).

    Raises ``ValueError`` for options that the network does not have, and where the two do not fit.
    """
    options = dict(settings.network_options)
    if settings.checkpoint:
        options["checkpoint"] = settings.checkpoint
    if settings.network.startswith("small") and (classes, channels, side) != (10, 1, 8):
        raise ValueError(
            f"{settings.network} is for digits: 10 classes and images of 1 x 8 x 8, not {channels} x {side}"
        )
    try:
        return NETWORKS[settings.network](classes, channels, side, options)
    except TypeError as error:  # an argument that the network does not have
        raise ValueError(f"network_options of {settings.network}: {error}") from None


class Pretrained(nn.Module):
    """A checkpoint that Transformers' ``AutoModelForImageClassification`` opens, with a new head; gives logits.

    Grey images are repeated over the three channels it expects. A checkpoint that is a pickle is refused.
    """

    def __init__(self, classes: int, checkpoint: str) -> None:
        super().__init__()
        try:
            from transformers import AutoModelForImageClassification
        except ImportError:
            raise ImportError("a pre-trained network needs transformers: pip install 'fastsam[train]'") from None
        try:
            self.model = AutoModelForImageClassification.from_pretrained(
                checkpoint, num_labels=classes, ignore_mismatched_sizes=True, use_safetensors=True
            )
        except OSError as error:
            raise ValueError(f"checkpoint={checkpoint!r} cannot be opened: {str(error).splitlines()[0]}") from None

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images.expand(-1, 3, -1, -1)).logits
