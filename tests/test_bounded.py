"""Calls that may hang: each gets its own answer, or none."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from appliance.bounded import Worker
from appliance.errors import HostError


class StoppedError(Exception):
    """What a signal handler of the test raises."""


@pytest.fixture
def worker():
    made = Worker("test")
    yield made
    made.end(lambda: None)
    assert not made.runs


def test_each_of_several_threads_gets_its_own_answer(worker):
    def ask(number):
        return all(worker.run(partial(tuple, (number, turn)), 60) == (number, turn) for turn in range(500))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(4)))


def test_a_call_that_was_given_up_is_no_answer_to_the_next_one(worker):
    gate = threading.Event()
    with pytest.raises(TimeoutError):
        worker.run(lambda: gate.wait() and "first", 0.05)
    with pytest.raises(TimeoutError):  # at once: the first one is still out
        worker.run(lambda: "second", 1e6)
    gate.set()
    assert eventually(lambda: worker.run(lambda: "third", 60)) == "third"


def test_an_interrupted_call_is_no_answer_to_the_next_one(worker):
    def interrupt(*_):
        raise StoppedError

    before = signal.signal(signal.SIGUSR1, interrupt)
    gate = threading.Event()
    try:
        with pytest.raises(StoppedError):
            worker.run(lambda: (signal.pthread_kill(main, signal.SIGUSR1), gate.wait(), "first")[2], 60)
    finally:
        signal.signal(signal.SIGUSR1, before)
    gate.set()
    assert eventually(lambda: worker.run(lambda: "second", 60)) == "second"


def test_what_a_call_raises_is_raised_to_whoever_asked(worker):
    with pytest.raises(ZeroDivisionError):
        worker.run(lambda: 1 // 0, 60)
    assert worker.run(lambda: 5, 60) == 5


def test_an_ended_one_does_nothing_more(worker):
    worker.end(lambda: None)
    with pytest.raises(HostError, match="closed"):
        worker.run(lambda: 5, 60)


main = threading.main_thread().ident


def eventually(call):
    """The result of a call as soon as the one before it has come back."""
    for _ in range(10_000):
        try:
            return call()
        except TimeoutError:
            threading.Event().wait(0.005)
    raise AssertionError("it never came back")
