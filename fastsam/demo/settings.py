"""Every number the demo chooses: one table for the models, one for the methods.

All methods of a model share its learning rate, weight decay, batches and initial weights, so a difference
between two rows of the result comes from the method alone.
"""

from dataclasses import dataclass, replace

from torch import nn

from .models import ResNet, VisionTransformer


@dataclass(frozen=True)
class ModelSettings:
    """How one model is trained; lr warms up linearly for a tenth of the steps, then decays as a cosine."""

    build: type[nn.Module]
    lr: float
    weight_decay: float
    epochs: int
    batch_size: int
    rho: float
    momentum: float = 0.9


@dataclass(frozen=True)
class DataSettings:
    """How the digits are split; ``label_noise`` is the share of training labels replaced by a wrong class."""

    train_size: int = 768
    label_noise: float = 0.2
    sharpness_size: int = 256
    split_seed: int = 0


MODELS = {
    "ViT": ModelSettings(VisionTransformer, lr=0.05, weight_decay=1e-3, epochs=24, batch_size=64, rho=0.1),
    "ResNet": ModelSettings(ResNet, lr=0.1, weight_decay=1e-3, epochs=16, batch_size=128, rho=0.2),
}

# What a method takes beyond the model's rho. The runs last a few hundred steps, so Eigen-SAM refreshes its
# vector more often than its default of every 100.
METHODS = {
    "SGD": {},
    "SAM": {},
    "F-SAM": {"sigma": 1.0, "lmbda": 0.9},
    "Eigen-SAM": {"alpha": 0.2, "freq": 40},
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
