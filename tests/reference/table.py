"""The methods and base optimizers that the tests run over, each with its plain counterpart."""

from typing import NamedTuple

import torch

import fastsam

from .loops import ReferenceEigenSAM, ReferenceFriendlyEigenSAM, ReferenceFriendlySAM, ReferenceSAM


class Method(NamedTuple):
    name: str  # of the class in fastsam
    reference: type
    kwargs: dict
    eigenvector: str = ""  # "given": set by the caller; "own": from update_eigenvector


class PlainSubclass(torch.optim.SGD):
    """A user's own SGD. Its step may do anything, so it must be called rather than replaced."""

    calls = 0

    def step(self, closure=None):
        type(self).calls += 1
        return super().step(closure)


def _friendly(**kwargs):
    return Method("FriendlySAM", ReferenceFriendlySAM, {"rho": 0.05, **kwargs})


METHODS = {
    "SAM": Method("SAM", ReferenceSAM, {"rho": 0.05}),
    "ASAM": Method("SAM", ReferenceSAM, {"rho": 0.5, "adaptive": True}),
    **{
        f"F-SAM sigma={sigma} lmbda={lmbda}": _friendly(sigma=sigma, lmbda=lmbda)
        for sigma in (1.0, 0.5)
        for lmbda in (0.6, 0.9, 0.95)
    },
    "adaptive F-SAM": _friendly(rho=0.5, adaptive=True),
    "Eigen-SAM given v": Method("EigenSAM", ReferenceEigenSAM, {"alpha": 0.2}, "given"),
    "adaptive Eigen-SAM given v": Method("EigenSAM", ReferenceEigenSAM, {"alpha": 0.2, "adaptive": True}, "given"),
    "F-SAM + Eigen-SAM given v": Method(
        "FriendlyEigenSAM", ReferenceFriendlyEigenSAM, {"sigma": 0.5, "lmbda": 0.8, "alpha": 0.2}, "given"
    ),
    "Eigen-SAM own v": Method("EigenSAM", ReferenceEigenSAM, {"alpha": 0.2, "freq": 20}, "own"),
}

#: One of each kind: what every backend is held against the specification with.
SOME_METHODS = [
    "SAM",
    "ASAM",
    "F-SAM sigma=0.5 lmbda=0.9",
    "Eigen-SAM given v",
    "adaptive Eigen-SAM given v",
    "F-SAM + Eigen-SAM given v",
]

BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.05}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}),
    "SGD nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "SGD dampening": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.01}),
    "SGD maximize": (torch.optim.SGD, {"lr": 0.002, "momentum": 0.5, "weight_decay": 0.1, "maximize": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.003, "weight_decay": 0.05}),
    "AdamW maximize": (torch.optim.AdamW, {"lr": 0.0003, "maximize": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.003, "weight_decay": 0.01, "betas": (0.8, 0.99), "eps": 1e-6}),
    "AdamW amsgrad": (torch.optim.AdamW, {"lr": 0.003, "amsgrad": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.002, "momentum": 0.5}),
    "SGD subclass": (PlainSubclass, {"lr": 0.05, "momentum": 0.9}),
}


def find(method):
    """The row of a name here or in `family.FAMILY`."""
    from .family import FAMILY  # whose rows are of the type above

    return METHODS[method] if method in METHODS else FAMILY[method]


def build_optimizer(method, base, params, backend, **extra):
    """The fastsam optimizer for a method's and a base optimizer's name in the tables above."""
    method, (base_class, base_kwargs) = find(method), BASES[base]
    return getattr(fastsam, method.name)(
        params, base_class, **{**method.kwargs, **base_kwargs, **extra}, backend=backend
    )


def build_reference(method, base, params, **extra):
    """The plain loop for the same two names."""
    method, (base_class, base_kwargs) = find(method), BASES[base]
    return method.reference(params, base_class, **{**method.kwargs, **base_kwargs, **extra})
