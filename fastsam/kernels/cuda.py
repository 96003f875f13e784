"""The fused kernels in CUDA C++, for NVIDIA GPUs: the lowest cost of a launch, on torch's current stream.

Built with the package where ``nvcc`` is found. As in ``kernels/triton.py``, a launch reads the tables of
:mod:`fastsam.kernels.device`, a block walks a chunk, full vectors of 16 bytes first, and nothing makes the host
wait. The sums of ``gram`` are added in an order that depends on the number of chunks alone.

Under ``FASTSAM_CUDA_ON_HOST=1`` the same code runs on CPU tensors, block after block: slow, for tests, and without
a GPU or driver. What it cannot show is what only a GPU has: memory that blocks share, and barriers.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.flat import FlatSpace
from fastsam.kernels import Ascent, Descent, device

try:
    from fastsam import _cuda
except ImportError as error:
    _cuda = None
    _import_error = str(error)

#: The kernels look at the sums themselves: the host is never made to wait for them.
DECIDES_ON_HOST = False


def unavailable() -> str | None:
    if _cuda is None:
        from fastsam._build import reason

        return reason("cuda") or _import_error
    return None if _on_host() else _no_gpu()


def refuses(device_: torch.device, dtype: torch.dtype) -> str | None:
    if device_.type != ("cpu" if _on_host() else "cuda"):
        return (
            "FASTSAM_CUDA_ON_HOST=1 is set, so that the kernels run on CPU tensors alone"
            if _on_host()
            else "these kernels are for tensors on an NVIDIA GPU"
        )
    if dtype not in device.DTYPES:
        return f"they handle {', '.join(str(d) for d in device.DTYPES)}"
    return None if _on_host() else _too_old(torch.cuda.get_device_capability(device_), tuple(_cuda.architectures()))


def gram(space: FlatSpace, ascent: Ascent) -> Tensor:
    table = device.table_of(space)
    layout = table.layout(space)
    sums = table.next_sums()
    if not layout.programs:
        return sums.zero_()
    if ascent.ema is not None:
        table.blank(space, ascent.ema, ascent.ema_started, float("nan"))
    weighted = ascent.weighted and any(g["adaptive"] for g in ascent.groups)
    hyper = table.hyper("ascent", device.ascent_lines(ascent, None)) if weighted or ascent.ema is not None else None
    with _on(space.device):
        _cuda.gram(
            _launch(space, layout),
            _address(hyper),
            _address(table.hyper("ascent scaling", device.scaling_line(ascent.grad_scale))),
            _address(ascent.ema),
            _address(ascent.vector),
            _address(table.partials(_cuda.gram_blocks(layout.programs))),
            _address(table.counter),
            _address(sums),
            weighted,
        )
    return sums


def climb(space: FlatSpace, ascent: Ascent, sums: Tensor) -> None:
    table = device.table_of(space)
    layout = table.layout(space)
    closed_form = device.closed_form(ascent)
    hyper = table.hyper("ascent" if closed_form else "coefficients", device.ascent_lines(ascent, sums))
    backup = space.buffer("backup").flat
    if layout.programs:
        with _on(space.device):
            _cuda.climb(
                _launch(space, layout),
                _address(hyper),
                _address(table.hyper("ascent scaling", device.scaling_line(ascent.grad_scale))),
                _address(sums),
                _address(backup),
                _address(ascent.ema),
                _address(ascent.ema_next),
                _address(ascent.vector),
                closed_form,
            )
    space.climbed = [g is not None for g in space.gradients]
    if ascent.ema_next is not None:
        table.written(ascent.ema_next, space.climbed)


def descend_sgd(space: FlatSpace, descent: Descent, sums: Tensor) -> None:
    table = device.table_of(space)
    layout = table.layout(space)
    momentum = descent.state.get("momentum_buffer")
    if momentum is not None:
        table.blank(space, momentum, descent.started, float("nan"))
        table.written(momentum, [g is not None for g in space.gradients])
    hyper = table.hyper("sgd", device.sgd_lines(descent.groups))
    if layout.programs:
        with _on(space.device):
            _cuda.descend_sgd(
                _launch(space, layout),
                _address(hyper),
                *_descent(space, table, descent, sums),
                _address(momentum),
            )


def descend_adam(space: FlatSpace, descent: Descent, sums: Tensor) -> None:
    table = device.table_of(space)
    layout = table.layout(space, merged=False)  # neighbours may have taken different numbers of steps
    for name in ("exp_avg", "exp_avg_sq"):
        table.blank(space, descent.state[name], descent.started, 0.0)
        table.written(descent.state[name], [g is not None for g in space.gradients])
    hyper = table.hyper("adam", device.adam_lines(descent.groups))
    if layout.programs:
        with _on(space.device):
            _cuda.descend_adam(
                _launch(space, layout),
                _address(hyper),
                *_descent(space, table, descent, sums),
                _address(descent.state["exp_avg"]),
                _address(descent.state["exp_avg_sq"]),
                _address(descent.state["step"]),
                _address(table.counter),
            )


def restore(space: FlatSpace) -> None:
    if not any(space.climbed):
        return
    layout = device.table_of(space).layout(space, gradients=False)
    if layout.programs:
        with _on(space.device):
            _cuda.restore(_launch(space, layout), _backup(space))


def _descent(space: FlatSpace, table: device.DeviceTable, descent: Descent, sums: Tensor) -> tuple[int, ...]:
    """What both descents take: scaling, sums, backup, m and the m that climb wrote."""
    line = device.scaling_line(descent.grad_scale, descent.max_norm, descent.clip_value)
    scaling = table.hyper("descent scaling", line)
    return (
        _address(scaling),
        _address(sums),
        _backup(space),
        _address(descent.ema),
        _address(descent.ema_next),
    )


def _launch(space: FlatSpace, layout: device.Layout) -> tuple:
    """The tables of a launch, its types, and where it runs; a stream of None is the host."""
    where = space.device
    return (
        layout.rows.data_ptr(),
        layout.chunks.data_ptr(),
        len(layout.rows),
        layout.programs,
        device.DTYPES[space.dtype],
        any(t != space.dtype for t in space.gradient_dtypes),
        where.index or 0,
        torch.cuda.current_stream(where).cuda_stream if where.type == "cuda" else None,
    )


def _on(where: torch.device) -> contextlib.AbstractContextManager:
    """Makes ``where`` torch's current device, at no cost where it is that already."""
    if where.type == "cpu" or where.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(where)


