"""Ctrl-C, and every other signal, between two things that must change together."""

from __future__ import annotations

import _signal  # what is under ``signal``, whose functions take microseconds to make enums of handlers
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

_SIGNALS = sorted(map(int, signal.valid_signals()))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds signals back for the milliseconds in which weights, backup and flags must change together.

    All that have a handler in Python, because any of these may raise: Ctrl-C's, an alarm's, or the one by which a
    DataLoader reports a dead worker. The handlers run when the block is left, however it is left.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread alone
        yield
        return
    handlers = {number: handler for number in _SIGNALS if callable(handler := _signal.getsignal(number))}
    arrived = {}
    with contextlib.ExitStack() as afterwards:  # the last first, and each of them whatever another raises
        for number, handler in handlers.items():
            afterwards.callback(_deliver, arrived, number, handler)
        for number, handler in handlers.items():
            afterwards.callback(_signal.signal, number, handler)
            _signal.signal(number, arrived.__setitem__)
        yield


def _deliver(arrived: dict, number: int, handler: Callable) -> None:
    if number in arrived:
        handler(number, arrived[number])
