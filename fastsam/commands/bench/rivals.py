"""What fastsam is measured against, and fastsam itself, behind one face: ``first_step`` and ``second_step``.

| name | what it is |
|---|---|
| ``fastsam`` | the optimizer with its default backend |
| ``fastsam-flat`` | the same after ``flatten_parameters`` |
| ``fastsam-triton`` | the optimizer with the Triton backend, on a GPU |
| ``authors`` | the published code's loop over tensors (``per_tensor.py``), the base with torch's defaults |
| ``foreach`` | ``torch._foreach_*`` by hand (``foreach.py``), the base with ``foreach=True`` |
| ``foreach-fused`` | the same climb, the base with torch's ``fused=True`` |
| ``compiled`` | both passes, base update included, under ``torch.compile`` (``compiled.py``) |
| ``pytorch_optimizer`` | the classes of that package with ``foreach=True``, where they mean the same |

``authors`` and ``compiled`` have SAM, F-SAM and Eigen-SAM, ``foreach`` and ``foreach-fused`` every method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Protocol

import torch
from torch import nn

from fastsam.commands.bench.compiled import Compiled
from fastsam.commands.bench.foreach import Foreach
from fastsam.commands.bench.per_tensor import PerTensorEigenSAM, PerTensorFriendlySAM, PerTensorSAM
from fastsam.commands.bench.settings import ALPHA, BASES, FAMILY, LMBDA, METHODS, RHO, SIGMA, Kind, cycle

_CLASSES = {
    "momentumsam": "MomentumSAM",
    "gsam": "GSAM",
    "wsam": "WSAM",
    "looksam": "LookSAM",
    "stablesam": "StableSAM",
    "vasso": "VaSSO",
}
_NEVER = 1 << 30  # steps until an eigenvector is due: it is given instead


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
    cycle: tuple[Kind, ...] = (Kind(),)  # of its steps, in turn

    def load_gradients(self, gradients: list[torch.Tensor]) -> None:
        """Gives every parameter a gradient the way a backward pass does: through autograd, so that
        a gradient is a new tensor at a new address unless the implementation keeps its own."""
        self.drop_gradients()
        torch.autograd.backward(self.parameters, gradients)

    def drop_gradients(self) -> None:
        """Clears the gradients as a training loop does after a pass."""
        if self.keeps_gradients:
            self.optimizer.zero_grad()  # type: ignore[attr-defined]  # whoever keeps them has it
        else:
            for parameter in self.parameters:
                parameter.grad = None


Weights = list[torch.Tensor]
Builder = Callable[[str, str, nn.Module, Weights], Runner]


def implementation_names() -> list[str]:
    return list(_BUILDERS)


def build(name: str, method: str, base: str, module: nn.Module, eigenvector: Weights) -> Runner:
    """``name``'s optimizer of ``method`` over ``base`` for the parameters of ``module``.

    Raises ``NotOffered`` where the implementation lacks the method, ``ValueError`` for an unknown name.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown implementation {name!r}; known: {', '.join(_BUILDERS)}")
    runner = _BUILDERS[name](method, base, module, eigenvector)
    runner.cycle = cycle(method)
    return runner


def fastsam_optimizer(
    method: str, base: str, parameters: list[torch.Tensor], eigenvector: Weights, backend: str = "auto"
):
    """fastsam's optimizer with the benchmark's hyper-parameters."""
    import fastsam

    base_class, options = BASES[base]
    options = {**options, "backend": backend}
    if method == "sam":
        return fastsam.SAM(parameters, base_class, rho=RHO, **options)
    if method == "fsam":
        return fastsam.FriendlySAM(parameters, base_class, rho=RHO, sigma=SIGMA, lmbda=LMBDA, **options)
    if method in FAMILY:
        return getattr(fastsam, _CLASSES[method])(parameters, base_class, **FAMILY[method], **options)
    optimizer = fastsam.EigenSAM(parameters, base_class, rho=RHO, alpha=ALPHA, freq=_NEVER, **options)
    optimizer.eigenvector = eigenvector
    return optimizer


def _build_fastsam(method, base, module, eigenvector) -> Runner:
    parameters = list(module.parameters())
    return Runner(fastsam_optimizer(method, base, parameters, eigenvector), parameters)


