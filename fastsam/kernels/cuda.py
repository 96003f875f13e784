"""The fused kernels in CUDA C++, for NVIDIA GPUs: the lowest cost of a launch, on torch's current stream.

Built with the package where ``nvcc`` is found. As in ``kernels/triton.py``, a launch reads the tables of
:mod:`fastsam.kernels.device`, a block walks a chunk, full vectors of 16 bytes first, and nothing makes the host
wait. The sums of ``gram`` are added in an order that depends on the number of chunks alone.

Under ``FASTSAM_CUDA_ON_HOST=1`` the same code runs on CPU tensors, block after block: slow, for tests, and without
a GPU or driver. Barriers and the memory that threads share are tested apart (tests/kernels/test_cuda_concurrency.py).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.flat.space import FlatSpace
from fastsam.kernels import device
from fastsam.kernels.launches import climb, descend_adam, descend_sgd, gram, restore  # noqa: F401  the passes

try:
    from fastsam import _cuda  # type: ignore[attr-defined]
except ImportError as error:
    _cuda = None
    _import_error = str(error)

#: The kernels look at the sums themselves: the host is never made to wait for them.
DECIDES_ON_HOST = False


def unavailable() -> str | None:
    if _cuda is None:
        from fastsam.support.build import reason

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


def launch(name: str, space: FlatSpace, layout: device.Layout, tensors: Sequence[Tensor | None], **flags) -> None:
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    with device.current(space.device):
        getattr(_cuda, name)(_where(space, layout), *addresses, *flags.values())


def _where(space: FlatSpace, layout: device.Layout) -> tuple:
    """The tables of a launch, its types, and where it runs; a stream of None is the host."""
    where = space.device
    return (
        *layout.tables,
        device.DTYPES[space.dtype],
        device.DTYPES[space.state_dtype],
        space.mixed,
        where.index or 0,
        torch._C._cuda_getCurrentRawStream(where.index) if where.type == "cuda" else None,
    )


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
