"""How sharp a minimum is: the top Hessian eigenvalue, and the rise of the loss along the gradient."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def top_hessian_eigenvalue(loss: Tensor, params: Sequence[Tensor], iterations: int) -> tuple[float, float]:
    """The Hessian's eigenvalue of largest magnitude, by power iteration on double-backward products.

    ``loss`` is a scalar with a graph that can be differentiated twice. Returns the Rayleigh quotient ``v'Hv``
    of the last unit vector (loss units per squared weight unit) and its relative residual
    ``|Hv - (v'Hv) v| / |v'Hv|``, which says how far the iteration has come.
    """
    gradients = torch.autograd.grad(loss, params, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    v = _unit([torch.randn(p.shape, generator=generator) for p in params])
    for _ in range(iterations):
        # The graph of the gradient is built once and walked again for every product.
        hv = torch.autograd.grad(gradients, params, grad_outputs=v, retain_graph=True)
        eigenvalue = _dot(v, hv)
        residual = _norm([h - eigenvalue * x for h, x in zip(hv, v, strict=True)])
        v = _unit(hv)
    return eigenvalue.item(), (residual / eigenvalue.abs()).item()


@torch.no_grad()
def loss_rise(loss_fn: Callable[[], Tensor], params: Sequence[Tensor], rho: float) -> float:
    """``L(w + rho g / |g|) - L(w)``, ``g`` the gradient at ``w``; restores the weights exactly."""
    with torch.enable_grad():
        loss = loss_fn()
        gradients = torch.autograd.grad(loss, params)
    direction = _unit(gradients)
    backup = [p.clone() for p in params]
    try:
        for p, d in zip(params, direction, strict=True):
            p.add_(d, alpha=rho)
        return (loss_fn() - loss).item()
    finally:
        for p, b in zip(params, backup, strict=True):
            p.copy_(b)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _norm(a: Sequence[Tensor]) -> Tensor:
    return _dot(a, a).sqrt()


def _unit(a: Sequence[Tensor]) -> list[Tensor]:
    norm = _norm(a)
    return [x / norm for x in a]
