r"""Hessian-vector products by double backward: Hv = d/dw <dL/dw, v>.

The graph of the gradient is built once and walked again for every product. With batches, or a closure that calls
``backward()`` several times, it is built for one part at a time and anew for each product, in the memory of one part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastsam.curvature.evaluations import Evaluations, Mean
from fastsam.curvature.vectors import Vectors
from fastsam.flat.flatten import is_cleared


class NoSecondDerivative(Exception):
    """Double backward is not to be had, or there is no memory for it (its cause is then an ``OutOfMemoryError``)."""


class Exact:
    """Exact products at the present weights; they raise :class:`NoSecondDerivative` where there are none."""

    def __init__(self, vectors: Vectors, evaluations: Evaluations) -> None:
        self._vectors, self._evaluations, self._params = vectors, evaluations, vectors.trainable
        self._graph: tuple[Tensor | None, ...] | None = None  # the gradients, with their graph
        self._outlives = True  # the graph of a closure can still be walked after the closure

    def forget(self) -> None:
        """Lets go of the graph."""
        self._graph = None

    def product(self, v: Tensor | dict[Tensor, Tensor]) -> Tensor:
        """Hv, a new vector (n,)."""
        out = self._vectors.zeros()
        vectors = [self._vectors.part(v, p) for p in self._params]
        if self._evaluations.closure:
            self._add_products_of_closure(out, vectors)
        elif self._graph is not None or self._open_graph():
            assert self._graph is not None
            self._add_products(out, self._graph, vectors, keep=True)
        else:
            mean = Mean()
            for loss, samples in self._evaluations.losses():
                mean.add(loss, samples)
                self._add_products(out, self._gradients(loss * samples), vectors, keep=False)
            self._evaluations.expect_same(mean.value)
            out.div_(mean.samples)
        return out.div_(self._evaluations.loss_scale)

    def gradient(self) -> Tensor | None:
        """The gradient, a new vector (n,), where the next product needs it anyway; else None."""
        if self._graph is None and not self._open_graph():
            return None
        assert self._graph is not None
        out = self._vectors.zeros()
        for p, g in zip(self._params, self._graph, strict=True):
            if g is not None:
                self._vectors.part(out, p).copy_(g.detach())
        return out.div_(self._evaluations.loss_scale)

    def _open_graph(self) -> bool:
        """Makes the graph of all the loss, if the loss is one."""
        if self._evaluations.closure or not self._evaluations.one_batch:
            return False
        for loss, _ in self._evaluations.losses():
            self._graph = self._gradients(loss)
        return True

    def _add_products_of_closure(self, out: Tensor, vectors: list[Tensor]) -> None:
        """out <- out + Hv for the sum of the losses that the closure calls ``backward()`` on."""
        if self._graph is not None:
            try:
                self._add_products(out, self._graph, vectors, keep=True)
                return
            except NoSecondDerivative:
                # Once it had called backward() the closure was free to write over what the graph holds, such as
                # BatchNorm's statistics that it put back.
                self._graph, self._outlives = None, False
        seen: set[Tensor] = set()
        passes, failure = 0, None

        def see(loss: Tensor) -> bool:
            nonlocal passes, failure
            if failure is not None:
                return False
            self._graph = None
            try:
                self._graph = self._gradients(loss)
                self._add_products(out, self._graph, vectors, keep=True)
            except NoSecondDerivative as error:  # the closure goes on as if nobody had looked
                failure = error
                return False
            seen.update(p for p, g in zip(self._params, self._graph, strict=True) if g is not None)
            passes += 1
            return True

        loss = self._evaluations.closure_losses(see)
        if failure is not None:
            try:
                raise failure
            finally:
                failure = None  # it holds this frame, which would hold it, and the graph
        if any(is_cleared(p) == (p in seen) for p in self._params):
            raise NoSecondDerivative("the closure's gradients are not those of the losses that it calls backward() on")
        for p in self._params:
            p.grad = None
        if passes > 1 or not self._outlives:
            self._graph = None
            self._evaluations.expect_same(loss)

    def _gradients(self, loss: Tensor) -> tuple:
        hidden = _hidden(loss)
        if hidden is not None:
            raise NoSecondDerivative(hidden)
        with _second_derivative():
            gradients = torch.autograd.grad(loss, self._params, create_graph=True, allow_unused=True)
        if all(g is None for g in gradients):  # as with parameters that are gathered for a pass
            raise NoSecondDerivative("its graph does not reach the parameters")
        return gradients

    def _add_products(self, out: Tensor, gradients: tuple, vectors: list[Tensor], keep: bool) -> None:
        # A loss that is linear in all the weights has gradients that depend on none: H is zero.
        used = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
        if not used:
            return
        with _second_derivative():
            products = torch.autograd.grad(
                [gradients[i] for i in used],
                self._params,
                [vectors[i].to(gradients[i]) for i in used],
                retain_graph=keep,
                allow_unused=True,
            )
        for p, h in zip(self._params, products, strict=True):
            if h is not None:
                self._vectors.part(out, p).add_(h)


@contextlib.contextmanager
def _second_derivative() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # an OutOfMemoryError is one
        raise NoSecondDerivative(str(error)) from error


def _hidden(loss: Tensor) -> str | None:
    """Why double backward would leave out a part of the second derivative without a word, or None if it would not."""
    nodes = [] if loss.grad_fn is None else [loss.grad_fn]
    met = set()
    while nodes:
        node = nodes.pop()
        if node.name() == "CheckpointFunctionBackward":  # its part of the graph is made in a backward pass
            return "reentrant checkpoints hide parameters: say use_reentrant=False"
        function: Any = getattr(node, "_forward_cls", None)
        backward: Any = getattr(function, "backward", None)
        if hasattr(backward, "__wrapped__") and backward.__globals__["__name__"] == "torch.autograd.function":
            return f"{function.__name__} is once_differentiable"
        following = [n for n, _ in node.next_functions if n is not None and n not in met]
        met.update(following)
        nodes += following
    return None
