"""A request to stop: what a signal does at which time. (Whole runs: `test_async`.)"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from slime.cluster.life.stop import REPEAT_S, Stop, Stopped


@pytest.fixture(autouse=True)
def sigint_is_not_ignored() -> Iterator[None]:
    """A shell starts a program in the background with SIGINT ignored, and `Stop` leaves it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_without_work_ends_at_once() -> None:
    stop = Stop()
    with stop.heeded(), pytest.raises(Stopped) as caught:
        signal.raise_signal(signal.SIGTERM)
    assert (stop.asked, caught.value.code) == (signal.SIGTERM, 143)


def test_a_signal_waits_for_the_save() -> None:
    stop = Stop()
    with stop.heeded():
        stop.hold()
        signal.raise_signal(signal.SIGINT)
        assert (stop.asked, stop.status) == (signal.SIGINT, 130)
        with pytest.raises(Stopped):
            stop.let_go("run/iter_0000003")
    assert stop.saved == "run/iter_0000003"


def test_a_save_without_a_signal_ends_nothing() -> None:
    stop = Stop()
    with stop.heeded():
        stop.hold()
        stop.let_go("run/iter_0000003")
        assert stop.asked is stop.saved is None
        with pytest.raises(Stopped):  # nothing waits any longer
            signal.raise_signal(signal.SIGINT)


def test_a_second_signal_ends_at_once() -> None:
    """One that is passed on within half a second, by a program such as `timeout`, is no second one."""
    stop = Stop()
    with stop.heeded():
        stop.hold()
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        time.sleep(REPEAT_S)
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
    assert stop.saved is None


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop = Stop()
        with stop.heeded():
            stop.install()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, "control"
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_end_with_the_run() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Stop().heeded():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
