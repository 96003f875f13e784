"""The networks of every command and benchmark, in plain torch; ``pretrained.py`` has the one that comes with weights.

=================================  ==================  =========================================================
function                           parameters          network
=================================  ==================  =========================================================
``resnet18``, ``resnet50``         11.2 M, 23.5 M      He et al. 2016; the stem for 32 pixels, or ImageNet's
``wrn28_10``                       36.5 M              Zagoruyko and Komodakis 2016
``vgg16_bn``                       15.3 M              Simonyan and Zisserman 2015 with BatchNorm, for 32 pixels
``pyramidnet``                     18.3 M              Han et al. 2017; as F-SAM's code builds PyramidNet-110
``vit``, ``vit_b16``, ``vit_l16``  86.6 M, 304.3 M     Dosovitskiy et al. 2021
``small_resnet``, ``small_vit``    77,754, 112,138     the demo's, for the digits' 8 x 8 grey pixels
=================================  ==================  =========================================================

Parameters are those of 10 classes (``vit``: of 1,000). Each maps images (N, channels, height, width) to logits
(N, classes). ``width``, ``depth``, ``alpha`` and ``dim`` make the small versions that tests use.

>>> sum(p.numel() for p in wrn28_10(classes=10).parameters())
36479194
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "pyramidnet", "resnet18", "resnet50", "small_resnet", "small_vit", "vgg16_bn", "vit", "vit_b16", "vit_l16",
    "wrn28_10",
]  # fmt: skip


def resnet18(classes: int = 10, *, width: int = 64, channels: int = 3, stem: str = "cifar") -> nn.Module:
    """ResNet-18: two basic blocks in each of four stages of width, 2, 4 and 8 width channels.

    ``stem="cifar"`` is one 3 x 3 convolution, as in the code of F-SAM and Eigen-SAM; ``stem="imagenet"`` is
    7 x 7 of stride 2 and a maximum over 3 x 3, which with 1,000 classes has torchvision's 11,689,512 parameters.
    Any size of image works. Raises ``ValueError`` for another stem.
    """
    return _ResNet(_BasicBlock, [2, 2, 2, 2], [width << i for i in range(4)], classes, channels, stem)


def resnet50(classes: int = 10, *, width: int = 64, channels: int = 3, stem: str = "cifar") -> nn.Module:
    """ResNet-50: 3, 4, 6 and 3 bottlenecks, the stride on the 3 x 3 convolution; arguments as :func:`resnet18`'s."""
    return _ResNet(_Bottleneck, [3, 4, 6, 3], [width << i for i in range(4)], classes, channels, stem)


def small_resnet(
    classes: int = 10, *, widths: Sequence[int] = (16, 32, 64), channels: int = 1, stem: str = "cifar"
) -> nn.Module:
    """A residual network with BatchNorm: one basic block for each of ``widths``; otherwise as :func:`resnet18`."""
    return _ResNet(_BasicBlock, [1] * len(widths), widths, classes, channels, stem)


def wrn28_10(classes: int = 10, *, depth: int = 28, width: int = 10, channels: int = 3) -> nn.Module:
    """Wide ResNet: (depth - 4) / 6 pre-activation blocks in each of three stages of 16, 32 and 64 times width channels.

    The class of that name in F-SAM's code has a fifth block in each stage, 46.2 M parameters: ``depth=34`` here.
    Convolutions start as He's normal, the head at zero, as there. Any size of image works.
    """
    if (depth - 4) % 6 or depth < 10:
        raise ValueError(f"depth={depth} must be 6 n + 4, such as 10, 16, 28 or 40")
    blocks, inputs = [], 16
    for stage in range(3):
        for place in range((depth - 4) // 6):
            outputs = 16 * width << stage
            blocks.append(_WideBlock(inputs, outputs, stride=2 if stage and not place else 1))
            inputs = outputs
    network = nn.Sequential(_conv(channels, 16, 3), *blocks, nn.BatchNorm2d(inputs), nn.ReLU(), *_head(inputs, classes))
    _he_start(network, "fan_in")
    for p in network[-1].parameters():
        nn.init.zeros_(p)
    return network


def vgg16_bn(classes: int = 10, *, width: int = 64, channels: int = 3) -> nn.Module:
    """VGG-16 with BatchNorm for images of 32 x 32, with F-SAM's head: two hidden layers of 8 width, and dropout."""
    layers, inputs = [], channels
    for multiple, count in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(inputs, multiple * width, 3, padding=1), nn.BatchNorm2d(multiple * width), nn.ReLU()]
            inputs = multiple * width
        layers.append(nn.MaxPool2d(2))
    hidden = [layer for _ in range(2) for layer in (nn.Dropout(), nn.Linear(inputs, inputs), nn.ReLU())]
    network = nn.Sequential(*layers, nn.Flatten(), *hidden, nn.Linear(inputs, classes))
    _he_start(network, "fan_out")
    return network


