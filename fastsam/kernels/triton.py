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
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.flat.space import FlatSpace
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
_VECTOR = 16  # bytes: of addresses that are multiples of it Triton compiles kernels of their own

#: Whether a compiled kernel is called with the constants among its arguments, by version of Triton; where that is not
#: known, every launch goes through Triton's dispatch.
_CONVENTIONS = {"3.2": False, "3.6": True, "3.9": True}
_CONSTANTS_PASSED = None if triton is None else _CONVENTIONS.get(".".join(triton.__version__.split(".")[:2]))

#: By everything that a compiled kernel depends on: the kernel, and the constants that its call repeats.
_compiled: dict[tuple, tuple[Any, tuple]] = {}


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
    """Launches through Triton's dispatch once; then the kernel that came of it, with addresses instead of tensors.

    A compiled kernel depends on the pass, the types, which tensors there are, the flags, and on addresses being
    multiples of 16 bytes: where one is not, Triton decides each time.
    """
    where, gradients = space.device, None if name == "restore" else _gradient_type(space)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    rows, chunks, n_rows, programs = layout.tables
    missing = [address is None for address in addresses]
    key = (name, where, space.dtype, space.state_dtype, gradients, *flags.values(), *missing)
    aligned = not functools.reduce(operator.or_, filter(None, addresses), rows | chunks) % _VECTOR
    with device.current(where):
        if aligned and (kept := _compiled.get(key)):
            kernel, passed = kept
            stream = triton.runtime.driver.active.get_current_stream(where.index or 0)
            kernel[programs, 1, 1](rows, chunks, n_rows, *addresses, *passed, stream=stream)
            return
        constants = {
            "W": _DTYPES[space.dtype],
            **({} if name == "restore" else _other_types(space, gradients)),
            **{flag.upper(): value for flag, value in flags.items()},
            "BLOCK": _BLOCK,
        }
        options = {"num_warps": _THREADS // _warp_size(where), "enable_fp_fusion": False}
        kernel = _kernels[name][(programs,)](layout.rows, layout.chunks, n_rows, *tensors, **constants, **options)
    if aligned and kernel is not None and _CONSTANTS_PASSED is not None:  # the interpreter has none
        _compiled[key] = kernel, tuple(constants.values()) if _CONSTANTS_PASSED else ()


def _other_types(space: FlatSpace, gradients: torch.dtype | None) -> dict:
    return {"G": None if gradients is None else _DTYPES[gradients], "M": _DTYPES[space.state_dtype]}


def _gradient_type(space: FlatSpace) -> torch.dtype | None:
    """That of every gradient in a launch; None where there are several."""
    if not space.mixed:
        return space.dtype
    kinds = {t for t, g in zip(space.gradient_dtypes, space.gradients, strict=True) if g is not None}
    return kinds.pop() if len(kinds) == 1 else None


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
    from fastsam.kernels import triton_descend, triton_kernels

    _kernels = {name: getattr(triton_kernels, name) for name in ("gram", "climb", "restore")}
    _kernels |= {name: getattr(triton_descend, name) for name in ("descend_sgd", "descend_adam")}
