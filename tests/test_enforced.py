"""Rules, engine, watch and the tap in the kernel together, on real traffic; only the guest's memory is played."""

import contextlib
import errno
import socket
import subprocess
import threading
import time
from dataclasses import replace

import pytest

from appliance.engine import Engine
from appliance.messages import Decided, SnapshotTaken
from appliance.model import Act, Finding, GuestInfo, GuestPort, Match, Snapshot
from appliance.rules import load_text
from appliance.watch import GuestWatch
from tests.rules.builders import HEAD
from tests.tap.bpf.both import wait_for
from tests.tap.bpf.lan import VM, make_lan
from tests.worlds.nouns import NoNames, owner

pytestmark = pytest.mark.root("network namespaces and bpf(2)")

V4, V6 = socket.AF_INET, socket.AF_INET6
HONEST, FOREIGN, NOBODY = 8001, 8002, 8003  # ports of the server that our processes call
RULES = """
spec:
  mode: enforce
  hold: {deadline: 2s, default: %s, ask: 1h}
  processes:
    - name: nginx
      match: {image: /usr/sbin/nginx}
      default: deny
      on_deny: [alert, %s]
      allow: [{direction: out, ports: 8001}, {direction: in}]
  unbound: {action: %s}
"""


class Eye:
    """Everything is nginx's, but what goes to one port."""

    os, live, describe = "linux", True, "played"

    def read_snapshot(self):
        return Snapshot(0, (), ())

    def find_owner(self, flow):
        return Finding(Match.NONE) if flow.tuple.remote.port == NOBODY else Finding(Match.EXACT, (owner(),))

    def find_foreign(self, process):
        return ()

    def read_pulse(self):
        return time.monotonic_ns()

    def close(self):
        pass


class Enforced:
    """A watch in a thread of its own, as the daemon runs it."""

    def __init__(self, lan, action="block", unbound="deny", deadline_s=300, *, fail_closed=False):
        book = load_text(HEAD + RULES % (unbound, action, unbound))
        self.reports, self._orders, self._stop = [], [], False
        self._holds = threading.Event()
        self.tap = tap = lan.open_tap(fail_closed=fail_closed, patience_s=1.5 if fail_closed else 60)
        policy = replace(book.hold_policy(), deadline_s=deadline_s)  # a busy machine is slow
        info = GuestInfo(VM, 1, ports=(GuestPort(lan.guest.port),))
        self.engine = Engine(book, NoNames(), hold=policy)
        report, clock = self.reports.append, time.time_ns
        more = {"hand": tap, "hold": policy, "abandon": tap.abandon if fail_closed else None}
        self.watch = GuestWatch(info, tap, Eye(), self.engine, report, clock, **more)
        self._thread = threading.Thread(target=self.watch.run, args=(self._stopping,))

    def _stopping(self):
        self._holds.set()  # it is asked for the first time when new flows are held already
        while self._orders:
            self.watch.take(self._orders.pop(0))
        return self._stop

    def order(self, event):
        self._orders.append(event)

    def acts_on(self, port):
        return [v.handling.act for v in self.reports if v.handling and v.flow.tuple.remote.port == port]

    def __enter__(self):
        self._thread.start()
        assert self._holds.wait(60)
        return self

    def __exit__(self, *_):
        self._stop = True
        self._thread.join()


@pytest.fixture(scope="module")
def lan():
    with make_lan("en") as made:
        yield made


@contextlib.contextmanager
def serving(lan, family, *ports):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(lan.server.listen(family, port)) for port in ports]


def call(lan, family, port):
    with lan.guest.socket(family, socket.SOCK_STREAM) as caller:
        return caller.connect_ex((lan.server.address(family), port))


def heard(listener):
    """Whether anybody has connected."""
    listener.settimeout(0)
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


@pytest.mark.parametrize("family", [V4, V6], ids=["v4", "v6"])
def test_the_denied_connection_never_arrives_and_the_allowed_one_does_not_notice(lan, family):
    with serving(lan, family, HONEST, FOREIGN) as (honest, foreign), Enforced(lan) as enforced:
        assert call(lan, family, HONEST) == 0
        assert call(lan, family, FOREIGN) != 0
        assert heard(honest)
        assert not heard(foreign)
        wait_for(lambda: enforced.acts_on(HONEST))
    assert set(enforced.acts_on(FOREIGN)) == {Act.BLOCK}
    assert Act.RELEASE in enforced.acts_on(HONEST)
    assert not enforced.watch.summary.ended
    assert not enforced.watch.summary.acts_failed


def test_a_connection_of_nobody_is_let_go_or_refused_at_the_deadline_as_the_rules_say(lan):
    for unbound, acts in (("allow", {Act.RELEASE}), ("deny", {Act.BLOCK, Act.RESET})):  # RESET: we were late
        with serving(lan, V4, NOBODY), Enforced(lan, unbound=unbound, deadline_s=2) as enforced:
            began_s = time.monotonic()
            assert (call(lan, V4, NOBODY) == 0) is (unbound == "allow")
            assert time.monotonic() - began_s > 1.9
            wait_for(lambda e=enforced: e.acts_on(NOBODY))
        assert set(enforced.acts_on(NOBODY)) <= acts


@pytest.mark.parametrize("allow", [True, False])
def test_a_person_decides_and_the_caller_gets_through_or_not(lan, allow):
    answers = []
    with serving(lan, V4, FOREIGN), Enforced(lan, "hold") as enforced:
        caller = threading.Thread(target=lambda: answers.append(call(lan, V4, FOREIGN)))
        caller.start()
        (waiting,) = wait_for(lambda: list(enforced.engine.waiting))
        assert caller.is_alive()
        enforced.order(Decided(waiting, allow, "anna", time.time_ns()))
        caller.join(60)
        wait_for(lambda: len(enforced.reports) == 2)
    assert (answers[0] == 0) is allow
    assert enforced.acts_on(FOREIGN) == [Act.HOLD, Act.RELEASE if allow else Act.BLOCK]


def test_an_error_of_ours_leaves_the_network_closed_where_the_operator_wants_that(lan):
    with Enforced(lan, fail_closed=True) as enforced:
        assert reaches(lan)
        enforced.order(SnapshotTaken(None))  # a defect
        wait_for(lambda: enforced.watch.summary.ended)
        wait_for(lambda: not reaches(lan))
    enforced.tap.close()  # at the end of the program
    assert not reaches(lan)
    clean = ["tc", "-n", lan.bridge, "qdisc", "del", "dev", lan.guest.port, "clsact"]  # as stop --clean does
    subprocess.run(clean, check=True, timeout=10)
    assert reaches(lan)


def reaches(lan):
    """Whether the server's kernel hears of it: nobody listens there, so it says no, which no backlog can prevent."""
    with lan.guest.socket(V4, socket.SOCK_STREAM, timeout_s=2) as caller:
        return caller.connect_ex((lan.server.address(V4), HONEST)) == errno.ECONNREFUSED
