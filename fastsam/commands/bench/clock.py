"""Time and memory of what runs on a device: a CPU, or a GPU that runs after the host."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from fastsam.support.memory import free_memory

LEAST_ROUNDS = 3  # these are taken even when the time is over
FAILED = "failed:"  # how a note begins that no plan foresees

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class HostEvent:
    """The part of ``torch.cuda.Event`` used here, for devices that are done when the call returns."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, later: HostEvent) -> float:
        """Milliseconds, as CUDA's events give them."""
        return (later.seconds - self.seconds) * 1e3


def event(device: torch.device):
    """A mark in the device's own order of work."""
    return torch.cuda.Event(enable_timing=True) if device.type == "cuda" else HostEvent()


def wait_for(device: torch.device) -> None:
    """Returns when the device has finished all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(samples: Iterable[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, none of them outside the samples, of which there is at least one."""
    taken = list(samples)
    if len(taken) == 1:
        return taken[0], taken[0], taken[0]
    lower, median, upper = statistics.quantiles(taken, n=4, method="inclusive")
    return lower, median, upper


class Deadline:
    """A moment to stop at; parts of a run get their shares of what is left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def share(self, fraction: float) -> Deadline:
        return Deadline(self.left * fraction)


def in_rounds(
    names: Iterable[str], repeats: int, deadline: Deadline, take_turns: Callable[[int, list[str]], None]
) -> None:
    """Calls ``take_turns(number, names)`` for each round, with the names in another order each time.

    Python's garbage collector waits meanwhile. Past the deadline ``LEAST_ROUNDS`` are enough.
    """
    order, shuffle = list(names), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for number in range(repeats):
            shuffle(order)
            take_turns(number, order)
            if deadline.left < 0 and number + 1 >= LEAST_ROUNDS:
                break
    finally:
        gc.enable()


class PeakMemory:
    """``with PeakMemory(device) as peak: ...``; afterwards ``peak.mib`` is how much more memory the body held at once.

    On the CPU that is resident memory, and None where the system does not tell; on a GPU torch's allocator.
    """

    mib: float | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            wait_for(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before: int | None = torch.cuda.memory_allocated(self.device)
        else:
            with contextlib.suppress(OSError, AttributeError):  # only glibc can be asked
                ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there for the body to take
            with contextlib.suppress(OSError):
                _CLEAR.write_text("5")  # Linux forgets the highest mark so far
            self.before = _status("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            wait_for(self.device)
            after: int | None = torch.cuda.max_memory_allocated(self.device)
        else:
            after = _status("VmHWM")
        if self.before is not None and after is not None:
            self.mib = round(max(0, after - self.before) / 2**20, 1)


def groups_that_fit(needs: dict[str, int], shared: int, device: torch.device) -> tuple[list[list[str]], dict[str, str]]:
    """The names of ``needs`` (bytes each) in groups that fit beside ``shared`` bytes, and a note for one that does not.

    Where the system does not tell how much is free, one group of all.
    """
    free = free_memory(device)
    if free is None:
        return [list(needs)], {}
    groups: list[list[str]] = []
    notes: dict[str, str] = {}
    taken = free
    for name, need in needs.items():
        if shared + need > free:
            notes[name] = f"does not fit: needs about {(shared + need) / 2**30:.1f} of {free / 2**30:.1f} GiB"
            continue
        if shared + taken + need > free:
            groups.append([])
            taken = 0
        groups[-1].append(name)
        taken += need
    return groups, notes


class OutOfMemory(Exception):
    """The device had no memory for it; the message fits a table."""


@contextlib.contextmanager
def out_of_memory() -> Iterator[None]:
    """Turns torch's errors about memory into ``OutOfMemory``, whichever device they come from."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise OutOfMemory("out of memory") from None
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "not enough memory" in str(error):
            raise OutOfMemory("out of memory") from None
        raise


def failure(error: Exception) -> str:
    """A line that fits a table; the whole of it goes to standard error."""
    traceback.print_exception(error)
    return f"{FAILED} {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"


def _status(key: str) -> int | None:
    """Bytes of one line of /proc/self/status."""
    with contextlib.suppress(OSError, StopIteration):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key + ":"))
        return int(line.split()[1]) * 1024
    return None
