"""Signals that arrive in a block that holds them back: none is lost, none runs in it, every handler comes back."""

import signal
import threading

import pytest

from fastsam.support.interrupts import uninterrupted

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no such signals on this system")


class Raised(Exception):
    pass


@pytest.fixture
def calls():
    """What the handlers of SIGALRM and SIGUSR1 were called with; both raise."""
    calls = []

    def handler(number, frame):
        calls.append((number, frame is not None))
        raise Raised(number)

    numbers = (signal.SIGALRM, signal.SIGUSR1)
    before = [signal.signal(number, handler) for number in numbers]
    yield calls
    for number, old in zip(numbers, before, strict=True):
        signal.signal(number, old)


def test_signals_wait_for_the_end_and_each_handler_runs_whatever_another_raises(calls):
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(Raised), uninterrupted():
        signal.raise_signal(signal.SIGALRM)
        signal.raise_signal(signal.SIGUSR1)
        assert calls == []
    assert sorted(calls) == [(signal.SIGUSR1, True), (signal.SIGALRM, True)]
    assert signal.getsignal(signal.SIGALRM) is signal.getsignal(signal.SIGUSR1) is handler


def test_an_exception_in_the_block_leaves_the_handlers_in_place(calls):
    handler = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(ZeroDivisionError), uninterrupted():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGUSR1) is handler
    with pytest.raises(Raised):
        signal.raise_signal(signal.SIGUSR1)


def test_a_signal_while_handlers_are_replaced_leaves_all_of_them_in_place(calls, monkeypatch):
    import _signal

    handler, real = signal.getsignal(signal.SIGUSR1), _signal.signal

    def signal_in_between(number, handler):
        if number == signal.SIGALRM:  # SIGUSR1, which is lower, is held back by now
            raise Raised(number)
        return real(number, handler)

    assert signal.SIGUSR1 < signal.SIGALRM
    with monkeypatch.context() as patch:
        patch.setattr(_signal, "signal", signal_in_between)
        with pytest.raises(Raised), uninterrupted():
            pytest.fail("the block was entered")
    assert signal.getsignal(signal.SIGUSR1) is handler


def test_a_handler_that_came_after_the_last_block_is_held_back(calls):
    with uninterrupted():
        pass
    late = []
    before = signal.signal(signal.SIGUSR2, lambda *_: late.append("run"))
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGUSR2)
            assert late == []
        assert late == ["run"]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_another_thread_has_nothing_to_hold_back(calls):
    seen = []

    def run():
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGUSR1)]
