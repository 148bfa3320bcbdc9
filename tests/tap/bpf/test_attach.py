"""Our filters beside foreign ones: attach, detach, crash."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.errors import HostError, UsageError
from appliance.flow.community import community_id
from appliance.model import FlowEnd, FlowEnded, FlowStarted, GuestPort
from appliance.tap.bpf import loader
from appliance.tap.bpf.attach import Attachment, ForeignIngress
from appliance.tap.bpf.journal import Journal, Note, Place, here
from appliance.tap.bpf.layout import Transport
from appliance.tap.bpf.leftovers import clean, list_ours
from appliance.tap.bpf.owner import Owner
from appliance.tap.bpf.tap import KernelTap
from appliance.tap.netns import call_in_netns
from tests.tap.bpf.both import VM, collect, drain, open_kernel, udp_talk
from tests.tap.world import GUEST_IP, HOST_IP, PORT, ip, make_world

POLL_S = 0.1

pytestmark = pytest.mark.root("network namespaces and bpf(2)")


@pytest.fixture
def world():
    with make_world("ka") as made:
        yield made


def tc(world, *words: str) -> str:
    command = ["ip", "netns", "exec", world.host, "tc", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def seen(world, port: str = PORT) -> str:
    shown = tc(world, "-j", "qdisc", "show", "dev", port) + "".join(
        tc(world, "-j", "filter", "show", "dev", port, hook) for hook in ("ingress", "egress")
    )
    return uncounted(shown)


def uncounted(shown: str) -> str:
    """Without the one figure of htb that counts packets."""
    return re.sub(r'(direct_packets_stat"?)[: ]\d+', r"\1", shown)


def lines(world) -> list[str]:
    shows = (("qdisc", "show", "dev", PORT), *(("filter", "show", "dev", PORT, hook) for hook in ("ingress", "egress")))
    return [line for show in shows for line in uncounted(tc(world, *show)).splitlines()]


def add_foreign(world) -> None:
    tc(world, "qdisc", "add", "dev", PORT, "root", "handle", "1:", "htb", "default", "1")
    tc(world, "class", "add", "dev", PORT, "parent", "1:", "classid", "1:1", "htb", "rate", "1gbit", "quantum", "60000")
    tc(world, "qdisc", "add", "dev", PORT, "clsact")
    for hook in ("ingress", "egress"):  # at our favourite place, and behind it
        place = ("filter", "add", "dev", PORT, hook, "protocol", "all", "pref")
        tc(world, *place, "1", "bpf", "bytecode", "1,6 0 0 0,", "flowid", "1:1")
        tc(world, *place, "9", "u32", "match", "u32", "0", "0", "flowid", "1:1")


@pytest.fixture(params=["bare", "foreign"])
def foreign(world, request) -> bool:
    if request.param == "foreign":
        add_foreign(world)
    return request.param == "foreign"


@contextlib.contextmanager
def loaded():
    made = loader.Loaded()
    try:
        yield made.programs
    finally:
        made.close()


def test_nothing_is_left_on_a_port_that_had_nothing(world) -> None:
    before = seen(world)
    tap = open_kernel(world)
    assert seen(world).count("parasight_tap") == 2
    assert tap.close() == []
    assert tap.close() == []
    assert seen(world) == before


def test_foreign_qdiscs_and_filters_survive_attach_and_detach(world, caplog) -> None:
    add_foreign(world)
    before, said = seen(world), lines(world)
    tap = open_kernel(world)
    assert "parasight_tap" in seen(world)
    assert all(line in lines(world) for line in said)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        f"filters of others run before ours on {hook} of port {PORT}" for hook in ("ingress", "egress")
    ]
    tap.close()
    assert seen(world) == before


def test_a_foreign_filter_on_our_own_qdisc_keeps_it(world) -> None:
    tap = open_kernel(world)
    words = ("protocol", "all", "pref", "9", "u32", "match", "u32", "0", "0", "flowid", "1:1")
    tc(world, "filter", "add", "dev", PORT, "ingress", *words)
    udp_talk(world, HOST_IP, from_guest=True)
    assert drain(tap)
    tap.close()
    assert "clsact" in seen(world)
    assert "u32" in seen(world)
    assert "parasight_tap" not in seen(world)


def test_a_foreign_ingress_qdisc_is_respected_and_the_remedy_named(world) -> None:
    tc(world, "qdisc", "add", "dev", PORT, "root", "handle", "1:", "htb", "default", "1")
    tc(world, "qdisc", "add", "dev", PORT, "ingress")
    words = ("protocol", "all", "pref", "49152", "u32", "match", "u32", "0", "0", "flowid", ":1")
    tc(world, "filter", "add", "dev", PORT, "ingress", *words)
    before = seen(world)
    with pytest.raises(ForeignIngress, match="can be observed, but not held") as caught:
        open_kernel(world)
    assert f"virsh domiftune DOMAIN {PORT} --outbound 0" in str(caught.value)
    assert isinstance(caught.value, HostError)
    assert seen(world) == before
    assert Journal().notes() == []


def test_an_attach_that_fails_half_way_leaves_nothing(world, foreign) -> None:
    before = seen(world)
    with loaded() as programs, pytest.raises(HostError, match="cannot"):
        Attachment(GuestPort(PORT, netns=world.host_path), programs["from_guest"], 9999)  # no such program
    assert seen(world) == before
    assert Journal().notes() == []


def test_where_one_port_of_a_guest_fails_the_others_are_left_as_they_were(world) -> None:
    before = seen(world)
    ports = [GuestPort(PORT, netns=world.host_path), GuestPort("nosuch", netns=world.host_path)]
    with pytest.raises(UsageError, match="there is no port nosuch"):
        KernelTap(VM, ports, time.time_ns, community_id=community_id)
    assert seen(world) == before
    assert Journal().notes() == []


def test_all_ports_of_a_guest_are_tapped_and_freed(world) -> None:
    ip("-n", world.host, "link", "add", "vnet1", "type", "veth", "peer", "name", "vnet1p")
    names = (PORT, "vnet1")
    before = [seen(world, name) for name in names]
    ports = [GuestPort(name, netns=world.host_path) for name in names]
    tap = KernelTap(VM, ports, time.time_ns, community_id=community_id)
    assert [seen(world, name).count("parasight_tap") for name in names] == [2, 2]
    tap.close()
    assert [seen(world, name) for name in names] == before


def test_a_journal_that_cannot_be_written_is_said_once_and_hinders_nothing(world, monkeypatch, caplog) -> None:
    monkeypatch.setenv("PARASIGHT_RUN_DIR", f"/proc/{os.getpid()}/nowhere")
    before = seen(world)
    for _ in range(2):
        tap = open_kernel(world)
        assert seen(world).count("parasight_tap") == 2
        tap.close()
        assert seen(world) == before
    (record,) = caplog.records
    assert "cannot be written" in record.getMessage()


def test_a_note_about_another_life_of_the_namespace_proves_nothing(world) -> None:
    """The inode number of a namespace is reused; a foreign qdisc there is no leftover of ours."""
    tc(world, "qdisc", "add", "dev", PORT, "clsact")
    before = seen(world)
    place = call_in_netns(world.host_path, lambda: here(socket.if_nametoindex(PORT)))
    journal = Journal()
    with journal.lock():
        assert journal.write(Note(replace(place, cookie=place.cookie + 1), PORT, Owner(1, 1, Owner.me().pid_ns)))
    assert clean(world.host_path) == []
    assert seen(world) == before
    assert journal.notes() == [], "a note on a namespace that is gone is forgotten"


def test_a_note_without_a_qdisc_is_forgotten_at_the_next_attach(world) -> None:
    place = call_in_netns(world.host_path, lambda: here(socket.if_nametoindex(PORT)))
    journal = Journal()
    with journal.lock():
        journal.write(Note(place, PORT, Owner(1, 1, Owner.me().pid_ns)))
    tc(world, "qdisc", "add", "dev", PORT, "ingress")
    with pytest.raises(ForeignIngress):
        open_kernel(world)
    assert journal.notes() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"pid": "x"}', b"9" * 10000])
def test_a_broken_note_is_no_note(run_dir, content) -> None:
    (run_dir / "ports").mkdir(parents=True)
    (run_dir / "ports" / "1-2").write_bytes(content)
    assert Journal().notes() == []
    assert Journal().read(Place(1, 0, 2)) is None


def talks(world) -> bool:
    try:
        udp_talk(world, HOST_IP, from_guest=True, timeout_s=0.5)
    except TimeoutError:
        return False
    return True


CRASH = """
import sys, time
from appliance.flow.community import community_id
from appliance.model import GuestId, GuestPort
from appliance.tap.bpf.tap import KernelTap
from ipaddress import ip_network
tap = KernelTap(GuestId("port:x"), [GuestPort(sys.argv[1], netns=sys.argv[2])], time.time_ns, community_id=community_id)
tap.ban(ip_network("10.77.0.1/32"))
print("ready", flush=True)
while True:
    tap.poll(0.05)
