"""The networks whose whole training step is measured, and small ones in their places for a quick try."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fastsam.commands.training import networks


@dataclass(frozen=True)
class Network:
    """A network on square images of ``pixels`` pixels a side and ``channels`` colours."""

    title: str
    build: Callable[[], nn.Module]
    pixels: int
    classes: int
    channels: int = 3

    def batch(self, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The same random images and labels every time."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(size, self.channels, self.pixels, self.pixels, generator=generator)
        labels = torch.randint(self.classes, (size,), generator=generator)
        return images.to(device), labels.to(device)

    def activation_bytes(self, size: int) -> int:
        """Bytes that a float32 forward pass of ``size`` images keeps for its backward pass; nothing is computed."""
        storages = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[id(storage)] = storage  # kept, so that no other gets its id
            return tensor

        with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module = self.build()
            module(torch.empty(size, self.channels, self.pixels, self.pixels))
        weights = {id(p.untyped_storage()) for p in module.parameters()}
        return sum(storage.nbytes() for key, storage in storages.items() if key not in weights)

    def weight_bytes(self) -> int:
        """Bytes of the parameters in float32."""
        with torch.device("meta"):
            return 4 * sum(p.numel() for p in self.build().parameters())


NETWORKS = {
    "resnet18": Network("ResNet-18, 32 px", networks.resnet18, 32, 10),
    "resnet50": Network("ResNet-50, 32 px", networks.resnet50, 32, 10),
    "wrn28-10": Network("WRN-28-10, 32 px", networks.wrn28_10, 32, 10),
    "vit-b16": Network("ViT-B/16, 224 px", networks.vit_b16, 224, 1000),
    "vit-l16": Network("ViT-L/16, 224 px", networks.vit_l16, 224, 1000),
    "demo-resnet": Network("the demo's ResNet, 8 px", networks.small_resnet, 8, 10, channels=1),
    "demo-vit": Network("the demo's ViT, 8 px", networks.small_vit, 8, 10, channels=1),
}


def _small_vit() -> nn.Module:
    return networks.vit(10, image=8, patch=4, dim=16, depth=1, heads=2)


SMALL_NETWORKS = {
    "resnet18": Network("tiny ResNet-18, 8 px", lambda: networks.resnet18(10, width=4), 8, 10),
    "resnet50": Network("tiny ResNet-50, 8 px", lambda: networks.resnet50(10, width=4), 8, 10),
    "wrn28-10": Network("WRN-10-1, 8 px", lambda: networks.wrn28_10(10, depth=10, width=1), 8, 10),
    "vit-b16": Network("tiny ViT, 8 px", _small_vit, 8, 10),
    "vit-l16": Network("tiny ViT, 8 px", _small_vit, 8, 10),
    "demo-resnet": NETWORKS["demo-resnet"],
    "demo-vit": NETWORKS["demo-vit"],
}
