"""The fused kernels in Triton, for NVIDIA and AMD GPUs; no compiler has to be installed.

Every program of a launch walks one chunk of one row of the tables of :mod:`fastsam.kernels.device`. Where the
chunk's addresses are multiples of 16 bytes, all but its last block are read and written without a mask, in
accesses of 16 bytes; what is left goes element by element under a mask. The arithmetic is that of
``kernels/torch.py``, multiplications and additions uncontracted. Under ``TRITON_INTERPRET=1`` Triton's
interpreter runs the same kernels on CPU tensors.

The host never waits: coefficients, the overflow guard and step counts stay on the device. A NaN in m or in a
momentum buffer marks a parameter it has not met.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from fastsam.flat import FlatSpace
from fastsam.kernels import Ascent, Descent, device

try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton = None
    _import_error = str(error)

#: The kernels look at the sums themselves: the host is never made to wait for them.
DECIDES_ON_HOST = False

_THREADS = 128
_BLOCK = 1024  # elements: one or two accesses of 16 bytes by each thread


def unavailable() -> str | None:
    if triton is None:
        return f"Triton cannot be imported: {_import_error}"
    if not _interpreted() and not torch.cuda.is_available():
        return "torch finds no GPU (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly, for tests)"
    return None


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != ("cpu" if _interpreted() else "cuda"):
        return (
            "TRITON_INTERPRET=1 is set, so that the kernels run on CPU tensors alone"
            if _interpreted()
            else "these kernels are for tensors on a GPU; on CPU tensors they run only under TRITON_INTERPRET=1"
        )
    if dtype not in _DTYPES:
        return f"they handle {', '.join(str(d) for d in _DTYPES)}"
    return None


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
        gram_kernel[(layout.programs,)](
            layout.rows,
            layout.chunks,
            hyper,
            table.hyper("ascent scaling", device.scaling_line(ascent.grad_scale)),
            ascent.ema,
            ascent.vector,
            table.partials(layout.programs),
            table.counter,
            sums,
            WEIGHTED=weighted,
            **_types(space),
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
            climb_kernel[(layout.programs,)](
                layout.rows,
                layout.chunks,
                hyper,
                table.hyper("ascent scaling", device.scaling_line(ascent.grad_scale)),
                sums,
                backup,
                ascent.ema,
                ascent.ema_next,
                ascent.vector,
                CLOSED_FORM=closed_form,
                **_types(space),
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
            sgd_kernel[(layout.programs,)](
                layout.rows,
                layout.chunks,
                hyper,
                _scaling(table, descent),
                sums,
                _backup(space),
                momentum,
                descent.ema,
                descent.ema_next,
                **_types(space),
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
            adam_kernel[(layout.programs,)](
                layout.rows,
                layout.chunks,
                hyper,
                _scaling(table, descent),
                sums,
                _backup(space),
                descent.state["exp_avg"],
                descent.state["exp_avg_sq"],
                descent.state["step"],
                descent.ema,
                descent.ema_next,
                table.counter,
                len(layout.rows),
                **_types(space),
            )


def restore(space: FlatSpace) -> None:
    if not any(space.climbed):
        return
    layout = device.table_of(space).layout(space, gradients=False)
    if layout.programs:
        with _on(space.device):
            restore_kernel[(layout.programs,)](layout.rows, layout.chunks, _backup(space), **_geometry(space))


def _backup(space: FlatSpace) -> Tensor | None:
    return space.buffer("backup").flat if any(space.climbed) else None


def _scaling(table: device.DeviceTable, descent: Descent) -> Tensor:
    return table.hyper("descent scaling", device.scaling_line(descent.grad_scale, descent.max_norm, descent.clip_value))


def _types(space: FlatSpace) -> dict:
    kinds = {t for t, g in zip(space.gradient_dtypes, space.gradients, strict=True) if g is not None} or {space.dtype}
    return {**_geometry(space), "G": _DTYPES[kinds.pop()] if len(kinds) == 1 else None}


def _geometry(space: FlatSpace) -> dict:
    return {
        "W": _DTYPES[space.dtype],
        "BLOCK": _BLOCK,
        "num_warps": _THREADS // _warp_size(space.device),
        "enable_fp_fusion": False,
    }


@functools.cache
def _warp_size(where: torch.device) -> int:
    return torch.cuda.get_device_properties(where).warp_size if where.type == "cuda" else 32


def _on(where: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(where) if where.type == "cuda" else contextlib.nullcontext()


def _interpreted() -> bool:
    return triton is not None and not isinstance(gram_kernel, triton.JITFunction)


if triton is not None:
    _DTYPES = {
        torch.float32: tl.float32,
        torch.float64: tl.float64,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }
    from fastsam.kernels.triton_kernels import adam_kernel, climb_kernel, gram_kernel, restore_kernel, sgd_kernel
