"""Augmentation of whole batches, on the device they are on, and labels that are wrong on purpose.

Images are tensors of shape (N, C, H, W) and any dtype; a new batch is returned. Random numbers come from ``generator``
and are drawn where it lives, so a generator on the CPU gives the same pictures on every device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop(images: Tensor, padding: int, generator: torch.Generator | None = None) -> Tensor:
    """Each image shifted by up to ``padding`` pixels in both directions; what comes in from outside is 0."""
    if padding < 0:
        raise ValueError(f"padding={padding} must be at least 0 pixels")
    if padding == 0:
        return images.clone()
    n, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = _integers(0, 2 * padding + 1, (2, n), images, generator)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    which = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def random_flip(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each image mirrored left to right with probability 1/2."""
    flip = _integers(0, 2, (len(images),), images, generator).bool()
    return torch.where(flip[:, None, None, None], images.flip(-1), images)


def cutout(images: Tensor, size: int, generator: torch.Generator | None = None, *, share: float = 0.5) -> Tensor:
    """A square of ``size`` x ``size`` pixels set to 0 in each image, with probability ``share``.

    The square's corner is uniform from -size/2 to the image's side - size/2, so it may stick out. F-SAM's authors cut
    16 pixels of a normalised CIFAR image, where 0 is the mean colour, in half of the images. Source: DeVries, Taylor,
    "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1 pixel")
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} must be in [0, 1]")
    n, _, height, width = images.shape
    half = size // 2
    inside = []
    for side in (height, width):
        corner = _integers(-half, side - half, (n, 1), images, generator)
        places = torch.arange(side, device=images.device)
        inside.append((places >= corner) & (places < corner + size))
    cut = torch.rand(n, generator=generator, device=_home(images, generator)).to(images.device) < share
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :] & cut[:, None, None, None]
    return images.masked_fill(square, 0)


def label_noise(
    labels: Tensor, share: float, classes: int, seed: int | torch.Generator, *, always_wrong: bool = False
) -> Tensor:
    """Symmetric label noise as F-SAM's authors have it: ``share`` of the labels, exactly, are drawn anew.

    round(share * N) labels, chosen without replacement, get a class drawn uniformly from *all* ``classes``, the right
    one included, so that share * (1 - 1/classes) of all labels are wrong in expectation; with ``always_wrong`` from the
    other classes. Returns int64 labels on the device of ``labels``; the same for the same seed, or generator on the
    CPU, on every device.

    Raises ``ValueError`` for a share outside [0, 1] and for labels outside [0, classes).
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} must be in [0, 1]")
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < classes):
        raise ValueError(f"labels go from {int(labels.min())} to {int(labels.max())}: they must be in [0, {classes})")
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    noisy = labels.long().cpu().clone()
    drawn = torch.randint(int(always_wrong), classes, (len(chosen),), generator=generator)
    noisy[chosen] = (noisy[chosen] + drawn) % classes if always_wrong else drawn
    return noisy.to(labels.device)


def _integers(low: int, high: int, shape: tuple[int, ...], images: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randint(low, high, shape, generator=generator, device=_home(images, generator)).to(images.device)


def _home(images: Tensor, generator: torch.Generator | None) -> torch.device:
    return images.device if generator is None else generator.device
