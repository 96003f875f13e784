"""The fused C++ kernels for CPU tensors: AVX-512, AVX2 or baseline, chosen when the extension is loaded.

The environment variable ``FASTSAM_ISA`` (``avx512``, ``avx2`` or ``baseline``) overrides the choice. Every
instruction set and every number of threads gives the same bits.
"""

from __future__ import annotations

import math
import time
from array import array

import torch
from torch import Tensor

from fastsam.flat.space import FlatSpace
from fastsam.kernels import Ascent, Descent
from fastsam.kernels.torch import all_finite, clip_coefficient, mixtures_of

try:
    from fastsam import _cpu  # type: ignore[attr-defined]
except ImportError as error:
    _cpu = None
    _import_error = str(error)

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CLIMBED, _EMA_STARTED, _STATE_STARTED = 1, 2, 4

#: The sums are looked at as soon as they are there.
DECIDES_ON_HOST = True


def unavailable() -> str | None:
    if _cpu is not None:
        return None
    from fastsam.support.build import reason

    return reason("cpu") or _import_error


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return "these kernels are for tensors on the CPU"
    if dtype not in _DTYPES:
        return f"they handle {', '.join(str(d) for d in _DTYPES)}"
    return None


def isa() -> str:
    """The instruction set in use: ``avx512``, ``avx2`` or ``baseline``."""
    return _cpu.isa()


def thread_runtime() -> str:
    """``OpenMP`` where torch's own pool is used, else ``std::thread``."""
    return _cpu.thread_runtime()


def gram(space: FlatSpace, ascent: Ascent) -> Tensor:
    sums = _cpu.gram(
        _table(space, ascent.ema_started, _EMA_STARTED),
        _address(ascent.ema),
        _address(ascent.vector),
        [(0.0, 0.0, g.get("sigma", 0.0), 0.0, g["adaptive"]) for g in ascent.groups],
        ascent.weighted,
        float(ascent.grad_scale),
        torch.get_num_threads(),
    )
    if ascent.met is not None:  # as carried() has it
        sums = [found + 0.0 * past for found, past in zip(sums, ascent.met.tolist(), strict=True)]
    # Right after a backward pass, when little of torch is in the caches, torch.tensor takes 67 us and this 29.
    return torch.frombuffer(array("d", sums), dtype=torch.float64)


def climb(space: FlatSpace, ascent: Ascent, sums: Tensor) -> None:
    values = sums.tolist()
    finite = all_finite(values)
    assert ascent.coefficients is not None
    dd, dv, vv = values
    groups = []
    for g in ascent.groups:
        c_d, c_v = ascent.coefficients(dd, dv, vv, g) if finite else (0.0, 0.0)
        groups.append((c_d, c_v, g.get("sigma", 0.0), g.get("lmbda", 0.0), g["adaptive"]))
    _cpu.climb(
        space.table.rows,  # as gram left them
        _address(space.buffer("backup").flat),
        _address(ascent.ema),
        _address(ascent.ema_next),
        _address(ascent.vector),
        groups,
        float(ascent.grad_scale),
        not finite,
        torch.get_num_threads(),
    )
    space.climbed = [g is not None for g in space.gradients]


def descend_sgd(space: FlatSpace, descent: Descent, sums: Tensor) -> None:
    if not all_finite(sums.tolist()):
        return restore(space)
    _cpu.descend_sgd(
        _table(space, descent.started, _STATE_STARTED),
        _backup(space),
        _address(descent.state.get("momentum_buffer")),
        [
            (float(g["lr"]), g["momentum"], g["dampening"], g["weight_decay"], g["nesterov"], g["maximize"])
            for g in descent.groups
        ],
        *_scale_and_limit(descent, sums),
        *_mixing(descent, sums),
        descent.rounding or (),
        torch.get_num_threads(),
    )


