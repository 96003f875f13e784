"""Ctrl-C, and every other signal, between two things that must change together."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what is under ``signal``, whose functions take microseconds to make enums of handlers
import signal
import threading
from collections.abc import Callable
from typing import Any

_SIGNALS = sorted(map(int, signal.valid_signals()))

#: The handlers of all signals when they were last looked at, and those of them that are in Python, by number.
_seen: tuple[list[Any], list[tuple[int, Callable]]] = ([], [])


class uninterrupted:
    """Holds signals back for the milliseconds in which weights, backup and flags must change together.

    All that have a handler in Python, because any of these may raise: Ctrl-C's, an alarm's, or the one by which a
    DataLoader reports a dead worker. The handlers run when the block is left, however it is left. It is no generator
    and keeps what it found, because it is entered twice in every step.
    """

    __slots__ = ("_arrived", "_held")

    def __enter__(self) -> None:
        self._held: list[tuple[int, Callable]] = []  # number and handler of what is held back
        self._arrived: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread alone
            return
        note = self._arrived.__setitem__
        try:
            for pair in _in_python():
                self._held.append(pair)
                _signal.signal(pair[0], note)
        except BaseException:  # a signal that came before it could be held back
            self._release()
            raise

    def __exit__(self, *exception: object) -> None:
        self._release()

    def _release(self) -> None:
        try:
            _each(_signal.signal, self._held)
        finally:
            if self._arrived:
                _each(self._deliver, self._held)

    def _deliver(self, number: int, handler: Callable) -> None:
        if number in self._arrived:
            handler(number, self._arrived[number])


def _in_python() -> list[tuple[int, Callable]]:
    """Number and handler of every signal that has one in Python."""
    global _seen
    handlers = list(map(_signal.getsignal, _SIGNALS))
    if handlers != _seen[0]:
        _seen = handlers, [pair for pair in zip(_SIGNALS, handlers, strict=True) if callable(pair[1])]
    return _seen[1]


def _each(function: Callable, pairs: list[tuple[int, Callable]]) -> None:
    """Calls ``function`` with each of them, the last first, whatever another raises."""
    if not pairs:
        return
    try:
        function(*pairs[-1])
    finally:
        _each(function, pairs[:-1])
