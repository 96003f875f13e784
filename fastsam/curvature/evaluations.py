"""One evaluation of a loss and its gradients, in the same circumstances each time."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastsam.curvature.backward_calls import backward_calls
from fastsam.distributed.ranks import processes
from fastsam.distributed.shards import local, local_gradient
from fastsam.flat.flatten import drop_cleared
from fastsam.loop.frozen import Frozen


class Evaluations:
    """Evaluates ``loss_fn``, on every one of ``batches`` if there are any, with the same random numbers each time.

    With ``closure`` it does its own backward pass, of the loss times ``loss_scale``. The gradients of ``params``
    are None before a pass. What is wrong with a loss is raised as :class:`~fastsam.curvature.Hessian` says.
    """

    def __init__(
        self,
        loss_fn: Callable,
        params: list[Tensor],
        frozen: Frozen,
        batches: Iterable | None,
        closure: bool,
        loss_scale: float,
    ) -> None:
        self._loss_fn, self._params, self._frozen = loss_fn, params, frozen
        self._batches, self.closure, self.loss_scale = batches, closure, loss_scale
        self._watched = self._warned = False
        self._loss: float | None = None

    @property
    def one_batch(self) -> bool:
        return self._batches is None

    def losses(self) -> Iterator[tuple[Tensor, int]]:
        """Each batch's loss with its graph, and its number of samples; 1 if there are no batches."""
        self._frozen.rewind()
        with self._watching(), torch.enable_grad():
            if self._batches is None:
                loss = self._checked(self._loss_fn())
                if any(p.grad is not None and bool(local(p.grad).any()) for p in self._params):
                    raise RuntimeError(
                        "loss_fn called backward() itself: return the loss before backward(), or say closure=True"
                    )
                yield loss, 1
                return
            for batch in self._batches:
                yield self._checked(self._loss_fn(batch)), batch_size(batch)

    def closure_losses(self, see: Callable[[Tensor], bool]) -> float:
        """Evaluates the closure and returns its loss; ``see`` as for :func:`backward_calls`. Leaves its gradients."""
        for p in self._params:
            p.grad = None
        with backward_calls(see):
            return self._run_closure()

    def backward(self) -> float:
        """One pass: leaves the gradients in ``.grad`` and returns the loss."""
        for p in self._params:
            p.grad = None
        if self.closure:
            return self._run_closure()
        total = Mean()
        for loss, samples in self.losses():
            (loss if self.one_batch else loss * samples).backward()
            total.add(loss, samples)
        for p in self._params:
            if p.grad is not None and not self.one_batch:
                p.grad /= total.samples
        return total.value

    def add_gradients(self, out: Tensor, part: Callable[[Tensor, Tensor], Tensor], scale: float) -> None:
        """out <- out + scale g, and frees the gradients."""
        for p in self._params:
            g, p.grad = local_gradient(p), None
            if g is not None:
                g = g.to_dense() if g.layout != torch.strided else g
                part(out, p).add_(g, alpha=scale / self.loss_scale)

    def expect(self, loss: float, other: float, tolerance: float) -> None:
        """Warns, once, if a loss is not what it must be unless the products are noise.

        Among several processes a loss is one's own and gradients are everybody's: they say nothing of each other.
        """
        if abs(loss - other) > tolerance and not self._warned and processes() == 1:
            self._warned = True
            warnings.warn(
                "the loss changes between evaluations with the same weights and random generators, so the "
                "Hessian-vector products are noise: fix its data augmentation and its own generators",
                RuntimeWarning,
                stacklevel=5,
            )

    def expect_same(self, loss: float) -> None:
        """The loss of a pass at the same weights as all others before it."""
        if self._loss is None:
            self._loss = loss
        self.expect(loss, self._loss, 1e-3 * abs(self._loss))

    def _run_closure(self) -> float:
        self._frozen.rewind()
        with self._watching(), torch.enable_grad():
            loss = self._loss_fn()
        if loss is None:
            raise TypeError("the closure returned None: it must return the loss after loss.backward()")
        drop_cleared(self._params)
        if all(p.grad is None for p in self._params):
            raise RuntimeError("the closure left no gradients: it must call loss.backward() before it returns the loss")
        return float(loss.detach() if isinstance(loss, Tensor) else loss)

    def _checked(self, loss: object) -> Tensor:
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn returned {type(loss).__name__}: it must return the loss as a tensor")
        if loss.numel() != 1:
            raise ValueError(f"loss_fn returned a tensor of shape {tuple(loss.shape)}: it must be a scalar")
        if loss.grad_fn is None:
            raise RuntimeError(
                "loss_fn returned a loss without a graph: compute it from the parameters, without no_grad()"
            )
        return loss

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Finds the modules that run, in the first pass."""
        if self._watched:
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile")  # on modules that global hooks see twice
            self._frozen.watch()
            try:
                yield
                self._watched = True
            finally:
                self._frozen.unwatch()


class Mean:
    """The mean of losses, weighted by their samples."""

    def __init__(self) -> None:
        self.samples = 0
        self._sum = 0.0

    def add(self, loss: Tensor, samples: int) -> None:
        self.samples += samples
        self._sum += float(loss.detach()) * samples

    @property
    def value(self) -> float:
        if self.samples == 0:
            raise ValueError("batches has no batch in it")
        return self._sum / self.samples


def batch_size(batch: Any) -> int:
    """Samples in a batch: the length of the first tensor found in a tensor, sequence or mapping."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    if hasattr(batch, "values"):
        batch = batch.values()
    if isinstance(batch, Iterable) and not isinstance(batch, (str, bytes)):
        for part in batch:
            with contextlib.suppress(TypeError):
                return batch_size(part)
    raise TypeError(f"a batch of type {type(batch).__name__} holds no tensor: its samples cannot be counted")
