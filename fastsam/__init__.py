"""fastsam: sharpness-aware optimizers (SAM, ASAM, F-SAM, Eigen-SAM) on fused kernels."""

from fastsam.flatten import flatten_parameters
from fastsam.kernels import backends
from fastsam.methods.eigen import EigenSAM
from fastsam.methods.friendly import FriendlySAM
from fastsam.methods.friendly_eigen import FriendlyEigenSAM
from fastsam.methods.sam import SAM

__all__ = ["SAM", "EigenSAM", "FriendlyEigenSAM", "FriendlySAM", "backends", "flatten_parameters"]
