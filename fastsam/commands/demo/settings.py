"""Every number the demo chooses: one table for the models, one for the methods.

All methods of a model share its learning rate, weight decay, batches and initial weights, so a difference
between two rows of the result comes from the method alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from fastsam.commands.training.networks import small_resnet, small_vit


@dataclass(frozen=True)
class ModelSettings:
    """How one model is trained; lr warms up linearly for a tenth of the steps, then decays as a cosine.

    ``rho`` is every method's radius but MomentumSAM's, which takes several times as much.
    """

    build: Callable[[], nn.Module]
    lr: float
    weight_decay: float
    epochs: int
    batch_size: int
    rho: float
    momentum_sam_rho: float
    momentum: float = 0.9


@dataclass(frozen=True)
class DataSettings:
    """How the digits are split; ``label_noise`` is the share of training labels replaced by a wrong class."""

    train_size: int = 768
    label_noise: float = 0.2
    sharpness_size: int = 256
    split_seed: int = 0


# The short runs first: they fill a table within a minute.
MODELS = {
    "ResNet": ModelSettings(
        small_resnet, lr=0.1, weight_decay=1e-3, epochs=16, batch_size=128, rho=0.2, momentum_sam_rho=1.6
    ),
    "ViT": ModelSettings(
        small_vit, lr=0.05, weight_decay=1e-3, epochs=24, batch_size=64, rho=0.1, momentum_sam_rho=0.8
    ),
}

# A spread over seeds where it costs little, one run of the larger model to see the same there.
SEEDS = {"ResNet": 3, "ViT": 1}

# What a method takes beyond the model's rho. The runs last a few hundred steps, so Eigen-SAM refreshes its
# vector more often than its default of every 100.
METHODS = {
    "SGD": {},
    "SAM": {},
    "F-SAM": {"sigma": 1.0, "lmbda": 0.9},
    "Eigen-SAM": {"alpha": 0.2, "freq": 40},
    "MomentumSAM": {},
}

DATA = DataSettings()

# Sharpness is measured alike for all methods, whatever radius they trained with.
SHARPNESS_RHO = 0.05
SHARPNESS_TOLERANCE = 1e-2


@dataclass(frozen=True)
class CurvatureSettings:
    """The panels: alignment and top eigenvalue every ``every`` steps of some runs, from the first ``images`` ones."""

    model: str
    methods: tuple[str, ...]
    every: int
    images: int


CURVATURE = CurvatureSettings("ViT", ("SGD", "SAM", "Eigen-SAM"), every=36, images=128)

# Two epochs of four steps: enough to run every line, not to learn.
QUICK_MODELS = {name: replace(model, epochs=2, batch_size=32) for name, model in MODELS.items()}
QUICK_METHODS = {**METHODS, "Eigen-SAM": {**METHODS["Eigen-SAM"], "freq": 3}}
QUICK_CURVATURE = replace(CURVATURE, every=4, images=32)
QUICK_DATA = replace(DATA, train_size=128, sharpness_size=32)
