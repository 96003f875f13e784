"""Ctrl-C and SIGTERM between two steps, and memory that runs out within one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import torch


class Interrupted(Exception):
    """The run was asked to stop, and was saved; ``signal`` is the number of what asked."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class OutOfMemory(RuntimeError):
    """A forward or backward pass found no memory; weights and optimizer are as before its step."""


class Stop:
    """``with Stop() as stop``: Ctrl-C and SIGTERM set ``stop.signal``, so that the step at hand can end.

    A second one acts at once, as it would without this. Outside the main thread it watches for nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> Stop:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame) -> None:
        self.signal = number
        self.__exit__()


@contextlib.contextmanager
def memory_watched(message: str = "{}") -> Iterator[None]:
    """Raises :class:`OutOfMemory` where the memory of any device runs out within the block.

    ``message`` has ``{}`` for what was asked for.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemory(message.format(str(error).split(". ")[0])) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # how torch says it for the CPU
            raise
        raise OutOfMemory(message.format(str(error).partition("can't allocate memory: ")[2])) from error


def what_to_lower(settings, step: int, error: OutOfMemory, saved: str, processes: int = 1) -> str:
    """The message for memory that ran out in the step after ``step``, of which ``saved`` says what there is."""
    size, parts = settings.batch_size // processes, settings.accumulate
    more = next((n for n in range(parts + 1, size + 1) if size % n == 0), None)
    ways = [] if settings.gradient_checkpointing else ["--gradient-checkpointing"]
    if more and not settings.perturb_parts:
        ways.insert(0, f"--accumulate {more}")
    same = f"with {' or '.join(ways)} the same run goes on from here in less memory; else " if ways else ""
    return (
        f"out of memory in step {step + 1}, with {size // parts} images at once ({error}). Nothing is lost, "
        f"{saved}: {same}start another with a smaller --batch-size"
        f"{' or --precision bf16' if settings.precision == 'fp32' else ''}"
    )
