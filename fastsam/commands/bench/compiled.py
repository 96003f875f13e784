"""The foreach formulation under ``torch.compile``: climb and descend are one compiled function each.

The functions are written so that the compiler may fuse what it can: temporaries instead of in-place passes,
the norm as a tensor, the base update spelled out. What does not change between steps is a constant.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch

from fastsam.commands.bench.settings import ALPHA, BASES, LMBDA, RHO, SIGMA

Tensors = list[torch.Tensor] | tuple[torch.Tensor, ...]


class CompileLimit(BaseException):
    """The time for compiling is over. Not an ``Exception``: nothing inside the compiler may swallow it."""


class Compiled:
    """Two-pass optimizer whose passes are compiled at their first use.

    ``first_step`` of F-SAM starts m eagerly and compiles in the second step, which is the one that repeats.
    """

    def __init__(self, method: str, base: str, parameters: Tensors, eigenvector: Tensors) -> None:
        self._cache = _start_from_a_cold_compiler(parameters[0].device)
        self.parameters = parameters
        self.backup = [torch.empty_like(p) for p in parameters]
        self.eigenvector = eigenvector
        self.momentum: Tensors | None = None
        self.method = method
        self._climb = torch.compile(_CLIMBS[method], fullgraph=True, dynamic=False)
        self._descend = _DESCENDS[base](parameters)

    @torch.no_grad()
    def first_step(self) -> None:
        gradients = cast(Tensors, [p.grad for p in self.parameters])
        if self.method == "fsam" and self.momentum is None:
            self.momentum = [g.clone() for g in gradients]
            _climb_sam(self.parameters, gradients, self.backup, None)
            return
        other = self.eigenvector if self.momentum is None else self.momentum  # which F-SAM alone has
        self._climb(self.parameters, gradients, self.backup, other)

    @torch.no_grad()
    def second_step(self) -> None:
        self._descend(self.parameters, cast(Tensors, [p.grad for p in self.parameters]), self.backup)


@contextmanager
def compile_limit(seconds: float) -> Iterator[None]:
    """Raises ``CompileLimit`` in the body once ``seconds`` have gone by.

    No limit where ``seconds`` is 0. Main thread only, as signals are.
    """

    def expire(signum, frame):
        raise CompileLimit(f"compile > {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, 10)  # again, should a finalizer have met the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _start_from_a_cold_compiler(device: torch.device) -> tempfile.TemporaryDirectory:
    """Forgets earlier compilations, so that the time reported is that of a first run. On a CPU compiles in this
    process, so that nothing goes on compiling beside what is timed. The directory must outlive the functions."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    if device.type == "cpu":
        inductor.compile_threads = 1
    inductor.force_disable_caches = True
    directory = tempfile.TemporaryDirectory(prefix="fastsam-benchmark-", ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory.name
    return directory


def _climb_sam(parameters: Tensors, gradients: Tensors, backup: Tensors, _: Tensors | None) -> None:
    _climb_along(parameters, torch._foreach_mul(gradients, RHO / (_norm(gradients) + 1e-12)), backup)


def _climb_fsam(parameters: Tensors, gradients: Tensors, backup: Tensors, momentum: Tensors) -> None:
    difference = torch._foreach_sub(gradients, momentum, alpha=SIGMA)
    _climb_along(parameters, torch._foreach_mul(difference, RHO / (_norm(difference) + 1e-12)), backup)
    torch._foreach_mul_(momentum, LMBDA)
    torch._foreach_add_(momentum, gradients, alpha=1 - LMBDA)


def _climb_eigensam(parameters: Tensors, gradients: Tensors, backup: Tensors, eigenvector: Tensors) -> None:
    norm = _norm(gradients) + 1e-12
    dot = torch.stack([product.sum() for product in torch._foreach_mul(gradients, eigenvector)]).sum()
    sign = torch.sign(dot)
    perturbation = torch._foreach_mul(gradients, RHO * (1 / norm - ALPHA * sign * dot / norm**2))
    torch._foreach_add_(perturbation, torch._foreach_mul(eigenvector, RHO * ALPHA * sign))
    _climb_along(parameters, perturbation, backup)


def _climb_along(parameters: Tensors, perturbation: Tensors, backup: Tensors) -> None:
    torch._foreach_copy_(backup, parameters)
    torch._foreach_add_(parameters, perturbation)


def _norm(tensors: Tensors) -> torch.Tensor:
    return torch.stack([t.square().sum() for t in tensors]).sum().sqrt()


def _sgd(parameters: Tensors) -> Callable[[Tensors, Tensors, Tensors], None]:
    options = BASES["sgd"][1]
    buffers = [torch.zeros_like(p) for p in parameters]  # 0.9 * 0 + g is torch's first step too

    def update(parameters, gradients, backup, buffers):
        torch._foreach_mul_(buffers, options["momentum"])
        torch._foreach_add_(buffers, torch._foreach_add(gradients, backup, alpha=options["weight_decay"]))
        torch._foreach_copy_(parameters, torch._foreach_add(backup, buffers, alpha=-options["lr"]))

    compiled = torch.compile(update, fullgraph=True, dynamic=False)
    return lambda parameters, gradients, backup: compiled(parameters, gradients, backup, buffers)


def _adamw(parameters: Tensors) -> Callable[[Tensors, Tensors, Tensors], None]:
    options = BASES["adamw"][1]
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    averages = [torch.zeros_like(p) for p in parameters]
    squares = [torch.zeros_like(p) for p in parameters]
    steps = 0

    def update(parameters, gradients, backup, averages, squares, step_size, root_correction):
        torch._foreach_lerp_(averages, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        roots = torch._foreach_div(torch._foreach_sqrt(squares), root_correction)
        change = torch._foreach_mul(torch._foreach_div(averages, torch._foreach_add(roots, eps)), -step_size)
        decayed = torch._foreach_mul(backup, 1 - options["lr"] * options["weight_decay"])
        torch._foreach_copy_(parameters, torch._foreach_add(decayed, change))

    compiled = torch.compile(update, fullgraph=True, dynamic=False)

    def descend(parameters, gradients, backup):
        nonlocal steps
        steps += 1
        # As tensors: a Python number that changes would be compiled anew at every step.
        step_size = torch.tensor(options["lr"] / (1 - beta1**steps))
        root_correction = torch.tensor((1 - beta2**steps) ** 0.5)
        compiled(parameters, gradients, backup, averages, squares, step_size, root_correction)

    return descend


_CLIMBS = {"sam": _climb_sam, "fsam": _climb_fsam, "eigensam": _climb_eigensam}
_DESCENDS = {"sgd": _sgd, "adamw": _adamw}