"""


def test_a_crash_lifts_bans_and_the_next_attach_clears_what_it_left(world) -> None:
    add_foreign(world)
    before = seen(world)
    command = [sys.executable, "-c", CRASH, PORT, world.host_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        with pytest.raises(TimeoutError):
            udp_talk(world, HOST_IP, from_guest=True, timeout_s=0.3)
        child.send_signal(signal.SIGKILL)
    assert "parasight_tap" in seen(world)
    deadline = time.monotonic() + 30
    while not talks(world):
        assert time.monotonic() < deadline
    tap = open_kernel(world)
    assert seen(world).count("parasight_tap") == 2
    udp_talk(world, GUEST_IP, from_guest=False)
    assert any(isinstance(event, FlowStarted) for event in drain(tap))
    tap.close()
    assert seen(world) == before


def test_what_a_crash_left_can_be_cleared_without_a_new_tap(world) -> None:
    before = seen(world)
    command = [sys.executable, "-c", CRASH, PORT, world.host_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        assert clean(world.host_path) == [], "its process lives"
        assert {one.owner.pid for one in list_ours(world.host_path)} == {child.pid}
        child.kill()
    assert [(one.what, one.hook) for one in clean(world.host_path)] == [
        ("filter", "ingress"), ("filter", "egress"), ("qdisc", "")
    ]  # fmt: skip
    assert clean(world.host_path) == list_ours(world.host_path) == []
    assert seen(world) == before


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_two_taps_on_one_port_do_not_disturb_each_other(world, foreign, first_leaves_first) -> None:
    before = seen(world)
    leaves, stays = [open_kernel(world) for _ in range(2)][:: 1 if first_leaves_first else -1]
    assert seen(world).count("parasight_tap") == 4
    for number, tap in enumerate((leaves, stays)):
        udp_talk(world, HOST_IP, from_guest=True, port=9000 + number)
        collect(tap, lambda events: any(isinstance(event, FlowStarted) for event in events), timeout_s=30)
    leaves.close()
    assert seen(world).count("parasight_tap") == 2
    drain(stays)
    udp_talk(world, HOST_IP, from_guest=True, port=9002)
    told = collect(stays, lambda events: any(isinstance(event, FlowStarted) for event in events), timeout_s=30)
    assert any(isinstance(event, FlowStarted) for event in told)
    stays.close()
    assert seen(world) == before, "the last one takes the qdisc along"
    assert Journal().notes() == []


def test_many_that_come_and_go_at_once_leave_the_port_as_it_was(world) -> None:
    before = seen(world)
    failures: list[BaseException] = []

    def come_and_go(programs) -> None:
        try:
            for _ in range(6):
                attached = Attachment(port, programs["from_guest"], programs["to_guest"])
                assert not attached.mend(), "nobody took it away"
                attached.detach()
        except BaseException as error:
            failures.append(error)

    port = GuestPort(PORT, netns=world.host_path)
    with loaded() as programs:
        threads = [threading.Thread(target=come_and_go, args=(programs,)) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert seen(world) == before
    assert Journal().notes() == []


def gone_within_2_s(tap) -> bool:
    """Whether the tap notices; its own looks are counted, not the time that a busy machine gives us."""
    collect(tap, lambda _: tap.exhausted, timeout_s=0)
    polls = 0
    while not tap.exhausted and polls < 2 / POLL_S:
        tap.poll(POLL_S)
        polls += 1
    return tap.exhausted


@pytest.mark.parametrize("transport", Transport)
@pytest.mark.parametrize("end", ["close", "abandon"])
def test_no_descriptor_is_left_of_a_tap(world, transport, end) -> None:
    counts = []
    for _ in range(3):
        tap = open_kernel(world, transport=transport)
        tap.poll(0)
        getattr(tap, end)()
        counts.append(len(list(Path("/proc/self/fd").iterdir())))
    assert counts[1:] == counts[:1] * 2


def test_a_port_that_disappears_ends_the_tap(world) -> None:
    tap = open_kernel(world)
    udp_talk(world, HOST_IP, from_guest=True)
    drain(tap)
    ip("-n", world.host, "link", "del", PORT)
    assert gone_within_2_s(tap)
    reasons = {event.reason for event in tap.close() if isinstance(event, FlowEnded)}
    assert reasons == {FlowEnd.GUEST_GONE}


def test_another_interface_under_the_same_name_is_not_taken_for_the_port(world) -> None:
    tap = open_kernel(world)
    ip("-n", world.host, "link", "del", PORT)
    ip("-n", world.host, "link", "add", PORT, "type", "veth", "peer", "name", "other")
    add_foreign(world)
    before = seen(world)
    assert gone_within_2_s(tap)
    tap.close()
    assert seen(world) == before


def test_a_port_that_moved_to_another_namespace_is_gone(world) -> None:
    tap = open_kernel(world)
    ip("-n", world.host, "link", "set", PORT, "netns", world.guest)
    assert gone_within_2_s(tap)
    tap.close()
    command = ["ip", "netns", "exec", world.guest, "tc", "qdisc", "show", "dev", PORT]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
    assert "clsact" not in shown, "the kernel took it off on the way"
    assert clean(world.host_path) == []


def test_a_port_that_was_renamed_is_still_the_port_and_is_freed(world) -> None:
    before = seen(world)
    tap = open_kernel(world)
    ip("-n", world.host, "link", "set", PORT, "down")
    ip("-n", world.host, "link", "set", PORT, "name", "renamed0")
    ip("-n", world.host, "link", "set", "renamed0", "up")
    assert not gone_within_2_s(tap), "its index is its identity"
    udp_talk(world, HOST_IP, from_guest=True, timeout_s=30)
    collect(tap, lambda events: any(isinstance(event, FlowStarted) for event in events), timeout_s=30)
    tap.close()
    assert seen(world, "renamed0") == before.replace(PORT, "renamed0")
    assert Journal().notes() == []


def test_a_namespace_that_lost_its_name_is_still_freed(world) -> None:
    tap = open_kernel(world)
    keep = os.open(world.host_path, os.O_RDONLY)
    ip("netns", "del", world.host)
    tap.close()
    assert list_ours(f"/proc/self/fd/{keep}") == []
    os.close(keep)
    assert Journal().notes() == []


def test_a_wrong_port_is_named(world) -> None:
    from tests.tap.bpf import both

    for changes, error, words in (
        ({"host": world.guest}, UsageError, "there is no port"),
        ({"host": "nosuch"}, UsageError, "cannot open network namespace"),
    ):
        with pytest.raises(error, match=words):
            both.open_kernel(replace(world, **changes))