def _backup(space: FlatSpace) -> int:
    return _address(space.buffer("backup").flat) if any(space.climbed) else 0


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _on_host() -> bool:
    return os.environ.get("FASTSAM_CUDA_ON_HOST") == "1"


@functools.cache
def _no_gpu() -> str | None:
    if torch.version.hip:
        return "torch is built for AMD GPUs (ROCm), these kernels for NVIDIA's"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if _cuda.problem():
        return _cuda.problem()
    architectures = tuple(_cuda.architectures())
    reasons = [_too_old(capability, architectures) for capability in _cuda.capabilities()]
    return None if None in reasons else reasons[0]


@functools.cache
def _too_old(capability: tuple[int, int], architectures: Sequence[int]) -> str | None:
    """Why no code was compiled for a GPU of this compute capability, ``None`` if some was.

    Machine code serves later minor versions of its major one; that of the newest architecture is there as PTX too,
    which serves every later GPU.
    """
    major, minor = capability
    compiled = [(a // 100, a % 100 // 10) for a in architectures]
    if capability >= max(compiled) or any(major == a and minor >= b for a, b in compiled):
        return None
    names = ", ".join(f"sm_{a}{b}" for a, b in sorted(compiled))
    return f"the kernels were compiled for {names}, this GPU is an sm_{major}{minor}; rebuild with FASTSAM_CUDA_ARCHS"
