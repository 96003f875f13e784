"""Curvature while a network trains: one row every n steps, in a CSV file and wherever else it is wanted."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsam.curvature.measure import perturbation
from fastsam.curvature.products import Hessian
from fastsam.curvature.solvers import lanczos

#: The columns of the CSV file.
FIELDS = (
    "step",
    "loss",
    "top_eigenvalue",
    "residual",
    "products",
    "perturbation_alignment",
    "gradient_alignment",
    "gradient_norm",
    "perturbation_norm",
    "sam_gap",
)


class CurvatureMonitor:
    """Measures every ``every`` calls, and leaves training as if it had not.

    Each measurement is a row of L(w), the top eigenvalue with its residual and the products it took, |cos| of the
    perturbation e and of the gradient g with the top eigenvector, ||g||, ||e|| and the SAM gap L(w + e) - L(w).

    Args:
        optimizer: a fastsam optimizer, whose e is taken; or any other, for which e = rho g / ||g||, SAM's.
        path: the CSV file. Raises ``FileExistsError`` if it is there, unless ``append`` says to go on with it.
        every: steps from one measurement to the next; the first call measures.
        model: the module, if its buffers and mode should be looked after from before its first pass.
        writer: where rows go besides: TensorBoard's ``SummaryWriter``, or W&B's run or module.
        products, tolerance: of the Lanczos iteration, which starts from the eigenvector before.
        method, eval_mode: as for :class:`~fastsam.curvature.Hessian`.
        rho: radius of e for an optimizer that has none of its own.
        append: go on with a file that is there.

    Example:
        >>> monitor = CurvatureMonitor(optimizer, "curvature.csv", every=100)
        >>> for x, y in loader:
        ...     row = monitor(lambda: loss_fn(model(x), y))  # None where none is due
        ...     loss = optimizer.step(closure)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        path: str | Path,
        every: int = 100,
        *,
        model: nn.Module | None = None,
        writer: Any = None,
        products: int = 30,
        tolerance: float = 1e-2,
        method: str = "auto",
        eval_mode: bool = False,
        rho: float = 0.05,
        append: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every} must be at least 1 step")
        if not 0 <= rho < math.inf:
            raise ValueError(f"rho={rho!r} must be a finite number, at least 0")
        self._optimizer, self._every, self._model, self._rho = optimizer, every, model, rho
        self._products, self._tolerance, self._method, self._eval_mode = products, tolerance, method, eval_mode
        self._report = _reporter(writer)
        self._calls = 0
        self._vector: Tensor | None = None
        self.path = Path(path)
        if self.path.exists() and not append:
            raise FileExistsError(f"{self.path} is there already: choose another path, or say append=True")
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(FIELDS)

    def __call__(self, loss_fn: Callable[[], Tensor], step: int | None = None) -> dict[str, float] | None:
        """To be called before every step; returns the row if this call measured, else None.

        ``loss_fn`` returns the loss with its graph, without backward. ``step`` is what the row is named by, and
        decides whether it is due; by default calls are counted from 0. A measurement that meets a NaN or an infinity
        is a row of NaN and a warning: training goes on.
        """
        step = self._calls if step is None else step
        self._calls += 1
        if step % self._every:
            return None
        try:
            row = {"step": step, **self.measure(loss_fn)}
        except FloatingPointError as error:
            warnings.warn(f"no curvature at step {step}: {error}", RuntimeWarning, stacklevel=2)
            row = {"step": step, **dict.fromkeys(FIELDS[1:], math.nan)}
            self._vector = None
        self._write([row[name] for name in FIELDS])
        self._report(row)
        return row

    def measure(self, loss_fn: Callable[[], Tensor]) -> dict[str, float]:
        """One measurement, written nowhere."""
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        with Hessian(loss_fn, params, model=self._model, method=self._method, eval_mode=self._eval_mode) as hessian:
            start = self._vector if self._vector is not None else hessian.start()
            pairs = lanczos(hessian.product, start, 1, "largest", self._products, self._tolerance, inner=hessian.inner)
            self._method = hessian.method  # what "auto" came to
            self._vector = v = pairs.vectors[0]
            loss, g = hessian.gradient()
            e = self._perturbation(hessian, params, g)
            return {
                "loss": loss,
                "top_eigenvalue": float(pairs.eigenvalues[0]),
                "residual": float(pairs.residuals[0]),
                "products": pairs.products,
                "perturbation_alignment": _cosine(hessian, e, v),
                "gradient_alignment": _cosine(hessian, g, v),
                "gradient_norm": hessian.inner.norm(g),
                "perturbation_norm": hessian.inner.norm(e),
                "sam_gap": hessian.loss_at(e) - loss,
            }

    def _perturbation(self, hessian: Hessian, params: list[Tensor], g: Tensor) -> Tensor:
        if not hasattr(self._optimizer, "perturbed"):
            return g * (self._rho / (hessian.inner.norm(g) + 1e-12))
        for p, part in zip(params, hessian.tensors(g), strict=True):
            p.grad = part.to(p.dtype) if p.requires_grad else None
        try:
            return hessian.flat(perturbation(self._optimizer))
        finally:
            for p in params:
                p.grad = None

    def _write(self, row: Iterable[object]) -> None:
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerow(row)


def _cosine(hessian: Hessian, a: Tensor, b: Tensor) -> float:
    """|cos| of the angle between two vectors, as :func:`~fastsam.curvature.alignment` has it."""
    lengths = hessian.inner.norm(a) * hessian.inner.norm(b)
    return min(abs(hessian.inner.dot(a, b)) / lengths, 1.0) if lengths > 0 else 0.0


def _reporter(writer: Any) -> Callable[[dict], None]:
    if writer is None:
        return lambda row: None
    if hasattr(writer, "add_scalar"):  # TensorBoard

        def report(row: dict) -> None:
            for name in FIELDS[1:]:
                writer.add_scalar(f"curvature/{name}", row[name], row["step"])

        return report
    if hasattr(writer, "log"):  # W&B
        return lambda row: writer.log({f"curvature/{name}": row[name] for name in FIELDS[1:]}, step=row["step"])
    raise TypeError(f"writer={writer!r} has neither add_scalar (TensorBoard) nor log (W&B)")