def descend_adam(space: FlatSpace, descent: Descent, sums: Tensor) -> None:
    if not all_finite(sums.tolist()):
        return restore(space)
    _cpu.descend_adam(
        _table(space, descent.started, _STATE_STARTED, merge=False),
        _backup(space),
        _address(descent.state["exp_avg"]),
        _address(descent.state["exp_avg_sq"]),
        _address(descent.state["step"]),
        bytes(g is not None for g in space.gradients),
        [
            (
                float(g["lr"]),
                *map(float, g["betas"]),
                g["eps"],
                g["weight_decay"],
                g["decoupled_weight_decay"],
                g["maximize"],
            )
            for g in descent.groups
        ],
        *_scale_and_limit(descent, sums),
        *_mixing(descent, sums),
        descent.rounding or (),
        torch.get_num_threads(),
    )


def restore(space: FlatSpace) -> None:
    if any(space.climbed):
        _cpu.restore(_table(space), _backup(space), torch.get_num_threads())


def bandwidth(reads: int, writes: int, numel: int, threads: int | None = None, in_place: int = 0) -> float:
    """Seconds that a plain kernel takes to read ``reads`` and write ``writes`` float32 arrays of ``numel`` elements.

    The first ``in_place`` written arrays are read ones, stored through the caches; the others are new and
    stored past them. The median of seven passes after a warm-up: the floor to hold a pass against.
    """
    read = [torch.ones(numel) for _ in range(reads)]
    written = read[:in_place] + [torch.ones(numel) for _ in range(writes - in_place)]
    addresses = [t.data_ptr() for t in read], [t.data_ptr() for t in written]
    seconds = []
    for _ in range(8):
        begin = time.perf_counter()
        _cpu.stream(*addresses, in_place, numel, threads or torch.get_num_threads())
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds[1:])[3]


def _scale_and_limit(descent: Descent, sums: Tensor) -> tuple[float, float]:
    """What every gradient is multiplied by, and the magnitude it is then limited to."""
    scale = float(descent.grad_scale)
    if descent.max_norm is not None and descent.mixtures is None:
        scale *= clip_coefficient(descent.max_norm, sums[0].item())
    return scale, math.inf if descent.clip_value is None else descent.clip_value


def _mixing(descent: Descent, sums: Tensor) -> tuple[list, int, int]:
    """The groups' mixtures (none where the base optimizer takes g itself), s, and where it goes on."""
    mixtures = mixtures_of(descent, sums.tolist())
    return ([], 0, 0) if mixtures is None else (mixtures, _address(descent.stored), _address(descent.stored_next))


def _table(space: FlatSpace, started=(), bit: int = 0, merge: bool = True):
    """The space's chunk table, brought up to date with the addresses and flags of this pass."""
    if space.table is None:
        space.table = _Table(space)
    flags = space.climbed
    if bit and started:
        flags = [_CLIMBED * c | bit * s for c, s in zip(space.climbed, started, strict=True)]
    return space.table.refresh(space, bytes(flags), merge)


class _Table:
    """The compiled table, and what it was last given: the same is not sent twice."""

    def __init__(self, space: FlatSpace) -> None:
        self.rows = _cpu.Table(
            _DTYPES[space.dtype],
            _DTYPES[space.state_dtype],
            space.offsets,
            space.first,
            space.sizes,
            space.groups,
            space.joined,
        )
        self._addresses: tuple[bytes, bytes] | None = None
        self._dtypes: tuple[torch.dtype, ...] | None = None

    def refresh(self, space: FlatSpace, flags: bytes, merge: bool):
        if self._dtypes is not space.gradient_dtypes:
            self._dtypes = space.gradient_dtypes
            self.rows.set_gradient_types([_DTYPES[d] for d in space.gradient_dtypes])
        addresses = space.weights, space.gradient_addresses
        if self._addresses != addresses:
            self._addresses = addresses
            self.rows.set_addresses(*addresses)
        self.rows.set_flags(flags, merge)
        return self.rows

    def written(self, flat: Tensor, which) -> None:
        """Nothing to note: flags say which state has started, and no mark in its memory."""


def _backup(space: FlatSpace) -> int:
    return _address(space.buffer("backup").flat) if any(space.climbed) else 0


def _address(flat: Tensor | None) -> int:
    return 0 if flat is None else flat.data_ptr()