def _build_fastsam_flat(method, base, module, eigenvector) -> Runner:
    from fastsam import flatten_parameters

    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    flatten_parameters(module)
    parameters = list(module.parameters())
    optimizer = fastsam_optimizer(method, base, parameters, eigenvector)
    return Runner(optimizer, parameters, keeps_gradients=True)


def _build_fastsam_triton(method, base, module, eigenvector) -> Runner:
    from fastsam.kernels import triton

    parameters = list(module.parameters())
    first = parameters[0]
    reason = "needs a GPU" if first.device.type == "cpu" else triton.unavailable()
    if reason or (reason := triton.refuses(first.device, first.dtype)):
        raise NotOffered(reason)
    return Runner(fastsam_optimizer(method, base, parameters, eigenvector, "triton"), parameters)


def _build_authors(method, base, module, eigenvector) -> Runner:
    _refuse_family(method)
    parameters = list(module.parameters())
    if method == "eigensam":
        return Runner(PerTensorEigenSAM(parameters, base, eigenvector), parameters)
    return Runner({"sam": PerTensorSAM, "fsam": PerTensorFriendlySAM}[method](parameters, base), parameters)


def _build_foreach(method, base, module, eigenvector) -> Runner:
    parameters = list(module.parameters())
    return Runner(Foreach(method, base, parameters, eigenvector, foreach=True), parameters)


def _build_foreach_fused(method, base, module, eigenvector) -> Runner:
    parameters = list(module.parameters())
    return Runner(Foreach(method, base, parameters, eigenvector, fused=True), parameters)


def _build_compiled(method, base, module, eigenvector) -> Runner:
    _refuse_family(method)
    parameters = list(module.parameters())
    return Runner(Compiled(method, base, parameters, eigenvector), parameters)


def _refuse_family(method: str) -> None:
    if method in FAMILY:
        raise NotOffered("SAM, F-SAM and Eigen-SAM only")


def _build_pytorch_optimizer(method, base, module, eigenvector) -> Runner:
    if method == "looksam":
        raise NotOffered("another LookSAM: norms of each tensor")
    if method not in ("sam", "fsam", "gsam", "wsam"):
        raise NotOffered(f"no {METHODS[method]} there")
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise NotOffered("not installed") from error
    base_class, options = BASES[base]
    parameters = list(module.parameters())
    optimizer: TwoPassOptimizer
    if method == "gsam":
        own = base_class(parameters, **{**options, "foreach": True})
        optimizer = _TheirGSAM(pytorch_optimizer.GSAM, own, module)
    elif method == "wsam":
        optimizer = pytorch_optimizer.WSAM(module, parameters, base_class, **FAMILY["wsam"], foreach=True, **options)
    elif method == "sam":
        optimizer = pytorch_optimizer.SAM(parameters, base_class, rho=RHO, foreach=True, **options)
    else:
        optimizer = pytorch_optimizer.FriendlySAM(
            parameters, base_class, rho=RHO, sigma=SIGMA, lmbda=LMBDA, foreach=True, **options
        )
    return Runner(optimizer, parameters)


class _TheirGSAM:
    """pytorch_optimizer's GSAM, whose ``step`` calls these between two evaluations of a closure."""

    def __init__(self, optimizer: type, base_optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        given = FAMILY["gsam"]
        radius = SimpleNamespace(step=lambda: given["rho"])
        parameters = base_optimizer.param_groups[0]["params"]
        self._optimizer = optimizer(parameters, base_optimizer, module, radius, alpha=given["alpha"], foreach=True)

    def first_step(self) -> None:
        self._optimizer.perturb_weights(rho=self._optimizer.rho_t)

    def second_step(self) -> None:
        self._optimizer.gradient_decompose(self._optimizer.alpha)
        self._optimizer.un_perturb()
        self._optimizer.base_optimizer.step()


_BUILDERS: dict[str, Builder] = {
    "fastsam": _build_fastsam,
    "fastsam-flat": _build_fastsam_flat,
    "fastsam-triton": _build_fastsam_triton,
    "authors": _build_authors,
    "foreach": _build_foreach,
    "foreach-fused": _build_foreach_fused,
    "compiled": _build_compiled,
    "pytorch_optimizer": _build_pytorch_optimizer,
}
