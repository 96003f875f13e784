"""What fastsam is measured against, and fastsam itself, behind one face: ``first_step`` and ``second_step``.

| name | what it is |
|---|---|
| ``fastsam`` | the optimizer with its default backend |
| ``fastsam-flat`` | the same after ``flatten_parameters`` |
| ``authors`` | the published code's loop over tensors (``per_tensor.py``), the base with torch's defaults |
| ``foreach`` | ``torch._foreach_*`` by hand (``foreach.py``), the base with ``foreach=True`` |
| ``foreach-fused`` | the same climb, the base with torch's ``fused=True`` |
| ``compiled`` | both passes, base update included, under ``torch.compile`` (``compiled.py``) |
| ``pytorch_optimizer`` | the classes of that package with ``foreach=True``; it has no Eigen-SAM |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from benchmarks.compiled import Compiled
from benchmarks.foreach import Foreach
from benchmarks.per_tensor import PerTensorEigenSAM, PerTensorFriendlySAM, PerTensorSAM
from benchmarks.settings import ALPHA, BASES, LMBDA, RHO, SIGMA


class NotOffered(Exception):
    """The implementation has no such method; the message says so in words fit for a table."""


class TwoPassOptimizer(Protocol):
    def first_step(self) -> None: ...
    def second_step(self) -> None: ...


@dataclass
class Runner:
    """One implementation on its own copy of the weights."""

    optimizer: TwoPassOptimizer
    parameters: list[torch.Tensor]
    keeps_gradients: bool = False  # gradients live at fixed addresses and are accumulated in place

    def load_gradients(self, gradients: list[torch.Tensor]) -> None:
        """Gives every parameter a gradient the way a backward pass does: through autograd, so that
        a gradient is a new tensor at a new address unless the implementation keeps its own."""
        for parameter in self.parameters:
            if not self.keeps_gradients:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()
        torch.autograd.backward(self.parameters, gradients)


Weights = list[torch.Tensor]
Builder = Callable[[str, str, Any, Weights, Weights], Runner]


def implementation_names() -> list[str]:
    return list(_BUILDERS)


def build(name: str, method: str, base: str, parameter_set: Any, weights: Weights, eigenvector: Weights) -> Runner:
    """``name``'s optimizer of ``method`` over ``base`` on a copy of ``weights``.

    Raises ``NotOffered`` where the implementation lacks the method, ``ValueError`` for an unknown name.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown implementation {name!r}; known: {', '.join(_BUILDERS)}")
    return _BUILDERS[name](method, base, parameter_set, weights, eigenvector)


def fastsam_optimizer(method: str, base: str, parameters: list[torch.Tensor], eigenvector: Weights):
    """fastsam's optimizer with the benchmark's hyper-parameters."""
    import fastsam

    base_class, options = BASES[base]
    if method == "sam":
        return fastsam.SAM(parameters, base_class, rho=RHO, **options)
    if method == "fsam":
        return fastsam.FriendlySAM(parameters, base_class, rho=RHO, sigma=SIGMA, lmbda=LMBDA, **options)
    optimizer = fastsam.EigenSAM(parameters, base_class, rho=RHO, alpha=ALPHA, **options)
    optimizer.eigenvector = eigenvector
    return optimizer


def _build_fastsam(method, base, parameter_set, weights, eigenvector) -> Runner:
    parameters = _copies(weights)
    return Runner(fastsam_optimizer(method, base, parameters, eigenvector), parameters)


def _build_fastsam_flat(method, base, parameter_set, weights, eigenvector) -> Runner:
    from fastsam import flatten_parameters

    module = parameter_set.module(weights)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    flatten_parameters(module)
    parameters = list(module.parameters())
    optimizer = fastsam_optimizer(method, base, parameters, eigenvector)
    return Runner(optimizer, parameters, keeps_gradients=True)


def _build_authors(method, base, parameter_set, weights, eigenvector) -> Runner:
    parameters = _copies(weights)
    if method == "eigensam":
        return Runner(PerTensorEigenSAM(parameters, base, eigenvector), parameters)
    return Runner({"sam": PerTensorSAM, "fsam": PerTensorFriendlySAM}[method](parameters, base), parameters)


def _build_foreach(method, base, parameter_set, weights, eigenvector) -> Runner:
    parameters = _copies(weights)
    return Runner(Foreach(method, base, parameters, eigenvector, foreach=True), parameters)


def _build_foreach_fused(method, base, parameter_set, weights, eigenvector) -> Runner:
    parameters = _copies(weights)
    return Runner(Foreach(method, base, parameters, eigenvector, fused=True), parameters)


def _build_compiled(method, base, parameter_set, weights, eigenvector) -> Runner:
    parameters = _copies(weights)
    return Runner(Compiled(method, base, parameters, eigenvector), parameters)


def _build_pytorch_optimizer(method, base, parameter_set, weights, eigenvector) -> Runner:
    if method == "eigensam":
        raise NotOffered("no Eigen-SAM there")
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise NotOffered("not installed") from error
    base_class, options = BASES[base]
    parameters = _copies(weights)
    if method == "sam":
        optimizer = pytorch_optimizer.SAM(parameters, base_class, rho=RHO, foreach=True, **options)
    else:
        optimizer = pytorch_optimizer.FriendlySAM(
            parameters, base_class, rho=RHO, sigma=SIGMA, lmbda=LMBDA, foreach=True, **options
        )
    return Runner(optimizer, parameters)


def _copies(weights: Weights) -> list[torch.Tensor]:
    return [torch.nn.Parameter(weight.clone()) for weight in weights]


_BUILDERS: dict[str, Builder] = {
    "fastsam": _build_fastsam,
    "fastsam-flat": _build_fastsam_flat,
    "authors": _build_authors,
    "foreach": _build_foreach,
    "foreach-fused": _build_foreach_fused,
    "compiled": _build_compiled,
    "pytorch_optimizer": _build_pytorch_optimizer,
}
