"""What surrounds a capture by :mod:`fastsam.graphs`: the GPU's part, what has to stay, what cannot be captured."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from fastsam.engine.base_rules import fused_rule
from fastsam.flat.space import FlatSpace
from fastsam.loop.frozen import Frozen
from fastsam.optimizer import SharpnessAware
from fastsam.support.checks import describe
from fastsam.support.interrupts import uninterrupted

#: The remedy for a graph that no longer fits.
AGAIN = "call fastsam.graphs.capture again"


class Addresses:
    """Where everything lies that a captured step reads and its owner might move."""

    def __init__(self, optimizer: SharpnessAware, model: nn.Module | None) -> None:
        self._optimizer, self._model = optimizer, model
        self._params = optimizer.two_pass.parameters()
        self._pointers = list(map(Tensor.data_ptr, self._params))
        self._groups = self._group_structure()
        self._training = None if model is None else model.training
        self._tensors = [
            (kind, name, tensor, tensor.data_ptr())
            for module in ([] if model is None else model.modules())
            for kind in (module._parameters, module._buffers)
            for name, tensor in kind.items()
            if tensor is not None
        ]

    def check(self) -> None:
        """Raises ``RuntimeError`` if anything is elsewhere than when the step was captured."""
        if self._group_structure() != self._groups:
            raise RuntimeError(
                "the optimizer's groups have other parameters than when the step was captured, or others of them are "
                f"frozen: {AGAIN}"
            )
        pointers = list(map(Tensor.data_ptr, self._params))
        if pointers != self._pointers:
            moved = next(p for p, a, b in zip(self._params, pointers, self._pointers, strict=True) if a != b)
            raise RuntimeError(f"{describe(moved)} has moved since the step was captured: {AGAIN}")
        for kind, name, tensor, pointer in self._tensors:
            if kind.get(name) is not tensor or tensor.data_ptr() != pointer:
                raise RuntimeError(
                    f"the model's {name!r} of shape {tuple(tensor.shape)} was replaced or moved since the step was "
                    f"captured: {AGAIN}; a layer that replaces a buffer in each pass has to update it in place"
                )
        if self._model is not None and self._model.training != self._training:
            was, now = ("training" if flag else "eval" for flag in (self._training, self._model.training))
            raise RuntimeError(f"the step was captured with the model in {was} mode, and it is in {now} mode now")

    def _group_structure(self) -> list:
        groups = self._optimizer.param_groups
        return [(bool(g["perturb"]), *((id(p), p.requires_grad) for p in g["params"])) for g in groups]


class Unchanged:
    """``with Unchanged(optimizer, model) as unchanged: ...``: steps that were never taken.

    On exit weights, state, buffers of modules that ran, random generators and gradients are what they were on entry.
    """

    def __init__(self, optimizer: SharpnessAware, model: nn.Module | None) -> None:
        self._optimizer = optimizer
        self._params = optimizer.two_pass.parameters()
        self._frozen = Frozen(self._params, model)

    @torch.no_grad()
    def __enter__(self) -> Unchanged:
        optimizer = self._optimizer
        self._frozen.__enter__()
        self._frozen.watch()
        self._weights = [p.detach().clone() for p in self._params]
        self._state = {
            p: {name: (value, value.clone() if isinstance(value, Tensor) else None) for name, value in entry.items()}
            for p, entry in optimizer.state.items()
        }
        self._groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self._sums = optimizer.two_pass.sums
        return self

    def all_modules_seen(self) -> None:
        self._frozen.unwatch()

    @torch.no_grad()
    def __exit__(self, *exception: object) -> None:
        optimizer = self._optimizer
        self._frozen.__exit__(*exception)
        for p, weight in zip(self._params, self._weights, strict=True):
            p.copy_(weight)
        for p in list(optimizer.state):
            entry = optimizer.state[p]
            entry.clear()
            if p not in self._state:
                del optimizer.state[p]
            for name, (value, kept) in self._state.get(p, {}).items():
                entry[name] = value if kept is None else value.copy_(kept)
        for group, values in zip(optimizer.param_groups, self._groups, strict=True):
            group.update(values)
        optimizer.two_pass.sums = self._sums
        optimizer.two_pass.spaces.forget_states()


@torch.no_grad()
def renew_accumulators(optimizer: SharpnessAware, model: nn.Module | None) -> None:
    """Has autograd make the nodes anew that add up gradients, on the stream that first uses them from now on.

    A loss from before keeps its nodes, which belong to the stream of its forward pass, and a capture on another stream
    fails in them. torch lets go of a parameter's node when its data become of another dtype, if for a moment only;
    hooks, address and version stay.
    """
    for p in {*optimizer.two_pass.parameters(), *(() if model is None else model.parameters())}:
        if p.requires_grad:
            data, other = p.data, torch.float32 if p.dtype == torch.float64 else torch.float64
            with uninterrupted():
                p.data = torch.empty(0, dtype=other, device=p.device)
                p.data = data


class Gpu:
    """What capturing needs of torch: a stream of its own, graphs in one pool of memory, random numbers."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            found = "" if torch.cuda.is_available() else ", and torch finds none"
            raise RuntimeError(
                f"fastsam.graphs.capture needs parameters on a GPU{found}; these are on {device}: move the model there "
                "before the optimizer is built, or call optimizer.step(closure)"
            )
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._generator = torch.cuda.default_generators[device.index]
        self._second = torch.Generator(device)  # where the second pass draws what the first one drew

    @contextlib.contextmanager
    def warming_up(self) -> Iterator[None]:
        """Runs the block on the stream that captures: what it compiles and allocates is there then."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:  # what puts everything back comes after what ran here
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    @contextlib.contextmanager
    def waiting_refused(self) -> Iterator[None]:
        """Has torch raise where the block waits for the GPU, which breaks a capture; before one that is no harm."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that this mode does not see everything
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Captures ``step``, without running it; what repeats it on the current stream."""
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph does not leave its stream if the capture breaks, hence one around it.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            graph.register_generator_state(self._second)
            try:
                self._capture(graph, step, pool=self._pool)
            except BaseException:
                self._clear_up()
                raise
        return graph.replay

    def _capture(self, graph: torch.cuda.CUDAGraph, step: Callable[[], object], **options: Any) -> None:
        # Threads that load data may go on meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local", **options):
            step()

    def _clear_up(self) -> None:
        """After a capture that broke: torch's allocator and random numbers still wait for its end."""
        with contextlib.suppress(AttributeError, RuntimeError):  # in later versions they do not
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        self._capture(torch.cuda.CUDAGraph(), lambda: torch.zeros(1, device=self._device))

    @contextlib.contextmanager
    def masks_again(self) -> Iterator[None]:
        """Within a capture: draws the random numbers that :meth:`align_masks` provides for."""
        first = self._generator.graphsafe_get_state()
        self._generator.graphsafe_set_state(self._second)
        try:
            yield
        finally:
            self._generator.graphsafe_set_state(first)

    def align_masks(self) -> None:
        """Before a replay: the second pass starts from where the first one does."""
        self._second.set_state(self._generator.get_state())


