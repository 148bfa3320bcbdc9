"""A guest without a guest: its desk, and the thread that serves it."""

import threading
import time
from ipaddress import ip_address

from appliance.model import Act, Binding, Decision, GuestId, Match, Verdict
from appliance.respond import GuestStatus, HeldFlow, Mailbox
from tests.worlds.nouns import VM, Verbatim, flow

NOW_NS = 1_700_000_000_000_000_000
PATIENCE_S = 60.0  # what a condition may take on a busy machine


def eventually(condition, what=""):
    """Wait for a condition, generously; returns its value."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"in vain: {what or condition}"
        time.sleep(0.005)
    return value


class Clock:
    """A clock that is told the time."""

    def __init__(self, now_ns=NOW_NS):
        self.now_ns = now_ns

    def __call__(self):
        return self.now_ns

    def sleep(self, seconds):
        self.now_ns += round(seconds * 1e9)


def verdict(number=1, remote="203.0.113.9"):
    one = flow(number, remote=remote)
    judged = Verbatim(Decision.DENY).judge(None)
    return Verdict(one, Binding(Match.NONE, None, (), 1000), judged, NOW_NS)


class FakeDesk:
    """Keeps what it was told. ``kernel`` is what a kernel would hold: peer to seconds."""

    def __init__(self, vm: GuestId = VM):
        self.vm, self.mailbox = vm, Mailbox()
        self.waiting: list[HeldFlow] = []
        self.decided: list[tuple] = []
        self.acts: list[tuple] = []
        self.kernel: dict = {}
        self.orders = 0
        self.refuses: Exception | None = None
        self.threads: set[int] = set()

    def _enter(self):
        self.threads.add(threading.get_ident())
        if self.refuses is not None:
            raise self.refuses

    def hold(self, number, remote="203.0.113.9", until_ns=NOW_NS + 30 * 10**9):
        self.waiting.append(HeldFlow(verdict(number, remote), until_ns, Decision.DENY))
        return self.waiting[-1].verdict

    def status(self):
        self._enter()
        return GuestStatus("tc+ring", True, True, NOW_NS, flows=7, held=len(self.waiting), blocked=2)

    def held(self):
        self._enter()
        return tuple(self.waiting)

    def decide(self, flow_id, allow, who):
        self._enter()
        found = [one for one in self.waiting if one.verdict.flow.id == flow_id]
        self.waiting = [one for one in self.waiting if one not in found]
        self.decided += [(flow_id, allow, who)] * len(found)
        return bool(found)

    def act(self, flow_id, act: Act, who):
        self._enter()
        self.acts.append((flow_id, act, who))
        return flow_id.number < 100

    def ban(self, peer, seconds):
        self._enter()
        assert peer.network_address != ip_address("127.0.0.1")
        self.orders += 1
        self.kernel[peer] = seconds

    def unban(self, peer):
        self._enter()
        self.orders += 1
        return self.kernel.pop(peer, 0) != 0


class Serving:
    """The guest's thread: serves its mailbox until it is left."""

    def __init__(self, *desks):
        self._desks, self._stop = desks, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        while not self._stop.wait(0.002):
            for desk in self._desks:
                desk.mailbox.serve()
        for desk in self._desks:
            desk.mailbox.close()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self.thread.join(PATIENCE_S)
