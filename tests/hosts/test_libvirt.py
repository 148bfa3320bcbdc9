"""libvirt's own test drivers, and daemons that do not answer: no daemon is needed here."""

import contextlib
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from appliance.errors import HostError
from appliance.hosts.changes import EVERYTHING, Changes
from appliance.hosts.domains import LibvirtSource
from appliance.hosts.inventory import Inventory, is_running
from appliance.hosts.libvirt import chosen_uri
from appliance.model import Change, GuestChange, GuestId, GuestInfo, GuestState

libvirt = pytest.importorskip("libvirt")
NODE = "<domain type='test'><name>guest-{0}</name><uuid>00000000-0000-4000-8000-{0:012}</uuid>{1}</domain>"
BODY = "<memory>65536</memory><os><type arch='x86_64'>hvm</type></os>"
MARK = "urn:parasight:domain:1"


@pytest.fixture
def source() -> Iterator[LibvirtSource]:
    """The driver inside the library, whose one domain runs; all connections of this process see the same."""
    made = LibvirtSource("test:///default", events=True)
    yield made
    made.close()


@pytest.fixture
def domain(source):
    source.find_guests()  # the domains last as long as somebody is connected
    connection = libvirt.open("test:///default")
    yield connection.lookupByName("test")
    connection.close()


def told(source: LibvirtSource, what: Change) -> bool:
    """Whether libvirt tells of this change, told by then or not long after."""
    seen: list[Change] = []
    end = time.monotonic() + 20
    while what not in seen and time.monotonic() < end:
        select.select([source.fileno()], (), (), 0.2)
        seen += [change.what for change in source.changes()]
    return what in seen


def test_a_domain_is_listed_with_its_identity_and_size(source) -> None:
    (guest,) = source.find_guests()
    assert guest.id.name == "test"
    assert guest.id.target == guest.id.uuid
    assert guest.id.instance == f"libvirt-{guest.id.uuid}-1"
    assert (guest.state, guest.memory_bytes, guest.hypervisor) == (GuestState.RUNNING, 8 << 30, "qemu")
    assert guest.routes == ("libvirt",)


def test_what_happens_to_a_domain_is_told_and_its_state_follows(source, domain) -> None:
    domain.suspend()
    assert told(source, Change.PAUSED)
    assert source.find_guests()[0].state is GuestState.PAUSED
    domain.resume()
    assert told(source, Change.RESUMED)
    assert source.find_guests()[0].state is GuestState.RUNNING
    (before,) = source.find_guests()
    domain.destroy()
    assert told(source, Change.ENDED)
    assert source.find_guests() == []
    assert not source.is_running(before)
    assert source.find_off() == ["test", before.id.uuid]
    domain.create()
    assert told(source, Change.STARTED)
    (after,) = source.find_guests()
    assert after.id.uuid == before.id.uuid
    assert after.id.instance != before.id.instance
    assert source.is_running(after)
    assert not source.is_running(before)


def test_metadata_is_followed(source, domain) -> None:
    assert source.find_guests()[0].wanted is None
    kind, live = libvirt.VIR_DOMAIN_METADATA_ELEMENT, libvirt.VIR_DOMAIN_AFFECT_LIVE
    domain.setMetadata(kind, "<guest watch='no' tags='web,prod'/>", "parasight", MARK, live)
    assert told(source, Change.DESCRIBED)
    (guest,) = source.find_guests()
    assert (guest.wanted, guest.tags, source.troubles) == (False, ("web", "prod"), ())
    domain.setMetadata(kind, "<guest watch='perhaps'/>", "parasight", MARK, live)
    assert told(source, Change.DESCRIBED)
    assert source.find_guests()[0].wanted is None
    (trouble,) = source.troubles
    assert trouble.startswith("domain test: ")


def test_after_a_hundred_domains_there_is_each_of_them_once(tmp_path) -> None:
    node = tmp_path / "node.xml"
    node.write_text("<node>" + "".join(NODE.format(number, BODY) for number in range(100)) + "</node>")
    with Inventory([LibvirtSource(f"test://{node}")]) as inventory:
        names = sorted(guest.id.name for guest in inventory.find_guests())
        assert names == sorted(f"guest-{number}" for number in range(100))
        assert inventory.troubles == ()