def pyramidnet(
    classes: int = 10, *, depth: int = 110, alpha: int = 270, bottleneck: bool = True, channels: int = 3
) -> nn.Module:
    """PyramidNet: the channels grow by the same step in every block, from 16 by alpha over all.

    F-SAM's code has depth 110, alpha 270 and bottlenecks, whose output has four times those channels. The paper's
    own PyramidNet-110 of alpha 270 is ``bottleneck=False``: basic blocks, 28.5 M parameters. Shortcuts add no
    parameters: the mean over 2 x 2, and zeros for new channels. The side of an image must be a multiple of 4.
    Raises ``ValueError`` for a depth without whole blocks.
    """
    layers, expansion = (9, 4) if bottleneck else (6, 1)
    if (depth - 2) % layers or depth <= 2:
        raise ValueError(f"depth={depth} must be {layers} n + 2, such as {layers + 2} or {12 * layers + 2}")
    count = (depth - 2) // 3 // (layers // 3)
    growth = alpha / (3 * count)
    blocks, inputs = [], 16
    for place in range(3 * count):
        inner = round(16 + (place + 1) * growth)
        blocks.append(_PyramidBlock(inputs, inner, expansion, stride=2 if place in (count, 2 * count) else 1))
        inputs = inner * expansion
    stem = _conv(channels, 16, 3), nn.BatchNorm2d(16)
    network = nn.Sequential(*stem, *blocks, nn.BatchNorm2d(inputs), nn.ReLU(), *_head(inputs, classes))
    _he_start(network, "fan_out")
    return network


def vit(
    classes: int = 1000,
    *,
    image: int = 224,
    patch: int = 16,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    mlp: int | None = None,
    channels: int = 3,
) -> nn.Module:
    """A pre-norm vision transformer with a class token, on images of ``image`` x ``image`` pixels.

    ``mlp`` is the hidden width of a block, 4 dim if not given. Attention is torch's fused one, which has no second
    derivative: for exact Hessian products run it under ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.
    Raises ``ValueError`` where the patches do not tile the image or the heads do not divide dim.
    """
    _check_vit(image, patch, dim, heads)
    return _VisionTransformer(classes, image, patch, dim, depth, heads, mlp or 4 * dim, channels)


def vit_b16(classes: int = 1000, *, image: int = 224) -> nn.Module:
    """ViT-B/16: 12 blocks of width 768; 86,567,656 parameters with 1,000 classes."""
    return vit(classes, image=image)


def vit_l16(classes: int = 1000, *, image: int = 224) -> nn.Module:
    """ViT-L/16: 24 blocks of width 1,024; 304,326,632 parameters with 1,000 classes."""
    return vit(classes, image=image, dim=1024, depth=24, heads=16)


def small_vit(
    classes: int = 10,
    *,
    image: int = 8,
    patch: int = 2,
    dim: int = 64,
    depth: int = 3,
    heads: int = 4,
    mlp: int | None = None,
    channels: int = 1,
) -> nn.Module:
    """A pre-norm vision transformer without a class token: the classifier reads every token.

    ``mlp`` is 2 dim if not given. Attention is written out, so that exact Hessian products work. Raises as
    :func:`vit`.
    """
    _check_vit(image, patch, dim, heads)
    return _SmallVisionTransformer(classes, image, patch, dim, depth, heads, mlp or 2 * dim, channels)


