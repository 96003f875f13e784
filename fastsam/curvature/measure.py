"""Sharpness for anybody: eigenpairs, trace and spectral density of the loss's Hessian, and who is aligned with whom.

All take what :class:`~fastsam.curvature.Hessian` takes: a loss function, a module or its parameters, and options
such as ``batches`` and ``method``; ``progress``, if given, is called after every product. The mode (train or eval) is
the one the module is in. Source of the trace and the density: Yao, Gholami, Keutzer, Mahoney, "PyHessian: Neural
Networks Through the Lens of the Hessian", IEEE Big Data 2020, and the methods it names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastsam.curvature.evaluations import batch_size
from fastsam.curvature.products import Hessian, MeasureOptions
from fastsam.curvature.solvers import Eigenpairs, Krylov, lanczos, power_iteration

SOLVERS = ("lanczos", "power")


def top_eigenpairs(
    loss_fn: Callable[..., Tensor],
    params: nn.Module | Iterable[Tensor],
    k: int = 1,
    *,
    which: str = "largest",
    solver: str = "lanczos",
    products: int = 100,
    tolerance: float | None = 1e-2,
    basis: int | None = None,
    start: Iterable[Tensor] | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[], object] | None = None,
    **options: Unpack[MeasureOptions],
) -> Eigenpairs:
    """``k`` eigenpairs of the Hessian, ``which`` of :func:`~fastsam.curvature.lanczos`'s ends they are from.

    Args:
        solver: ``"lanczos"``, or ``"power"`` for the one of largest magnitude (``k=1, which="magnitude"``).
        products, tolerance, basis: as for :func:`~fastsam.curvature.lanczos`.
        start: a tensor for each parameter to start from, such as an earlier eigenvector. None: normal noise, for
            Lanczos with some gradient (:meth:`~fastsam.curvature.Hessian.start`).
        generator: draws the noise.
        options: as for :class:`~fastsam.curvature.Hessian`.

    Returns :class:`~fastsam.curvature.Eigenpairs`; ``vectors[i]`` is a list of tensors shaped like the parameters.
    The Hessian of a linear loss is zero: its eigenvalues are 0 and their residuals too.

    Example:
        >>> pairs = top_eigenpairs(lambda: loss_fn(model(x), y), model, k=5)
        >>> pairs.eigenvalues.shape, pairs.residuals.shape
        (torch.Size([5]), torch.Size([5]))
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown: choose one of {', '.join(SOLVERS)}")
    if solver == "power" and (k, which) != (1, "magnitude"):
        raise ValueError(
            "power iteration finds the one eigenvalue of largest magnitude: say k=1, which='magnitude', or "
            "solver='lanczos'"
        )
    with Hessian(loss_fn, params, **options) as hessian:
        product = _told(hessian.product, progress)

        def begin() -> Tensor:
            if start is not None:
                return hessian.flat(start)
            return hessian.random(generator) if solver == "power" else hessian.start(generator)

        if solver == "power":
            pairs = power_iteration(product, begin(), products, tolerance, hessian.inner)
        else:
            pairs = lanczos(product, begin(), k, which, products, tolerance, basis, hessian.inner)
        return dataclasses.replace(pairs, vectors=[hessian.tensors(v) for v in pairs.vectors])


@dataclass(frozen=True)
class Trace:
    """Hutchinson's estimate of the trace: the mean of the samples z'Hz, and its standard error."""

    value: float
    standard_error: float
    samples: tuple[float, ...]


def trace(
    loss_fn: Callable[..., Tensor],
    params: nn.Module | Iterable[Tensor],
    *,
    probes: int = 30,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[], object] | None = None,
    **options: Unpack[MeasureOptions],
) -> Trace:
    """The Hessian's trace, from ``probes`` products with vectors z of random signs: E[z'Hz] = tr H.

    With a ``tolerance`` it stops, after 5 probes at the earliest, when the standard error is at most that share of the
    trace. Raises ``ValueError`` for fewer than 2 probes, which have no standard error, or a tolerance out of range.
    """
    if probes < 2:
        raise ValueError(f"probes={probes} must be at least 2: the standard error needs more than one")
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance!r} must be a positive number, or None")
    samples: list[float] = []
    with Hessian(loss_fn, params, **options) as hessian:
        product = _told(hessian.product, progress)
        for _ in range(probes):
            z = hessian.random(generator).sign_()
            samples.append(hessian.inner.dot(z, product(z)))
            if tolerance is not None and len(samples) >= 5:
                value, error = _mean_and_error(samples)
                if error <= tolerance * abs(value):
                    break
    return Trace(*_mean_and_error(samples), tuple(samples))


def _told(product: Callable[[Tensor], Tensor], progress: Callable[[], object] | None) -> Callable[[Tensor], Tensor]:
    """``product``, with ``progress()`` after each."""
    if progress is None:
        return product

    def product_and_progress(v: Tensor) -> Tensor:
        h = product(v)
        progress()
        return h

    return product_and_progress


def _mean_and_error(samples: list[float]) -> tuple[float, float]:
    n = len(samples)
    mean = sum(samples) / n
    return mean, math.sqrt(sum((s - mean) ** 2 for s in samples) / (n - 1) / n)


