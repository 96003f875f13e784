"""The floor of a step: the bytes its passes must move, and the time this machine's memory takes for them.

A pass is a mix of arrays read and arrays written. Bytes for each float32 parameter:

| pass | reads | writes | bytes |
|---|---|---|---|
| gram: SAM, Stable SAM, GSAM, WSAM, LookSAM | g | | 4 |
| gram: Momentum-SAM | momentum | | 4 |
| gram: F-SAM, VaSSO, Eigen-SAM | g, m or v | | 8 |
| climb: SAM, Stable SAM | g, w | w, b | 16 |
| climb: Momentum-SAM | momentum, w | w, b | 16 |
| climb: GSAM, WSAM, LookSAM | g, w | w, b, s | 20 |
| climb: F-SAM, VaSSO | g, m, w | m, w, b | 24 |
| climb: Eigen-SAM | g, v, w | w, b | 20 |
| guard | g | | 4 |
| descend: SGD with momentum | b, g, momentum | w, momentum | 20 |
| descend: AdamW | b, g, exp_avg, exp_avg_sq | w, exp_avg, exp_avg_sq | 28 |

b is the backup of the weights. The guard reads the second gradient before anything is written, so that a NaN
or an infinity there changes neither weights nor state. s is the first gradient that GSAM, WSAM and LookSAM keep: guard
and descend read it, too, 4 bytes more each, and LookSAM's descend writes another s in its place, 4 more. LookSAM's
steps between two climbs have guard and descend alone, with s, and w in the place of b; its bytes are the mean over
k steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from fastsam.commands.bench import clock
from fastsam.commands.bench.settings import cycle

FLOAT32_BYTES = 4
COPIES = 10
_CPU = torch.device("cpu")


class Mix(NamedTuple):
    """How many arrays a pass reads, how many it writes, and how many of the written are among the read."""

    reads: int
    writes: int
    in_place: int

    @property
    def bytes_per_parameter(self) -> int:
        return FLOAT32_BYTES * (self.reads + self.writes)


_GUARD = Mix(1, 0, 0)
_DESCEND = {"sgd": Mix(3, 2, 1), "adamw": Mix(4, 3, 2)}
_SAM = (Mix(1, 0, 0), Mix(2, 2, 1))
_KEEPING = (Mix(1, 0, 0), Mix(2, 3, 1))
_AVERAGING = (Mix(2, 0, 0), Mix(3, 3, 2))
_GRAM_AND_CLIMB = {
    "sam": _SAM,
    "fsam": _AVERAGING,
    "eigensam": (Mix(2, 0, 0), Mix(3, 2, 1)),
    "momentumsam": _SAM,
    "gsam": _KEEPING,
    "wsam": _KEEPING,
    "looksam": _KEEPING,
    "stablesam": _SAM,
    "vasso": _AVERAGING,
}
_STORED_READ = ("gsam", "wsam", "looksam")
_STORED_WRITTEN = ("looksam",)


def passes(method: str, base: str) -> dict[str, Mix]:
    """The four passes of a step of ``method`` that climbs over ``base``, in order: gram, climb, guard, descend."""
    gram, climb = _GRAM_AND_CLIMB[method]
    read, written = method in _STORED_READ, method in _STORED_WRITTEN
    return {"gram": gram, "climb": climb, "guard": _more(_GUARD, read), "descend": _more(_DESCEND[base], read, written)}


def cycle_passes(method: str, base: str) -> list[dict[str, Mix]]:
    """The passes of every step in turn, of which one without a climb has the last two, and no backup to read."""
    reads, writes, in_place = _more(_DESCEND[base], read=True)
    between = {"guard": _more(_GUARD, read=True), "descend": Mix(reads, writes, in_place + 1)}
    return [passes(method, base) if kind.climbs else between for kind in cycle(method)]


def bytes_per_parameter(method: str, base: str, itemsize: int = FLOAT32_BYTES) -> float:
    """The least bytes a step can move for each parameter of ``itemsize`` bytes, the mean over the steps in turn."""
    steps = cycle_passes(method, base)
    moved = sum(mix.bytes_per_parameter for step in steps for mix in step.values()) * itemsize / FLOAT32_BYTES
    return round(moved / len(steps), 2)


def _more(mix: Mix, read: bool = False, written: bool = False) -> Mix:
    return Mix(mix.reads + read, mix.writes + written, mix.in_place)


class Bandwidth:
    """Times plain streaming kernels of given mixes over arrays of ``numel`` float32, sample by sample.

    ``sample()`` takes one timing of every mix, so that a caller can spread the samples over its own
    measurements and meet the same disturbances; ``seconds(mix)`` is the median so far. ``source`` says what
    the kernels are: on the CPU fastsam's plain loops, which write new arrays past the caches, or torch's ``copy_``
    scaled by bytes where those were not built; on a GPU torch's ``copy_`` between buffers that no cache holds.
    """

    def __init__(self, mixes: Iterable[Mix], numel: int, threads: int, device: torch.device = _CPU) -> None:
        self.source, self._time = _streaming_kernels(numel, threads, device)
        self._samples: dict[Mix, list[float]] = {mix: [] for mix in sorted(set(mixes))}

    def sample(self) -> None:
        for mix, taken in self._samples.items():
            taken.append(self._time(mix))

    def seconds(self, mix: Mix) -> float:
        return statistics.median(self._samples[mix])


class CopyBandwidth:
    """Bandwidth of ``copy_`` on one device: ``sample()`` now and then; the median is ``gb_per_s``, both ways."""

    def __init__(self, device: torch.device, size: int | None = None) -> None:
        size = size or copy_size(device)
        self.device, self.bytes = device, size
        self._source = torch.ones(size // FLOAT32_BYTES, device=device)
        self._target = torch.zeros_like(self._source)
        self._samples: list[float] = []
        self.sample()
        self._samples.clear()  # the first touched new memory

    def sample(self, copies: int = COPIES) -> None:
        start, end = clock.event(self.device), clock.event(self.device)
        start.record()
        for _ in range(copies):
            self._target.copy_(self._source)
        end.record()
        clock.wait_for(self.device)
        self._samples.append(start.elapsed_time(end) / 1e3 / copies)

    @property
    def gb_per_s(self) -> float:
        return 2 * self.bytes / statistics.median(self._samples) / 1e9


def copy_size(device: torch.device) -> int:
    """Bytes of a buffer to copy: 1 GiB, or less where memory is short; a GPU's cache is a small part of it."""
    wanted = 1 << 30 if device.type == "cuda" else 1 << 28
    free = clock.free_memory(device)
    return wanted if free is None else max(1 << 20, min(wanted, free // 8))


def _streaming_kernels(numel: int, threads: int, device: torch.device) -> tuple[str, Callable[[Mix], float]]:
    if device.type != "cpu":
        return _copy_estimate(numel, device)
    try:
        from fastsam.kernels.cpu import bandwidth
    except ImportError:
        return _copy_estimate(numel, device)
    return "plain loops of the cpu backend", lambda mix: bandwidth(
        mix.reads, mix.writes, numel, threads, in_place=mix.in_place
    )


def _copy_estimate(numel: int, device: torch.device) -> tuple[str, Callable[[Mix], float]]:
    copy = CopyBandwidth(device)

    def seconds(mix: Mix) -> float:
        copy.sample()
        return mix.bytes_per_parameter * numel / (copy.gb_per_s * 1e9)

    return f"torch copy_ of {copy.bytes >> 20} MiB, scaled by bytes", seconds