class _ResNet(nn.Module):
    def __init__(self, block, depths: Sequence[int], widths: Sequence[int], classes: int, channels: int, stem: str):
        super().__init__()
        width = widths[0]
        if stem == "cifar":
            self.stem = nn.Sequential(_conv(channels, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        elif stem == "imagenet":
            pool = nn.MaxPool2d(3, stride=2, padding=1)
            self.stem = nn.Sequential(_conv(channels, width, 7, stride=2), nn.BatchNorm2d(width), nn.ReLU(), pool)
        else:
            raise ValueError(f"stem={stem!r} is unknown: choose cifar or imagenet")
        blocks, inputs = [], width
        for stage, (depth, outputs) in enumerate(zip(depths, widths, strict=True)):
            for place in range(depth):
                blocks.append(block(inputs, outputs, stride=2 if stage and not place else 1))
                inputs = outputs * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*_head(inputs, classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)))


class _BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.residual = nn.Sequential(
            _conv(inputs, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU(),
            _conv(width, width, 3), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.shortcut = _projection(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.residual = nn.Sequential(
            _conv(inputs, width, 1), nn.BatchNorm2d(width), nn.ReLU(),
            _conv(width, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU(),
            _conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        self.shortcut = _projection(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


class _WideBlock(nn.Module):
    """Where the shape changes, the shortcut starts from the activations, elsewhere from the input."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.residual = nn.Sequential(
            _conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs), nn.ReLU(), _conv(outputs, outputs, 3)
        )
        self.shortcut = None if inputs == outputs else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activate(x)
        return self.residual(activated) + (x if self.shortcut is None else self.shortcut(activated))


class _PyramidBlock(nn.Module):
    """Pre-activation without the first and with a last norm."""

    def __init__(self, inputs: int, width: int, expansion: int, stride: int):
        super().__init__()
        if expansion == 1:
            convs = [_conv(inputs, width, 3, stride), _conv(width, width, 3)]
        else:
            convs = [_conv(inputs, width, 1), _conv(width, width, 3, stride), _conv(width, width * expansion, 1)]
        layers: list[nn.Module] = [nn.BatchNorm2d(inputs)]
        for place, conv in enumerate(convs):
            layers += [*([nn.ReLU()] if place else []), conv, nn.BatchNorm2d(conv.out_channels)]
        self.residual = nn.Sequential(*layers)
        self.shortcut = nn.AvgPool2d(2) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        residual, shortcut = self.residual(x), self.shortcut(x)
        return residual + F.pad(shortcut, (0, 0, 0, 0, 0, residual.shape[1] - shortcut.shape[1]))


class _VisionTransformer(nn.Module):
    def __init__(self, classes: int, image: int, patch: int, dim: int, depth: int, heads: int, mlp: int, channels: int):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.empty(1, (image // patch) ** 2 + 1, dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.blocks = nn.Sequential(*[_TransformerBlock(dim, heads, mlp) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1).to(patches), patches], dim=1)
        return self.head(self.norm(self.blocks(tokens + self.position))[:, 0])


class _SmallVisionTransformer(nn.Module):
    def __init__(self, classes: int, image: int, patch: int, dim: int, depth: int, heads: int, mlp: int, channels: int):
        super().__init__()
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        tokens = (image // patch) ** 2
        # As large as the embedded patches: from a smaller start SGD takes many epochs to tell places apart.
        self.position = nn.Parameter(0.5 * torch.randn(1, tokens, dim))
        blocks = [_TransformerBlock(dim, heads, mlp, eps=1e-5, fused=False) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(tokens * dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).flatten(1))


class _TransformerBlock(nn.Module):
    def __init__(self, dim: int, heads: int, mlp: int, eps: float = 1e-6, fused: bool = True):
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(dim, eps=eps), _Attention(dim, heads, fused))
        self.mlp = nn.Sequential(nn.LayerNorm(dim, eps=eps), nn.Linear(dim, mlp), nn.GELU(), nn.Linear(mlp, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class _Attention(nn.Module):
    """Torch's fused kernels, or the same written out: fused kernels have no second derivative."""

    def __init__(self, dim: int, heads: int, fused: bool = True):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        q, k, v = self.query_key_value(x).view(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(n, tokens, dim))


def _check_vit(image: int, patch: int, dim: int, heads: int) -> None:
    if image % patch:
        raise ValueError(f"image={image} is no multiple of patch={patch}")
    if dim % heads:
        raise ValueError(f"dim={dim} is no multiple of heads={heads}")


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


def _projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def _head(inputs: int, classes: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)


def _he_start(network: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
