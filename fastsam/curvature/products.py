r"""Hessian-vector products, exact or by differences of gradients.

    exact                Hv = d/dw <dL/dw, v>                       by double backward
    finite-difference    Hv = (g(w + r v) - g(w - r v)) / 2r        for a unit vector v

The second needs nothing but forward and backward passes, so it works where there is no second derivative: fused
attention, compiled models, DistributedDataParallel. Its weights are moved and put back by the kernels that climb and
restore in a step of SAM: bit for bit, whatever happens in between.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable
from typing import TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastsam.curvature.differences import Differences
from fastsam.curvature.evaluations import Evaluations
from fastsam.curvature.exact import Exact, NoSecondDerivative
from fastsam.curvature.inner import Inner
from fastsam.curvature.vectors import Vectors
from fastsam.distributed.ranks import data_parallel, processes
from fastsam.flat.space import FlatSpace
from fastsam.loop.frozen import Frozen

METHODS = ("auto", "exact", "finite-difference")


class HessianOptions(TypedDict, total=False):
    """The options of every measurement, but ``method``; see :class:`Hessian`."""

    batches: Iterable | None
    closure: bool
    loss_scale: float
    radius: float | None
    eval_mode: bool
    model: nn.Module | None
    spaces: list[FlatSpace] | None


class MeasureOptions(HessianOptions, total=False):
    """The options of every measurement; see :class:`Hessian`."""

    method: str


def hessian_vector_product(
    loss_fn: Callable[..., Tensor],
    params: nn.Module | Iterable[Tensor],
    v: Iterable[Tensor],
    *,
    method: str = "auto",
    **options: Unpack[HessianOptions],
) -> list[Tensor]:
    """Hv for the Hessian H of the loss at the present weights, as tensors shaped like the parameters.

    Args:
        loss_fn: does a forward pass and returns the loss with its graph, a scalar.
        params: a module, or parameters. Those that are frozen or not used by the loss have zeros in Hv.
        v: a tensor for each parameter, of its shape; any length.
        method: ``"exact"``, ``"finite-difference"``, or ``"auto"``: exact, unless the loss has no second derivative
            or gradients are reduced over several processes; that is said in a warning.
        options: as for :class:`Hessian`.

    Memory beyond a training step's peak, by finite differences: two vectors, the backup of w and Hv.

    Raises as :class:`Hessian`; weights, gradients, buffers and random generators are then as before, too.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> hessian_vector_product(lambda: (w**3).sum(), [w], [torch.tensor([1.0, 1.0])])
        [tensor([ 6., 12.])]
    """
    with Hessian(loss_fn, params, method=method, **options) as hessian:
        return hessian.tensors(hessian.product(list(v)))


class Hessian:
    """The Hessian H of a loss at the present weights, known through products with flat vectors of n elements.

    Args:
        loss_fn: returns the loss with its graph; called with a batch if there are ``batches``.
        params: a module, or its parameters; n counts those that require gradients.
        batches: anything that can be iterated over again and again, such as a list or a DataLoader. The loss is
            then the mean of the batches' losses, weighted by their numbers of samples: with losses that are means
            over samples, that of all the data, in the memory of one batch.
        method: ``"auto"``, ``"exact"`` or ``"finite-difference"``.
        closure: ``loss_fn`` is a closure as optimizers take it, which does the backward pass itself. H is then that of
            what it calls ``backward()`` on: the sum of these losses, if there are several.
        loss_scale: what a closure's backward pass multiplies the loss by (``GradScaler.get_scale()``).
        radius: length of a finite difference's move, in the units of the weights; None for the rule of
            ``fastsam.curvature.differences``.
        eval_mode: modules are in eval mode meanwhile.
        model: the module whose buffers and mode are looked after, if ``params`` is a list. Without it, modules are
            found as they run.

    It is a context manager, and in it the weights must stay as they are. Every pass draws the same random numbers,
    so the products are those of one function, its dropout fixed. On exit buffers, training flags, gradients and
    random generators are what they were.

    Raises:
        TypeError, ValueError: a loss that is no scalar tensor, a vector of the wrong shape, parameters none of which
            requires gradients.
        RuntimeError: a loss without a graph, a closure that does not call backward, ``"exact"`` for a loss without
            a second derivative.
        FloatingPointError: weights or a product that are not finite.

    Warns with ``RuntimeWarning`` if the loss changes between passes with the same weights: a generator of the loss's
    own, or data that is augmented elsewhere, makes its products noise.
    """

    def __init__(
        self,
        loss_fn: Callable,
        params: nn.Module | Iterable[Tensor],
        *,
        batches: Iterable | None = None,
        method: str = "auto",
        closure: bool = False,
        loss_scale: float = 1.0,
        radius: float | None = None,
        eval_mode: bool = False,
        model: nn.Module | None = None,
        spaces: list[FlatSpace] | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method={method!r} is unknown: choose one of {', '.join(METHODS)}")
        if radius is not None and not 0 < radius < math.inf:
            raise ValueError(f"radius={radius!r} must be a positive number, or None")
        if closure and batches is not None:
            raise ValueError("a closure takes no batch: closure=True and batches exclude each other")
        if batches is not None and iter(batches) is batches:
            raise TypeError(
                f"batches is a {type(batches).__name__}, which can be iterated over only once: give a list or a loader"
            )
        if isinstance(params, nn.Module):
            model, params = params, params.parameters()
        self._vectors = Vectors(params)
        self._trainable = self._vectors.trainable
        self._frozen = Frozen(self._trainable, model, eval_mode)
        self._evaluations = Evaluations(loss_fn, self._trainable, self._frozen, batches, closure, loss_scale)
        self._replicas = None if model is None else data_parallel(model)
        self._exact = Exact(self._vectors, self._evaluations)
        self._differences = Differences(self._vectors, self._evaluations, self._frozen, radius, spaces)
        self.method = method
        self._open = False
        #: products so far
        self.products = 0

    def __enter__(self) -> Hessian:
        if self.method == "auto" and self._replicas is None and processes() > 1:
            self._fall_back("gradients may be reduced over several processes, which only backward() does")
        self._frozen.__enter__()
        self._open = True
        return self

    def __exit__(self, *exception: object) -> None:
        self._open = False
        self._exact.forget()
        self._frozen.__exit__(*exception)

    @property
    def params(self) -> list[Tensor]:
        """The parameters, those that are frozen with them."""
        return self._vectors.params

    @property
    def numel(self) -> int:
        """n, the number of weights that require gradients; of those that this process holds, if they are sharded."""
        return self._vectors.numel

    @property
    def inner(self) -> Inner:
        """The inner product of the vectors, over all the processes that hold parts of them."""
        return self._vectors.inner

    def flat(self, tensors: Iterable[Tensor]) -> Tensor:
        """One vector (n,) from a tensor for each parameter; raises ``ValueError`` for wrong numbers or shapes."""
        return self._vectors.flat(tensors)

    def tensors(self, flat: Tensor) -> list[Tensor]:
        """A tensor of each parameter's shape, a view into ``flat``; zeros for those that are frozen."""
        return self._vectors.tensors(flat)

    def random(self, generator: torch.Generator | None = None) -> Tensor:
        """A standard normal vector (n,). It is drawn on the CPU, so a seed means the same on every device."""
        return self._vectors.random(generator)

    def start(self, generator: torch.Generator | None = None) -> Tensor:
        """A vector (n,) for Lanczos to start from: noise of length 1 and a tenth of the gradient's direction.

        A gradient is strong in the eigenvectors of large eigenvalues, which saves products; a tenth is enough for that.
        The noise finds the top one where the gradient has next to nothing of it. It costs a gradient, or nothing where
        the first exact product needs the same one.
        """
        self._check_open()
        x = self.random(generator)
        x.div_(self.inner.norm(x))
        g = None
        if self.method != "finite-difference" and self._replicas is None:
            with contextlib.suppress(NoSecondDerivative):  # product() will say so
                g = self._exact.gradient()
        if g is None:
            _, g = self.gradient()
        length = self.inner.norm(g)
        return x.add_(g, alpha=0.1 / length) if 0 < length < math.inf else x

    def radius(self) -> float:
        """Length of the next finite difference's move, in the units of the weights."""
        return self._differences.radius()

    def product(self, v: Tensor | list[Tensor]) -> Tensor:
        """Hv as a new vector (n,), for a vector (n,) or a tensor for each parameter."""
        self._check_open()
        if isinstance(v, Tensor) and v.shape != (self.numel,):
            raise ValueError(f"the vector has shape {tuple(v.shape)}: it must be ({self.numel},)")
        h = self._product(v if isinstance(v, Tensor) else self._vectors.laid_out(v))
        self.products += 1
        if not math.isfinite(self.inner.dot(h, h)):
            raise FloatingPointError(
                "a Hessian-vector product is not finite: check the weights, the vector, the batch and the loss"
            )
        return h

    def gradient(self) -> tuple[float, Tensor]:
        """The loss and its gradient at the present weights, a vector (n,)."""
        self._check_open()
        out = self._vectors.zeros()
        loss = self._evaluations.backward()
        self._evaluations.add_gradients(out, self._vectors.part, 1.0)
        return loss, out

    def loss_at(self, e: Tensor) -> float:
        """L(w + e), with the random numbers of every other pass; the weights are back afterwards, bit for bit."""
        self._check_open()
        with self._differences.moved(e, 1.0):
            loss = self._evaluations.backward()
        for p in self._trainable:
            p.grad = None
        return loss

    def _exact_product(self, v: Tensor | dict[Tensor, Tensor]) -> Tensor:
        if self._replicas is None:
            return self._exact.product(v)
        return self._mean_product(v, self._replicas)

    def _mean_product(self, v: Tensor | dict[Tensor, Tensor], replicas: nn.parallel.DistributedDataParallel) -> Tensor:
        """Every replica of a DistributedDataParallel model forms the product of its own loss; then the mean."""
        group = replicas.process_group
        h: Tensor | None = None
        reason = None
        try:
            with replicas.no_sync():
                h = self._exact.product(v)
        except NoSecondDerivative as error:
            reason = str(error)
        failures = torch.tensor([float(reason is not None)], device=self._vectors.device)
        torch.distributed.all_reduce(failures, group=group)
        if failures.item() or h is None:  # one without a product (no memory, say) is one too few for the mean
            raise NoSecondDerivative(reason or "another process found none")
        torch.distributed.all_reduce(h, group=group)
        return h.div_(torch.distributed.get_world_size(group))

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("a Hessian is used in a with statement: with Hessian(...) as hessian: ...")

    def _fall_back(self, reason: str) -> None:
        self.method = "finite-difference"
        reason = reason.split("\n")[0].rstrip(".")
        warnings.warn(f"Hessian-vector products by finite differences: {reason}", RuntimeWarning, stacklevel=4)

    def _product(self, v: Tensor | dict[Tensor, Tensor]) -> Tensor:
        if self.method == "finite-difference":
            return self._differences.product(v)
        try:
            h = self._exact_product(v)
            self.method = "exact"
            return h
        except NoSecondDerivative as error:
            self._exact.forget()
            if self.method == "exact":
                if isinstance(error.__cause__, torch.OutOfMemoryError):
                    raise error.__cause__ from None
                raise RuntimeError(
                    f"the loss has no second derivative ({error}): use method='finite-difference'"
                ) from error
            self._fall_back(str(error))
        return self._differences.product(v)
