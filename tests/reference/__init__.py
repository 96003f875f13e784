"""The loops that fastsam has to follow, written out tensor by tensor: to be read, not to be fast."""

from . import second_side
from .family import FAMILY, take_step
from .loops import ReferenceEigenSAM, ReferenceFriendlySAM, ReferenceSAM
from .problems import Problem, convnet, mlp
from .table import BASES, METHODS, SOME_METHODS, Method, build_optimizer, build_reference, find

__all__ = [
    "BASES",
    "FAMILY",
    "METHODS",
    "SOME_METHODS",
    "Method",
    "Problem",
    "ReferenceEigenSAM",
    "ReferenceFriendlySAM",
    "ReferenceSAM",
    "build_optimizer",
    "build_reference",
    "convnet",
    "find",
    "mlp",
    "second_side",
    "take_step",
]
