r"""Discrete SAM, and the stochastic differential equations (SDEs) that approximate it.

The training set is cut into M mini-batches with losses f_1 ... f_M and mean f. A step of SAM picks a batch c, uniformly
and with replacement:

    x  <-  x - eta h_c(x),      h_c(x) = grad f_c(x + rho u_c),      u_c = grad f_c(x) / ||grad f_c(x)||

With H_c and T_c the second and third derivatives of f_c at x, Taylor's theorem for s -> grad f_c(x + s u_c) gives

    h_c = grad f_c + rho H_c u_c + rho^2/2 T_c[u_c, u_c] + O(rho^3),        H_c u_c = grad ||grad f_c||

An SDE dX = b(X) dt + sqrt(eta) S(X)^(1/2) dW with b = -E[h_c] and S = Cov(h_c) matches the mean and the covariance of a
step over the time eta, so that its expectations at time k eta are those after k steps up to O(eta) (weak order 1).
Cutting the series for h_c gives the two of the papers, where E and Cov are over the batch c:

    second order   b = -grad (f + rho E||grad f_c||)                           S = Cov(grad f_c + rho H_c u_c)
    third order    b = -grad (f + rho E||grad f_c||) - rho^2/2 E T_c[u_c, u_c]
                   S = Cov(grad f_c + rho H_c u_c + rho^2/2 T_c[u_c, u_c])

and rho = 0 gives SGD's. The papers write S out and cut it as well, at rho (second order, where rho = O(eta^(1/2)))
and at rho^2 (third order, rho = O(eta^(1/3))). The terms kept here beyond that are of the order that the approximation
neglects; they make S a covariance, positive semi-definite at every x, which the cut sum need not be.

S^(1/2) dW needs no matrix root: with one standard normal xi_c for each batch, sum_c xi_c (h_c - E h) / sqrt(M) has just
the covariance S. With this the Euler-Maruyama method in steps dt is

    X  <-  X + b dt + sqrt(eta dt) sum_c xi_c (h_c - E h) / sqrt(M)

For a quadratic f_c the third derivative is zero, and h_c = grad f_c + rho H_c u_c exactly: both SDEs are the same
there, and with dt = eta a step has SAM's mean and covariance without any error.

Sources: Compagnoni, Biggio, Orvieto, Proske, Kersting, Lucchi, "An SDE for Modeling SAM: Theory and Insights", ICML
2023 (second order); Luo et al., "Explicit Eigenvalue Regularization Improves Sharpness-Aware Minimization", NeurIPS
2024 (third order). The derivation is the one above.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

#: The order of the expansion of h_c in rho that a process keeps; None: the discrete method itself.
PROCESSES: dict[str, int | None] = {
    "SGD": None,
    "SAM": None,
    "SDE of SGD": 0,
    "second-order SDE": 1,
    "third-order SDE": 2,
}
#: loss_fn(x, batch) of one mini-batch, differentiable three times; x is flat.
Loss = Callable[[Tensor, tuple[Tensor, ...]], Tensor]


def expansion(loss_fn: Loss, batches: tuple[Tensor, ...], x: Tensor, order: int) -> tuple[Tensor, ...]:
    """The terms grad f_c, H_c u_c and T_c[u_c, u_c] of every batch, as far as ``order`` says (0, 1 or 2).

    ``batches``: tensors whose first dimension is the batch, M of them. ``x``: (d,). Each term is (M, d). Exact, by
    forward-mode derivatives of the gradient; H_c and T_c are never formed.
    """
    gradient = grad(loss_fn)

    def terms(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        g = gradient(x, batch)
        if order == 0:
            return (g,)
        u = (g / g.norm()).detach()

        def along_u(y: Tensor) -> Tensor:
            return jvp(lambda z: gradient(z, batch), (y,), (u,))[1]

        if order == 1:
            return g, along_u(x)
        return (g, *jvp(along_u, (x,), (u,)))

    return vmap(terms)(batches)


def sam_gradient(loss_fn: Loss, batch: tuple[Tensor, ...], x: Tensor, rho: float) -> Tensor:
    """h_c(x) itself: the gradient of one batch at x + rho u_c."""
    g = grad(loss_fn)(x, batch)
    return grad(loss_fn)(x + rho * g / g.norm(), batch) if rho else g


def moments(loss_fn: Loss, batches: tuple[Tensor, ...], x: Tensor, rho: float, order: int) -> tuple[Tensor, Tensor]:
    """E[h_c], shape (d,), and the centred h_c - E[h_c], shape (M, d), of the expansion up to ``order``.

    S = centred' centred / M.
    """
    h = sum(rho**k / (1, 1, 2)[k] * term for k, term in enumerate(expansion(loss_fn, batches, x, order)))
    mean = h.mean(dim=0)
    return mean, h - mean


def euler_maruyama(
    loss_fn: Loss,
    batches: tuple[Tensor, ...],
    x: Tensor,
    *,
    lr: float,
    rho: float,
    order: int,
    dt: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """X after one step of time ``dt``; eta is ``lr``. ``x``: (d,), or (paths, d), each path with noise of its own."""
    paths = x.view(-1, x.shape[-1])
    mean, centred = vmap(lambda y: moments(loss_fn, batches, y, rho, order))(paths)
    xi = torch.randn(centred.shape[:2], generator=generator, dtype=x.dtype).to(x.device)
    noise = (lr * dt / centred.shape[1]) ** 0.5 * torch.einsum("pm,pmd->pd", xi, centred)
    return (paths - dt * mean + noise).view_as(x)


def discrete(
    loss_fn: Loss,
    batches: tuple[Tensor, ...],
    x: Tensor,
    *,
    lr: float,
    rho: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x after one step of SAM, or of SGD where rho is 0."""
    c = int(torch.randint(len(batches[0]), (), generator=generator))
    return x - lr * sam_gradient(loss_fn, tuple(b[c] for b in batches), x, rho)


# ---- the two problems ------------------------------------------------------------------------------------------


def network_loss(hidden: int, features: int, classes: int) -> tuple[int, Callable[[Tensor, Tensor], Tensor], Loss]:
    """A network of one hidden tanh layer with cross-entropy: smooth, so that T exists everywhere."""
    shapes = ((hidden, features), (hidden,), (classes, hidden), (classes,))
    sizes = [torch.Size(s).numel() for s in shapes]

    def logits(x: Tensor, images: Tensor) -> Tensor:
        w1, b1, w2, b2 = (part.view(shape) for part, shape in zip(x.split(sizes), shapes, strict=True))
        return torch.tanh(images @ w1.T + b1) @ w2.T + b2

    def loss(x: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        images, one_hot = batch
        return -(one_hot * logits(x, images).log_softmax(dim=-1)).sum(dim=-1).mean()

    return sum(sizes), logits, loss


def quadratic_loss(hidden: int, features: int, classes: int) -> tuple[int, Callable[[Tensor, Tensor], Tensor], Loss]:
    """Least squares: a linear map of the pixels onto one-hot labels, each batch a quadratic of its own."""

    def logits(x: Tensor, images: Tensor) -> Tensor:
        return images @ x.view(classes, features).T

    def loss(x: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        images, one_hot = batch
        return 0.5 * (logits(x, images) - one_hot).square().sum(dim=-1).mean()

    return classes * features, logits, loss


#: (hidden, features, classes) -> number of parameters, logits(x, images), loss(x, (images, one-hot labels)).
PROBLEMS = {"network": network_loss, "quadratic": quadratic_loss}