@dataclass(frozen=True)
class SpectralDensity:
    """The density of eigenvalues, as stochastic Lanczos quadrature sees it.

    Attributes:
        grid, density: the smoothed density at equidistant points, float64; its integral is 1.
        nodes, weights: the quadrature, shape (probes, steps): eigenvalues and the share of the spectrum at each.
        sigma: standard deviation of the Gaussian that smooths, in the units of the eigenvalues.
    """

    grid: Tensor
    density: Tensor
    nodes: Tensor
    weights: Tensor
    sigma: float


def spectral_density(
    loss_fn: Callable[..., Tensor],
    params: nn.Module | Iterable[Tensor],
    *,
    probes: int = 5,
    steps: int = 50,
    sigma: float | None = None,
    points: int = 1000,
    generator: torch.Generator | None = None,
    progress: Callable[[], object] | None = None,
    **options: Unpack[MeasureOptions],
) -> SpectralDensity:
    """The density of the Hessian's eigenvalues, by stochastic Lanczos quadrature.

    Each of ``probes`` random start vectors takes ``steps`` products and as many vectors of memory. ``sigma`` defaults
    to 1 % of the spectrum's width.
    """
    for name, value in (("probes", probes), ("steps", steps), ("points", points - 1)):
        if value < 1:
            raise ValueError(f"{name} must be at least {1 if name != 'points' else 2}")
    if sigma is not None and not sigma > 0:
        raise ValueError(f"sigma={sigma!r} must be positive")
    with Hessian(loss_fn, params, **options) as hessian:
        product = _told(hessian.product, progress)
        steps = min(steps, hessian.inner.dimension or hessian.numel)
        found: list[tuple[Tensor, Tensor]] = []
        for _ in range(probes):
            space = Krylov(product, hessian.random(generator), steps, hessian.inner)
            for _ in range(steps):
                space.extend()
            theta, s = space.ritz()
            found.append((theta, s[0].square()))
    nodes, weights = (torch.stack(parts) for parts in zip(*found, strict=True))
    low, high = float(nodes.min()), float(nodes.max())
    sigma = sigma or 0.01 * (high - low) or 1e-3 * abs(high) or 1e-6
    grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, points, dtype=torch.float64)
    density = torch.zeros_like(grid)
    for node, weight in zip(nodes.flatten(), weights.flatten() / probes, strict=True):
        density += weight * torch.exp(-((grid - node) ** 2) / (2 * sigma**2))
    density /= torch.trapezoid(density, grid).clamp_min(1e-300)
    return SpectralDensity(grid, density, nodes, weights, sigma)


def alignment(direction: Iterable[Tensor], eigenvector: Iterable[Tensor]) -> float:
    """|cos| of the angle between two vectors over the parameters: an eigenvector's sign means nothing.

    Between 0 and 1; 0 where one of them is zero. Raises ``ValueError`` for shapes that differ.
    """
    aa = ab = bb = 0.0
    direction, eigenvector = list(direction), list(eigenvector)
    if [d.shape for d in direction] != [e.shape for e in eigenvector]:
        raise ValueError("the direction and the eigenvector have different numbers or shapes of tensors")
    for d, e in zip(direction, eigenvector, strict=True):
        d, e = d.detach().double(), e.detach().to(d.device).double()
        aa, ab, bb = aa + float((d * d).sum()), ab + float((d * e).sum()), bb + float((e * e).sum())
    return min(abs(ab) / math.sqrt(aa * bb), 1.0) if aa > 0 and bb > 0 else 0.0


class Climbs(Protocol):
    """An optimizer of fastsam."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def perturbed(self) -> AbstractContextManager[None]: ...


@torch.no_grad()
def perturbation(optimizer: Climbs) -> list[Tensor]:
    """The e that a fastsam optimizer would add to the weights, from the gradients in ``.grad``; one tensor each.

    The weights are back afterwards, bit for bit. It costs one vector. Raises what ``first_step`` raises.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    with optimizer.perturbed():
        for p, w in zip(params, before, strict=True):
            torch.sub(p, w, out=w)
    return before


class Chunks:
    """A batch as smaller batches of at most ``size`` samples, to be given as ``batches``: it bounds the memory.

    ``batch`` is a tensor, or a tuple, list or mapping of tensors with the samples first. With a loss that is the
    mean over samples the result is that of the whole batch; with BatchNorm in training mode it is not.
    """

    def __init__(self, batch: Any, size: int) -> None:
        if size < 1:
            raise ValueError(f"size={size} must be at least 1 sample")
        self._batch, self._size, self._samples = batch, size, batch_size(batch)

    def __len__(self) -> int:
        return -(-self._samples // self._size)

    def __iter__(self) -> Iterator:
        for begin in range(0, self._samples, self._size):
            yield _slice(self._batch, begin, begin + self._size)


def _slice(batch: Any, begin: int, end: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[begin:end]
    if isinstance(batch, Mapping):
        return {key: _slice(value, begin, end) for key, value in batch.items()}
    return type(batch)(_slice(value, begin, end) for value in batch)
