"""The floor of a step: the bytes its passes must move, and the time this machine's memory takes for them.

A pass is a mix of arrays read and arrays written. Bytes for each float32 parameter:

| pass | reads | writes | bytes |
|---|---|---|---|
| gram: SAM | g | | 4 |
| gram: F-SAM, Eigen-SAM | g, m or v | | 8 |
| climb: SAM | g, w | w, b | 16 |
| climb: F-SAM | g, m, w | m, w, b | 24 |
| climb: Eigen-SAM | g, v, w | w, b | 20 |
| guard: every method | g | | 4 |
| descend: SGD with momentum | b, g, momentum | w, momentum | 20 |
| descend: AdamW | b, g, exp_avg, exp_avg_sq | w, exp_avg, exp_avg_sq | 28 |

b is the backup of the weights. The guard reads the second gradient before anything is written, so that a NaN
or an infinity there changes neither weights nor state.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

FLOAT32_BYTES = 4


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
_GRAM_AND_CLIMB = {
    "sam": (Mix(1, 0, 0), Mix(2, 2, 1)),
    "fsam": (Mix(2, 0, 0), Mix(3, 3, 2)),
    "eigensam": (Mix(2, 0, 0), Mix(3, 2, 1)),
}


def passes(method: str, base: str) -> dict[str, Mix]:
    """The four passes of one step of ``method`` over ``base``, in order: gram, climb, guard, descend."""
    gram, climb = _GRAM_AND_CLIMB[method]
    return {"gram": gram, "climb": climb, "guard": _GUARD, "descend": _DESCEND[base]}


def bytes_per_parameter(method: str, base: str) -> int:
    """The least bytes a step can move for each float32 parameter."""
    return sum(each.bytes_per_parameter for each in passes(method, base).values())


class Bandwidth:
    """Times plain streaming kernels of given mixes over arrays of ``numel`` float32, sample by sample.

    ``sample()`` takes one timing of every mix, so that a caller can spread the samples over its own
    measurements and meet the same disturbances; ``seconds(mix)`` is the median so far. ``source`` says what
    the kernels are: fastsam's plain loops, which write new arrays past the caches, or torch's ``copy_``
    scaled by bytes where those were not built.
    """

    def __init__(self, mixes: Iterable[Mix], numel: int, threads: int) -> None:
        self.source, self._time = _streaming_kernels(numel, threads)
        self._samples: dict[Mix, list[float]] = {mix: [] for mix in sorted(set(mixes))}

    def sample(self) -> None:
        for mix, taken in self._samples.items():
            taken.append(self._time(mix))

    def seconds(self, mix: Mix) -> float:
        return statistics.median(self._samples[mix])


def _streaming_kernels(numel: int, threads: int) -> tuple[str, Callable[[Mix], float]]:
    try:
        from fastsam.kernels.cpu import bandwidth
    except ImportError:
        return "torch copy_, scaled by bytes", _copy_estimate(numel)
    return "plain loops of the cpu backend", lambda mix: bandwidth(
        mix.reads, mix.writes, numel, threads, in_place=mix.in_place
    )


def _copy_estimate(numel: int) -> Callable[[Mix], float]:
    source, target = torch.ones(numel), torch.ones(numel)

    def seconds(mix: Mix) -> float:
        start = time.perf_counter()
        target.copy_(source)
        return (time.perf_counter() - start) * (mix.reads + mix.writes) / 2

    return seconds
