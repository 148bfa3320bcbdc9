"""Jobs for a guest's thread: run there, once, in order; nobody waits for ever."""

import threading
from concurrent.futures import wait

import pytest

from appliance.errors import GuestGone, UsageError
from appliance.respond import Mailbox, NoAnswer
from tests.respond.desks import PATIENCE_S, FakeDesk, Serving


def test_a_job_runs_in_the_guests_thread_and_its_result_comes_back():
    desk = FakeDesk()
    with Serving(desk) as serving:
        assert desk.mailbox.call(threading.get_ident, PATIENCE_S) == serving.thread.ident


def test_what_a_job_raises_goes_to_who_asked_and_the_guests_thread_goes_on():
    desk = FakeDesk()

    def fail():
        raise UsageError("no such thing")

    def break_down():
        raise ZeroDivisionError

    with Serving(desk):
        with pytest.raises(UsageError, match="no such thing"):
            desk.mailbox.call(fail, PATIENCE_S)
        with pytest.raises(ZeroDivisionError):
            desk.mailbox.call(break_down, PATIENCE_S)
        assert desk.mailbox.call(lambda: 3, PATIENCE_S) == 3


def test_a_job_that_was_given_up_is_never_run():
    mailbox, ran = Mailbox(), []
    with pytest.raises(NoAnswer, match="nothing was done"):
        mailbox.call(lambda: ran.append(1), 0.01)
    assert mailbox.serve() == 0
    assert not ran


def test_a_job_under_way_is_not_called_undone():
    mailbox, begun, go = Mailbox(), threading.Event(), threading.Event()

    def slow():
        begun.set()
        go.wait(PATIENCE_S)

    first = mailbox.post(slow)
    guest = threading.Thread(target=mailbox.serve)
    guest.start()
    assert begun.wait(PATIENCE_S)
    assert not first.cancel()
    go.set()
    guest.join(PATIENCE_S)
    assert first.done()


def test_jobs_run_in_their_order_a_few_at_a_time():
    mailbox, ran = Mailbox(), []
    for number in range(10):
        mailbox.post(lambda number=number: ran.append(number))
    assert [mailbox.serve(4), mailbox.serve(4), mailbox.serve(4)] == [4, 4, 2]
    assert ran == list(range(10))


def test_a_full_mailbox_refuses_and_jobs_given_up_make_room():
    mailbox = Mailbox(limit=2)
    futures = [mailbox.post(lambda: None) for _ in range(2)]
    with pytest.raises(NoAnswer, match="2 requests wait"):
        mailbox.post(lambda: None)
    futures[0].cancel()
    mailbox.post(lambda: None)
    assert mailbox.serve() == 2


def test_when_the_guest_is_gone_those_who_wait_and_those_who_come_are_told():
    mailbox = Mailbox()
    waiting = mailbox.post(lambda: None)
    mailbox.close("the guest has ended")
    mailbox.close("again")
    with pytest.raises(GuestGone, match="the guest has ended"):
        waiting.result(PATIENCE_S)
    with pytest.raises(GuestGone, match="the guest has ended"):
        mailbox.post(lambda: None)


def test_many_threads_get_each_its_own_result():
    desk, results = FakeDesk(), {}

    def ask(number):
        results[number] = desk.mailbox.call(lambda: number * number, PATIENCE_S)

    with Serving(desk):
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert results == {number: number * number for number in range(40)}


def test_closing_while_many_ask_leaves_nobody_waiting():
    mailbox, futures, stop = Mailbox(), [], threading.Event()

    def ask():
        try:
            while not stop.is_set():
                futures.append(mailbox.post(lambda: 1))
        except (GuestGone, NoAnswer):
            pass

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    mailbox.serve(50)
    mailbox.close()
    stop.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not wait(futures, PATIENCE_S).not_done
