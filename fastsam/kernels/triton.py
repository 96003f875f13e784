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

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.flat import FlatSpace
from fastsam.kernels import device
from fastsam.kernels.launches import climb, descend_adam, descend_sgd, gram, restore  # noqa: F401  the passes

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
    return _too_old(device) if device.type == "cuda" and not torch.version.hip else None


def launch(name: str, space: FlatSpace, layout: device.Layout, tensors: Sequence[Tensor | None], **flags) -> None:
    types = _geometry(space) if name == "restore" else _types(space)
    constants = {flag.upper(): value for flag, value in flags.items()} | types
    with device.current(space.device):
        _kernels[name][(layout.programs,)](layout.rows, layout.chunks, len(layout.rows), *tensors, **constants)


def _types(space: FlatSpace) -> dict:
    kinds = {space.dtype}
    if space.mixed:  # a missing gradient has none
        kinds = {t for t, g in zip(space.gradient_dtypes, space.gradients, strict=True) if g is not None}
    return {**_geometry(space), "G": _DTYPES[kinds.pop()] if len(kinds) == 1 else None}


def _geometry(space: FlatSpace) -> dict:
    return {
        "W": _DTYPES[space.dtype],
        "BLOCK": _BLOCK,
        "num_warps": _THREADS // _warp_size(space.device),
        "enable_fp_fusion": False,
    }


@functools.cache
def _too_old(where: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(where)
    return f"Triton compiles for GPUs from sm_70 on, this one is an sm_{major}{minor}" if major < 7 else None


@functools.cache
def _warp_size(where: torch.device) -> int:
    return torch.cuda.get_device_properties(where).warp_size if where.type == "cuda" else 32


def _interpreted() -> bool:
    return triton is not None and not isinstance(_kernels["gram"], triton.JITFunction)


if triton is not None:
    _DTYPES = {
        torch.float32: tl.float32,
        torch.float64: tl.float64,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }
    from fastsam.kernels import triton_kernels

    _kernels = {
        name: getattr(triton_kernels, name) for name in ("gram", "climb", "descend_sgd", "descend_adam", "restore")
    }
