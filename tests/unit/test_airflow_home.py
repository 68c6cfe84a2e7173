"""The private Airflow: an interrupt gets out of a loop that swallows it."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from jobs.airflow_home import stoppable


def stubborn(number: signal.Signals) -> None:
    """Takes three interrupts for failed tasks, as Airflow does, and waits for a retry."""
    swallowed = 0
    while True:
        try:
            if not swallowed:
                os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt:
            swallowed += 1
            if swallowed > 3:
                raise


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_repeated_until_it_gets_out(number: signal.Signals) -> None:
    before, began = signal.getsignal(number), time.monotonic()
    with pytest.raises(KeyboardInterrupt), stoppable(0.05):
        stubborn(number)
    assert 0.1 < time.monotonic() - began < 5
    assert signal.getsignal(number) is before


def test_an_interrupt_that_was_swallowed_for_good_comes_out_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), stoppable(), contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_without_an_interrupt_nothing_is_left_behind() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stoppable():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