# ---- what cannot be captured ------------------------------------------------------------------------------------


def check_optimizer(optimizer: SharpnessAware) -> torch.device:
    """The one device of its parameters."""
    if not isinstance(optimizer, SharpnessAware):
        raise TypeError(f"optimizer={type(optimizer).__name__} must be one of fastsam's")
    if optimizer.two_pass.perturbed or optimizer.two_pass.accumulated is not None:
        raise RuntimeError("capture() within a step: call second_step(), descend() or restore() first")
    devices = sorted({str(p.device) for p in optimizer.two_pass.parameters()})
    if len(devices) > 1:
        raise RuntimeError(f"a step on {' and '.join(devices)} cannot be one CUDA graph: call optimizer.step(closure)")
    device = optimizer.two_pass.parameters()[0].device
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            raise RuntimeError("a step on several processes cannot be captured yet: call optimizer.step(closure)")
    if torch.is_autocast_enabled(device.type):
        raise RuntimeError(
            "capture() within autocast, whose casts of the weights would be kept: use autocast in the closure"
        )
    if fused_rule(optimizer.base_optimizer) is None:
        raise RuntimeError(
            f"{type(optimizer.base_optimizer).__name__} runs its own step() as it is set up, and waits for the device: "
            "a captured step needs torch.optim.SGD, Adam or AdamW without amsgrad, differentiable or hooks"
        )
    return device


def check_tensors(batch: Sequence[Tensor], device: torch.device) -> None:
    for i, tensor in enumerate(batch):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"example {i} of the batch is a {type(tensor).__name__}: give tensors")
        if tensor.device != device:
            raise ValueError(
                f"example {i} of the batch is on {tensor.device}, the parameters on {device}: move it there"
            )


def check_spaces(spaces: list[FlatSpace]) -> None:
    for space in spaces:
        if space.kernels.DECIDES_ON_HOST:
            name = space.kernels.__name__.rsplit(".", 1)[-1]
            raise RuntimeError(
                f"backend {name!r} waits for the device within a step, which a CUDA graph cannot: take 'cuda' or "
                "'triton' (fastsam.backends() says why one is not available)"
            )


def cannot_capture(error: Exception) -> RuntimeError:
    """The error that broke a capture; CUDA's own, when the capture then ends, says nothing of why."""
    cause: BaseException = error
    while cause.__context__ is not None:
        cause = cause.__context__
    return RuntimeError(
        f"the step cannot be captured into a CUDA graph: {type(cause).__name__}: {cause}. Nothing in the closure may "
        "wait for the GPU (.item(), print of a tensor, a branch on a value), copy from the CPU or change its shapes"
    )
