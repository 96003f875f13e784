"""The losses that a closure calls ``backward()`` on.

A closure does its own backward pass, and nobody is handed a loss with its graph, which double backward needs. But
``Tensor.backward``, and with it GradScaler, Accelerate, Lightning and Transformers, goes through
``torch.autograd.backward``: that is replaced while the closure runs. (A ``TorchFunctionMode`` sees ``Tensor.backward``
too, but every other operation passes through it as well, and compiled models are compiled anew under one.)
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

Tensors = Tensor | Sequence[Tensor] | GradientEdge | Sequence[GradientEdge]
_LOCK = threading.RLock()  # one replacement at a time, or one would be left behind


@contextlib.contextmanager
def backward_calls(see: Callable[[Tensor], bool]) -> Iterator[None]:
    """``see(loss)`` is called before every backward pass that this thread begins in the block.

    ``loss`` is a scalar with its graph: where several tensors or ``gradient=`` are given, the one whose gradients are
    those of the pass. The pass then goes on as if nobody had looked; where ``see`` returned True its graph is retained.
    """
    owner, busy = threading.get_ident(), False
    with _LOCK:
        original = torch.autograd.backward

        @torch._disable_dynamo  # a compiled closure breaks its graph at backward() anyway
        @functools.wraps(original)
        def backward(
            tensors: Tensors,
            grad_tensors: Tensor | Sequence[Tensor | None] | None = None,
            retain_graph: bool | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> None:
            nonlocal busy
            if busy or threading.get_ident() != owner:  # a pass within a pass, as of reentrant checkpoints
                return original(tensors, grad_tensors, retain_graph, *args, **kwargs)
            busy = True
            try:
                loss = _scalar(tensors, grad_tensors)
                if loss is not None and see(loss):
                    retain_graph = True
                return original(tensors, grad_tensors, retain_graph, *args, **kwargs)
            finally:
                busy = False

        torch.autograd.backward = backward
        try:
            yield
        finally:
            torch.autograd.backward = original


def _scalar(tensors: Tensors, grad_tensors: Tensor | Sequence[Tensor | None] | None) -> Tensor | None:
    """sum <tensor, grad_tensor>, or None for what backward() itself is about to refuse."""
    given = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if grad_tensors is None or isinstance(grad_tensors, Tensor):
        grad_tensors = [grad_tensors] * len(given)
    roots = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
    if len(roots) < len(given):
        return None
    with torch.enable_grad():
        parts = []
        for t, g in zip(roots, grad_tensors, strict=False):
            if g is None and t.numel() != 1:
                return None
            parts.append(t.sum() if g is None else (t * g.detach()).sum())
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()
