"""fastsam: sharpness-aware optimizers (SAM, ASAM, F-SAM, Eigen-SAM and their family) on fused kernels.

The distribution is fastsam-optim: ``pip install fastsam-optim``, ``import fastsam``.
"""

from typing import TYPE_CHECKING

from fastsam.flat.flatten import flatten_parameters
from fastsam.kernels import backends
from fastsam.methods.eigen import EigenSAM
from fastsam.methods.friendly import FriendlySAM
from fastsam.methods.friendly_eigen import FriendlyEigenSAM
from fastsam.methods.gsam import GSAM
from fastsam.methods.look import LookSAM
from fastsam.methods.momentum import MomentumSAM
from fastsam.methods.norm_only import norm_only_groups
from fastsam.methods.sam import SAM
from fastsam.methods.stable import StableSAM
from fastsam.methods.vasso import VaSSO
from fastsam.methods.wsam import WSAM

__version__ = "0.1.0"

__all__ = [
    "GSAM",
    "SAM",
    "WSAM",
    "EigenSAM",
    "FriendlyEigenSAM",
    "FriendlySAM",
    "LookSAM",
    "MomentumSAM",
    "StableSAM",
    "VaSSO",
    "backends",
    "flatten_parameters",
    "norm_only_groups",
]

if not TYPE_CHECKING:  # a type checker that sees it would accept every name

    def __getattr__(name: str) -> object:
        """What somebody asks for who wanted Fast Segment Anything, which has the same import name."""
        if name in ("FastSAM", "FastSAMPredictor", "FastSAMPrompt", "FastSAMDecoder"):
            raise ImportError(
                f"{name} is Fast Segment Anything's, but `import fastsam` found fastsam-optim in {__path__[0]}: "
                "the two have the same import name and need an environment each"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
