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
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from fastsam.curvature.differences import Differences
from fastsam.curvature.frozen import Frozen
from fastsam.curvature.passes import Mean, Passes
from fastsam.curvature.solvers import dot
from fastsam.curvature.vectors import Vectors
from fastsam.flat import FlatSpace

METHODS = ("auto", "exact", "finite-difference")


def hessian_vector_product(loss_fn, params, v, *, method: str = "auto", **options) -> list[Tensor]:
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
        closure: ``loss_fn`` is a closure as optimizers take it, which does the backward pass itself.
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
        if closure and (method == "exact" or batches is not None):
            raise ValueError("a closure runs its own backward: it allows neither method='exact' nor batches")
        if batches is not None and iter(batches) is batches:
            raise TypeError(
                f"batches is a {type(batches).__name__}, which can be iterated over only once: give a list or a loader"
            )
        if isinstance(params, nn.Module):
            model, params = params, params.parameters()
        self._vectors = Vectors(params)
        self._trainable = self._vectors.trainable
        self._frozen = Frozen(self._trainable, model, eval_mode)
        self._passes = Passes(loss_fn, self._trainable, self._frozen, batches, closure, loss_scale)
        self._differences = Differences(self._vectors, self._passes, self._frozen, radius, spaces)
        self.method = "finite-difference" if closure else method
        self._graph: tuple | None = None
        self._open = False
        #: products so far
        self.products = 0

    def __enter__(self) -> Hessian:
        if self.method == "auto" and _reduces_gradients(self._frozen):
            self._fall_back("gradients are reduced over several processes, which only backward() does")
        self._frozen.__enter__()
        self._open = True
        return self

    def __exit__(self, *exception) -> None:
        self._open, self._graph = False, None
        self._frozen.__exit__(*exception)

    @property
    def params(self) -> list[Tensor]:
        """The parameters, those that are frozen with them."""
        return self._vectors.params

    @property
    def numel(self) -> int:
        """n, the number of weights that require gradients."""
        return self._vectors.numel

    def flat(self, tensors: Iterable[Tensor]) -> Tensor:
        """One vector (n,) from a tensor for each parameter; raises ``ValueError`` for wrong numbers or shapes."""
        return self._vectors.flat(tensors)

    def tensors(self, flat: Tensor) -> list[Tensor]:
        """A tensor of each parameter's shape, a view into ``flat``; zeros for those that are frozen."""
        return self._vectors.tensors(flat)

    def random(self, generator: torch.Generator | None = None) -> Tensor:
        """A standard normal vector (n,). It is drawn on the CPU, so a seed means the same on every device."""
        return self._vectors.random(generator)

    def radius(self) -> float:
        """Length of the next finite difference's move, in the units of the weights."""
        return self._differences.radius()

    def product(self, v: Tensor | list[Tensor]) -> Tensor:
        """Hv as a new vector (n,), for a vector (n,) or a tensor for each parameter."""
        self._check_open()
        if not isinstance(v, Tensor):
            v = self._vectors.laid_out(v)
        elif v.shape != (self.numel,):
            raise ValueError(f"the vector has shape {tuple(v.shape)}: it must be ({self.numel},)")
        h = self._product(v)
        self.products += 1
        if not math.isfinite(dot(h, h)):
            raise FloatingPointError(
                "a Hessian-vector product is not finite: check the weights, the vector, the batch and the loss"
            )
        return h

    def gradient(self) -> tuple[float, Tensor]:
        """The loss and its gradient at the present weights, a vector (n,)."""
        self._check_open()
        out = self._vectors.zeros()
        loss = self._passes.backward()
        self._passes.add_gradients(out, self._vectors.part, 1.0)
        return loss, out

    def loss_at(self, e: Tensor) -> float:
        """L(w + e), with the random numbers of every other pass; the weights are back afterwards, bit for bit."""
        self._check_open()
        with self._differences.moved(e, 1.0):
            loss = self._passes.backward()
        for p in self._trainable:
            p.grad = None
        return loss

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("a Hessian is used in a with statement: with Hessian(...) as hessian: ...")

    def _fall_back(self, reason: str) -> None:
        self.method = "finite-difference"
        reason = reason.split("\n")[0].rstrip(".")
        warnings.warn(f"Hessian-vector products by finite differences: {reason}", RuntimeWarning, stacklevel=4)

    def _product(self, v) -> Tensor:
        if self.method == "finite-difference":
            return self._differences.product(v)
        try:
            h = self._exact(v)
            self.method = "exact"
            return h
        except _NoSecondDerivative as error:
            self._graph = None
            if self.method == "exact":
                raise RuntimeError(
                    f"the loss has no second derivative ({error}): use method='finite-difference'"
                ) from error
            self._fall_back(str(error))
        return self._differences.product(v)

    def _exact(self, v: Tensor | dict[Tensor, Tensor]) -> Tensor:
        out = self._vectors.zeros()
        vectors = [self._vectors.part(v, p) for p in self._trainable]
        if self._passes.one_batch:
            if self._graph is None:
                for loss, _ in self._passes.losses():
                    self._graph = self._gradient_graph(loss)
            self._add_products(out, self._graph, vectors, 1.0, keep=True)
            return out
        mean = Mean()
        for loss, samples in self._passes.losses():
            mean.add(loss, samples)
            self._add_products(out, self._gradient_graph(loss), vectors, samples, keep=False)
        self._passes.expect_same(mean.value)
        return out.div_(mean.samples)

    def _gradient_graph(self, loss: Tensor) -> tuple:
        with _second_derivative():
            return torch.autograd.grad(loss, self._trainable, create_graph=True, allow_unused=True)

    def _add_products(self, out: Tensor, gradients: tuple, vectors: list[Tensor], scale: float, keep: bool) -> None:
        # A loss that is linear in all the weights has gradients that depend on none: H is zero.
        used = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
        if not used:
            return
        with _second_derivative():
            products = torch.autograd.grad(
                [gradients[i] for i in used],
                self._trainable,
                [vectors[i].to(gradients[i]) for i in used],
                retain_graph=keep,
                allow_unused=True,
            )
        for p, h in zip(self._trainable, products, strict=True):
            if h is not None:
                self._vectors.part(out, p).add_(h, alpha=scale)


class _NoSecondDerivative(Exception):
    pass


@contextlib.contextmanager
def _second_derivative() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _NoSecondDerivative(str(error)) from error


def _reduces_gradients(frozen: Frozen) -> bool:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return True
    return isinstance(frozen.model, nn.parallel.DistributedDataParallel)
