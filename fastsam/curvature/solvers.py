r"""Eigenvalues of a symmetric matrix that is only known through its products with vectors.

Power iteration needs one product a step and converges like |lambda_2 / lambda_1|^steps, to the eigenvalue of largest
magnitude. Lanczos builds an orthonormal basis Q of the Krylov space {x, Hx, H^2 x, ...} and takes the eigenpairs of
T = Q'HQ, the best approximations that the same products allow, from both ends of the spectrum at once. In floating
point the basis loses its orthogonality just as pairs converge, and copies of them appear; so every new vector is made
orthogonal to all earlier ones, twice. A basis that may not grow any further is thick-restarted: it keeps its best
Ritz vectors. Sources: Parlett, "The Symmetric Eigenvalue Problem", 1980; Wu and Simon, "Thick-Restart Lanczos
Method for Large Symmetric Eigenvalue Problems", SIAM J. Matrix Anal. Appl., 2000.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsam.curvature.inner import LOCAL, Inner

#: Which eigenvalues :func:`lanczos` looks for.
ENDS = ("largest", "smallest", "both", "magnitude")

_BLOCK = 1 << 18  # elements of a block in a restart


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs of H, and how far they can be trusted.

    Attributes:
        eigenvalues: float64 on the CPU, shape (k,).
        vectors: the unit eigenvectors: a tensor (k, n) from a solver, elsewhere k lists shaped like the parameters.
        residuals: ||Hv - lambda v|| / |lambda| of each pair, float64, shape (k,); 0 where H is zero.
        products: Hessian-vector products that it took.
        converged: whether every residual is within the tolerance; False where none was asked for.
    """

    eigenvalues: Tensor
    vectors: Any
    residuals: Tensor
    products: int
    converged: bool


def power_iteration(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    products: int = 100,
    tolerance: float | None = 1e-2,
    inner: Inner = LOCAL,
) -> Eigenpairs:
    """The eigenpair of largest |lambda|: v <- Hv / sqrt(||Hv||^2 + 1e-12), as the authors of Eigen-SAM have it.

    ``product`` maps a vector (n,) to Hv as a new tensor. It stops after ``products`` of them, or when the relative
    residual is within ``tolerance``. The eigenvalue v'Hv and the residual belong to the vector that went into the
    last product; the vector returned is one step further. A zero Hessian gives the eigenvalue 0 and a zero vector.

    Raises ``ValueError`` for arguments out of range, ``FloatingPointError`` for a product that is not finite.
    """
    _check(start, products, tolerance, inner)
    v, eigenvalue, residual, made = start, 0.0, math.inf, 0
    del start  # not needed once v has moved on
    while made < products:
        h = product(v)
        made += 1
        vv, vh, hh = inner.dot(v, v), inner.dot(v, h), inner.dot(h, h)
        _check_finite(hh)
        eigenvalue = vh / vv if vv > 0 else 0.0
        residual = _relative(inner.distance(h, v, eigenvalue) / math.sqrt(vv) if vv > 0 else 0.0, eigenvalue)
        v = h.div_(math.sqrt(hh + 1e-12))
        if hh == 0 or (tolerance is not None and residual <= tolerance):
            break
    converged = tolerance is not None and residual <= tolerance
    return Eigenpairs(_column([eigenvalue]), v.unsqueeze(0), _column([residual]), made, converged)


def lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    k: int = 1,
    which: str = "largest",
    products: int = 100,
    tolerance: float | None = 1e-2,
    basis: int | None = None,
    inner: Inner = LOCAL,
) -> Eigenpairs:
    """``k`` eigenpairs from an end of the spectrum, by Lanczos with full re-orthogonalisation.

    Args:
        product: maps a vector (n,) to Hv as a new tensor.
        start: vector (n,), not zero: random, or an earlier eigenvector, from which it goes on (warm start).
        k: number of eigenpairs; of each end with ``"both"``.
        which: ``"largest"`` (algebraic, descending), ``"smallest"`` (ascending), ``"both"`` (k largest descending,
            then k smallest ascending) or ``"magnitude"`` (largest |lambda| first).
        products: stop after this many.
        tolerance: stop when every wanted pair has a relative residual within it, or an absolute one that the
            dtype's precision cannot improve; None to use all ``products``.
        basis: vectors kept at once, which is what Lanczos costs in memory; at least 2 more than the pairs. Default
            30 more than the pairs.
        inner: the inner product, where several processes hold a vector together.

    Raises ``ValueError`` for arguments out of range, ``FloatingPointError`` for a product that is not finite.
    """
    _check(start, products, tolerance, inner)
    n = inner.dimension or start.numel()
    if which not in ENDS:
        raise ValueError(f"which={which!r} is unknown: choose one of {', '.join(ENDS)}")
    wanted = 2 * k if which == "both" else k
    if k < 1 or wanted > n:
        raise ValueError(f"k={k} must be at least 1, and no more pairs than the {n} weights have")
    if products < wanted:
        raise ValueError(f"products={products} must be at least the {wanted} eigenpairs that are wanted")
    if basis is not None and basis < wanted + 2:
        raise ValueError(f"basis={basis} must be at least 2 more than the {wanted} eigenpairs that are wanted")
    space = Krylov(product, start, min(basis or wanted + 30, products, n), inner)
    del start
    while True:
        space.extend()
        theta, s = space.ritz()
        chosen = _select(theta, k, which)
        errors = [space.beta * abs(float(s[-1, i])) for i in chosen]
        residuals = [_relative(e, float(theta[i])) for e, i in zip(errors, chosen, strict=True)]
        floor = torch.finfo(space.vectors.dtype).eps * float(theta.abs().max())
        converged = (
            tolerance is not None
            and len(chosen) == wanted
            and all(r <= tolerance or e <= floor for r, e in zip(residuals, errors, strict=True))
        )
        if converged or space.products >= products or space.size == n:
            break
        if space.size == len(space.vectors):
            space.restart(_select(theta, min(k + (len(space.vectors) - wanted) // 3, len(theta) - 1), which))
    vectors = space.combine(s[:, chosen])
    return Eigenpairs(theta[chosen].clone(), vectors, _column(residuals), space.products, converged)


class Krylov:
    """An orthonormal basis Q of a Krylov space (rows of ``vectors``) and T = Q'HQ, built one product at a time.

    At any time HQ = QT + beta q e', with q the next basis vector and e the last unit vector.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], start: Tensor, rows: int, inner: Inner = LOCAL) -> None:
        self._product, self._inner = product, inner
        self.vectors = torch.empty(rows, start.numel(), dtype=start.dtype, device=start.device)
        self.size = 0
        self.products = 0
        self.beta = 0.0
        self._t = torch.zeros(rows, rows, dtype=torch.float64, device="cpu")
        length = inner.norm(start)
        if not (0 < length < math.inf):
            raise ValueError("the start vector of Lanczos must be finite and not zero")
        self._next: Tensor | None = start / length

    def extend(self) -> None:
        """One product: puts the next vector into the basis and finds the one after it."""
        j = self.size
        q = self.vectors[j]
        assert self._next is not None
        q.copy_(self._next)
        self._next = None  # its memory serves the product
        h = self._product(q)
        self.products += 1
        self.size = j + 1
        basis = self.vectors[: self.size]
        column = self._inner.project(basis, h)
        _check_finite(float(column.sum()))
        h.addmv_(basis.T, column, alpha=-1)
        again = self._inner.project(basis, h)
        h.addmv_(basis.T, again, alpha=-1)
        column = (column.double() + again.double()).cpu()
        self._t[: self.size, j] = column
        self._t[j, : self.size] = column
        self.beta = self._inner.norm(h)
        _check_finite(self.beta)
        scale = float(self._t[: self.size, : self.size].abs().max())
        if self.beta <= 10 * torch.finfo(h.dtype).eps * scale:
            # An invariant space: nothing more to find from here, so go on from noise beside it.
            self.beta = 0.0
            h = torch.randn_like(h)
            for _ in range(3):
                h.addmv_(basis.T, self._inner.project(basis, h), alpha=-1)
                h /= max(self._inner.norm(h), 1e-30)
            self._next = h
        else:
            self._next = h.div_(self.beta)

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (ascending) and eigenvectors (columns) of T, in float64."""
        return torch.linalg.eigh(self._t[: self.size, : self.size])

    def combine(self, s: Tensor) -> Tensor:
        """The combinations of basis vectors with the columns of ``s``, shape (columns, n)."""
        return s.T.to(self.vectors) @ self.vectors[: self.size]

    def restart(self, keep: list[int]) -> None:
        """Shrinks the basis to the Ritz vectors ``keep``."""
        theta, s = self.ritz()
        s = s[:, keep].T.to(self.vectors)
        for begin in range(0, self.vectors.shape[1], _BLOCK):  # in place, so block by block
            block = self.vectors[: self.size, begin : begin + _BLOCK]
            block[: len(keep)] = s @ block
        self._t.zero_()
        self._t[range(len(keep)), range(len(keep))] = theta[keep]
        self.size = len(keep)


def _select(theta: Tensor, k: int, which: str) -> list[int]:
    """Indices into the ascending ``theta`` of the ``k`` wanted values (of each end with "both"), if there are."""
    n = len(theta)
    if which == "magnitude":
        return theta.abs().argsort(descending=True)[:k].tolist()
    top = list(range(n - 1, max(n - 1 - k, -1), -1))
    bottom = list(range(min(k, n)))
    if which == "largest":
        return top
    if which == "smallest":
        return bottom
    return top + [i for i in bottom if i not in top]


def _relative(error: float, eigenvalue: float) -> float:
    if error == 0:
        return 0.0
    return error / abs(eigenvalue) if eigenvalue != 0 else math.inf


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _check(start: Tensor, products: int, tolerance: float | None, inner: Inner) -> None:
    if start.ndim != 1 or (start.numel() == 0 and inner is LOCAL):
        raise ValueError(f"the start vector has shape {tuple(start.shape)}: it must be one flat vector, not empty")
    if products < 1:
        raise ValueError(f"products={products} must be at least 1")
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance!r} must be a positive number, or None")


def _check_finite(value: float) -> None:
    if not math.isfinite(value):
        raise FloatingPointError("a Hessian-vector product is not finite: check the weights, the batch and the loss")