def test_a_domain_whose_process_is_not_seen_is_listed_at_first_sight_and_later_once_it_has_settled(
    source, domain
) -> None:
    with Inventory([source]) as inventory:
        assert [guest.id.name for guest in inventory.find_guests()] == ["test"]
        domain.destroy()
        assert inventory.find_guests() == []
        domain.create()
        began = time.monotonic()
        assert inventory.find_guests() == []  # its process may be about to be seen
        while not inventory.find_guests():
            assert time.monotonic() < began + 60
            time.sleep(0.05)
        assert time.monotonic() >= began + 1


def test_without_events_there_is_nothing_to_wait_on() -> None:
    source = LibvirtSource("test:///default")
    assert source.fileno() == -1
    assert source.changes() == ()
    source.close()
    source.close()


def test_changes_that_nobody_takes_become_the_hint_that_all_may_have_changed() -> None:
    changes = Changes()
    for number in range(10_000):
        changes.tell(GuestChange(Change.PAUSED, str(number)))
    taken = changes.take()
    assert taken[0] == EVERYTHING
    assert len(taken) < 10_000
    assert changes.take() == ()
    changes.close()
    changes.tell(EVERYTHING)
    assert changes.take() == ()


def test_a_daemon_that_is_not_there_is_named_and_not_asked_at_every_turn(tmp_path) -> None:
    source = LibvirtSource(f"qemu+unix:///system?socket={tmp_path}/nobody")
    for _ in range(3):
        with pytest.raises(HostError, match="nobody"):
            source.find_guests()
    nobody = GuestInfo(GuestId("u", "u", "n", "libvirt-u-1"), hypervisor="qemu")
    assert source.is_running(nobody)  # nobody says that it has ended
    source.close()


def test_a_daemon_that_takes_calls_and_never_answers_holds_nobody_up(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("appliance.hosts.domains.PATIENCE_S", 1.0)
    path = tmp_path / "silent"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        stuck = LibvirtSource(f"qemu+unix:///system?socket={path}", events=True)
        other = LibvirtSource("test:///default")
        with Inventory([stuck, other]) as inventory:
            for _ in range(3):
                assert [guest.id.name for guest in inventory.find_guests()] == ["test"]
                (trouble,) = inventory.troubles
                assert "does not answer" in trouble


def test_where_no_libvirt_is_there_are_no_domains_and_no_trouble(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("PARASIGHT_LIBVIRT_URI", raising=False)
    monkeypatch.setattr("appliance.hosts.libvirt.SOCKETS", (tmp_path / "libvirt-sock",))
    assert chosen_uri() is None
    source = LibvirtSource()
    assert source.find_guests() == []
    assert source.find_off() == []
    source.close()


def test_a_process_that_listened_to_libvirt_ends_when_it_is_done() -> None:
    code = (
        "from appliance.hosts.domains import LibvirtSource\n"
        "source = LibvirtSource('test:///default', events=True)\n"
        "print(len(source.find_guests()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_a_libvirt_whose_socket_has_gone_takes_no_guest_away(monkeypatch) -> None:
    monkeypatch.setenv("PARASIGHT_LIBVIRT_URI", "test:///default")
    with Inventory([LibvirtSource()]) as inventory:
        before = inventory.find_guests()
        assert [guest.id.name for guest in before] == ["test"]
        monkeypatch.delenv("PARASIGHT_LIBVIRT_URI")
        monkeypatch.setattr("appliance.hosts.libvirt.SOCKETS", ())
        assert inventory.find_guests() == before
        assert "its socket is gone" in inventory.troubles[0]
        with contextlib.closing(LibvirtSource()) as asked:
            assert asked.is_running(before[0])


def test_threads_that_ask_at_once_get_the_answers_to_their_own_questions(monkeypatch) -> None:
    source = LibvirtSource("test:///default")
    monkeypatch.setattr("appliance.hosts.inventory._libvirt", lambda: source)
    (here,) = source.find_guests()
    gone = GuestInfo(GuestId("u", "11111111-2222-3333-4444-555555555555", "n", "libvirt-u-1"), hypervisor="qemu")
    wrong = []

    def ask(guest: GuestInfo, truth: bool) -> None:
        wrong.extend(1 for _ in range(300) if is_running(guest) is not truth)

    threads = [threading.Thread(target=ask, args=case) for case in [(here, True), (gone, False)] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    source.close()
    assert not wrong
