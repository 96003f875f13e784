"""What a row of a table sets, for a training run or for a path of an SDE."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TrainSettings:
    """One training run. Zeros mean: not used, or all there are."""

    data: str
    network: str
    method: str
    epochs: int
    batch_size: int
    lr: float
    base: str = "SGD"
    momentum: float = 0.9  # of SGD
    weight_decay: float = 0.0
    warmup: float = 0.0  # share of all steps
    schedule: str = "step"  # what the cosine decays after: every "step" or every "epoch"
    drop_last: bool = False
    rho: float = 0.05
    sigma: float = 1.0
    lmbda: float = 0.9
    alpha: float = 0.2  # of Eigen-SAM; GSAM and LookSAM want 0.4 and 0.7 or so
    freq: int = 100
    count_in_epoch: bool = False  # freq counts from the start of each epoch, as Eigen-SAM's authors do
    full_gradient: str = "average"  # of the ablation: a moving average, or "exact"
    gamma: float = 0.9  # of WSAM
    k: int = 5  # of LookSAM
    theta: float = 0.4  # of VaSSO
    ascent_share: float = 1.0  # of the batch, for the perturbation
    flip: bool = False
    crop: int = 0  # pixels of padding
    cutout: int = 0  # pixels of the square's side
    label_noise: float = 0.0
    mean: list = field(default_factory=list)  # of each channel in [0, 1]; none: the training set's own
    std: list = field(default_factory=list)
    image_size: int = 0  # images are scaled to it when they are read
    scale_to: int = 0  # and to this in the batch
    train_size: int = 0
    train_every: int = 0  # of these, every so-many-th image
    validation: int = 0  # test on so many images taken from the training set instead
    checkpoint: str = ""  # of a pre-trained network
    network_options: dict = field(default_factory=dict)
    measure_every: int = 0  # steps between two measurements of curvature
    measure_size: int = 256  # images of one


@dataclass(frozen=True)
class SdeSettings:
    """One path of a discrete method, or of the stochastic differential equation that stands for it."""

    data: str
    problem: str  # "network" or "quadratic"
    process: str
    steps: int
    lr: float
    rho: float
    batches: int  # the training set is cut into so many
    substeps: int = 1  # Euler-Maruyama steps for a time of lr
    hidden: int = 16
    train_size: int = 0
    measure_every: int = 50


def nearest(name: str, among) -> str:
    """``; did you mean ...?`` if something is near, and what there is."""
    among = list(among)
    near = difflib.get_close_matches(str(name), among, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{hint} (there are: {', '.join(among)})" if len(among) <= 30 or not near else hint
