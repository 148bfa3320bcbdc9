"""The domains of a Xen host that is made up: its xenstored, and the libraries that ask its hypervisor."""

import os
import select
import socket
import subprocess
from pathlib import Path

import pytest

from appliance.errors import HostError
from appliance.hosts.netns import call_in
from appliance.hosts.xen import XenSource, is_running
from appliance.model import Change, GuestChange, GuestId, GuestInfo, GuestState
from tests.worlds.xenhost import UUID_TEXT, XenHost
from tests.worlds.xenstored import Xenstored, card, domain

MAC = "00:16:3e:77:00:0b"
OTHER = "11111111-2222-3333-4444-555555555555"
DOM0 = {"/local/domain/0/name": "Domain-0", "/local/domain/0/domid": "0"}
WEB = domain(7, UUID_TEXT, "web-01") | card(7, 0, MAC.upper(), vifname="lo")


@pytest.fixture
def daemon(tmp_path):
    made = Xenstored(tmp_path, DOM0 | WEB)
    yield made
    made.close()


@pytest.fixture
def host(tmp_path):
    return XenHost(tmp_path, low=16)


@pytest.fixture
def source(daemon, host):
    made = XenSource(daemon.path, libraries=host.folder)
    yield made
    made.close()
    made.close()


def one(source):
    (found,) = source.find_guests()
    return found


def wait_for(source, wanted):
    """Take changes until all that are wanted were told; every one."""
    told = []
    while not set(wanted) <= set(told):
        assert select.select([source.fileno()], [], [], 30)[0], f"only {told}"
        told += source.changes()
    return told


def quiet(source):
    while select.select([source.fileno()], [], [], 0.1)[0]:
        source.changes()


def test_a_domain_is_listed_with_its_identity_and_its_port(source):
    found = one(source)
    assert found.id == GuestId("xen:7", UUID_TEXT, "web-01", f"xen-{UUID_TEXT}-7")
    assert (found.domid, found.hypervisor, found.pid, found.state) == (7, "xen", None, GuestState.RUNNING)
    assert found.memory_bytes == 128 << 20 and found.routes[0] == "xen" and found.notes == ()
    assert [(port.ifname, port.mac, port.ifindex) for port in found.ports] == [("lo", MAC, socket.if_nametoindex("lo"))]


def test_our_own_domain_is_no_guest(daemon, source):
    daemon.write("/local/domain/7", None)
    assert source.find_guests() == []


def test_a_domain_is_listed_once_its_builder_is_done_with_it(daemon, source):
    memory = "/local/domain/7/memory/static-max"
    size = daemon.tree.pop(memory)
    daemon.building = {7}
    assert source.find_guests() == []
    daemon.tree[memory] = size
    daemon.building = set()
    assert one(source).memory_bytes == 128 << 20


@pytest.mark.parametrize(
    ("flags", "state"),
    [
        (1 << 3, GuestState.PAUSED),
        (1 << 2 | 3 << 16, GuestState.CRASHED),
        (1 << 2 | 4 << 16, GuestState.CRASHED),
        (1 << 2 | 2 << 16, GuestState.PAUSED),
        (1 << 2, GuestState.PAUSED),
        (1 << 4, GuestState.RUNNING),
    ],
    ids=["paused", "crashed", "watchdog", "suspended", "off", "blocked"],
)
def test_the_hypervisor_says_what_a_domain_does(source, host, flags, state):
    assert one(source).state is GuestState.RUNNING
    host.state.flags = flags
    assert one(source).state is state


def test_a_domain_that_is_being_migrated_to_here_is_incoming(daemon, source, host):
    host.state.flags = 1 << 3
    daemon.write("/local/domain/7/name", "web-01--incoming")
    found = one(source)
    assert (found.state, found.id.name) == (GuestState.INCOMING, "web-01")  # it will be called so in a moment


def test_where_watches_are_refused_no_descriptor_is_left_each_time(daemon, source):
    daemon.refused["/libxl"] = daemon.refused["@releaseDomain"] = "EACCES"
    source.find_guests()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        assert source.fileno() == -1
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def test_a_zombie_and_what_xenstore_has_left_of_a_domain_are_no_guests(source, host):
    host.state.dying = 1
    assert source.find_guests() == []
    host.state.dying = host.state.present = 0
    assert source.find_guests() == []


def test_a_paravirtual_domain_has_packets_only_and_says_why(daemon, source, host):
    host.state.hvm = 0
    daemon.tree["/libxl/7/type"] = "pv"
    found = one(source)
    assert found.routes == () and len(found.ports) == 1
    assert found.notes == ("paravirtual (PV): its memory cannot be read by this version; packets only",)


@pytest.mark.parametrize(("hvm", "has_route"), [(1, True), (0, False)])
def test_another_toolstack_than_xl_is_understood(daemon, source, host, hvm, has_route):
    """XAPI writes nothing below /libxl, and may leave out the memory."""
    daemon.write("/libxl", None)
    daemon.write("/local/domain/7/memory", None)
    host.state.hvm = hvm
    found = one(source)
    assert bool(found.routes) is has_route and found.memory_bytes is None
    assert [port.ifname for port in found.ports] == ["lo"]


def test_video_memory_is_none_of_the_guests_ram(daemon, source):
    daemon.tree["/local/domain/7/memory/videoram"] = "8192"
    assert one(source).memory_bytes == 120 << 20


def test_xenstore_alone_is_enough_to_list_domains(daemon, tmp_path):
    (tmp_path / "none").mkdir()
    source = XenSource(daemon.path, libraries=tmp_path / "none")
    daemon.tree |= domain(9, OTHER, "db-01", kind="pv")
    web, db = source.find_guests()
    assert (web.id.uuid, web.domid, db.id.uuid, db.domid) == (UUID_TEXT, 7, OTHER, 9)
    assert web.routes and not db.routes
    source.close()


def test_a_card_behind_a_driver_domain_is_named(daemon, source):
    daemon.tree |= domain(3, OTHER, "net-driver") | card(7, 1, "00:16:3e:00:00:02", backend=3)
    found = next(guest for guest in source.find_guests() if guest.domid == 7)
    assert [port.ifname for port in found.ports] == ["lo"]
    (note,) = found.notes
    assert "network card 1 (00:16:3e:00:00:02)" in note and "driver domain net-driver" in note


def test_a_card_without_an_interface_here_is_named(daemon, source):
    daemon.tree |= card(7, 2, "00:16:3e:00:00:03")
    (note,) = one(source).notes
    assert "has no interface vif7.2 here" in note


def test_what_the_guest_writes_of_its_cards_is_not_believed(daemon, source):
    before = one(source)
    daemon.tree["/local/domain/7/device/vif/0/backend"] = "/local/domain/3/backend/vif/7/0"
    daemon.tree["/local/domain/7/device/vif/0/mac"] = "00:00:00:00:00:01"
    daemon.tree["/local/domain/7/device/vif/1/backend"] = "/local/domain/0/backend/vif/8/0"
    assert one(source) == before


def test_a_device_that_is_handed_through_is_named(daemon, source):
    daemon.tree |= {
        "/local/domain/0/backend/pci/7/0/dev-0": "0000:ff:1f.7",
        "/local/domain/0/backend/pci/7/0/key-0": "x",
    }
    (note,) = one(source).notes
    assert "pci 0000:ff:1f.7" in note and "handed through" in note


@pytest.mark.root("makes a network namespace with interfaces in it")
def test_the_paravirtual_port_comes_first_and_the_emulated_one_after_it(daemon, source):
    namespace = f"xen-{os.getpid()}"
    del daemon.tree["/local/domain/0/backend/vif/7/0/vifname"]
    daemon.tree |= card(7, 1, "00:16:3e:00:00:02")
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    try:
        for name in ("vif7.1", "vif7.0-emu", "vif7.0"):
            subprocess.run(["ip", "-n", namespace, "link", "add", name, "type", "bridge"], check=True)
        found = call_in(f"/run/netns/{namespace}", lambda: one(source))
    finally:
        subprocess.run(["ip", "netns", "del", namespace], check=True)
    assert [port.ifname for port in found.ports] == ["vif7.0", "vif7.1", "vif7.0-emu"]
    assert [port.mac for port in found.ports] == [MAC, "00:16:3e:00:00:02", MAC]


def test_coming_going_renaming_and_plugging_are_told(daemon, source):
    assert source.fileno() >= 0
    source.find_guests()
    quiet(source)
    daemon.write("/local/domain/7/name", "web-02")
    assert wait_for(source, [GuestChange(Change.DESCRIBED, UUID_TEXT)]) and one(source).id.name == "web-02"
    daemon.write("/libxl/7/device/vif/1/backend", "/local/domain/0/backend/vif/7/1")
    wait_for(source, [GuestChange(Change.DEVICES, UUID_TEXT)])
    daemon.fire("@introduceDomain")
    wait_for(source, [GuestChange(Change.STARTED)])
    daemon.fire("@releaseDomain")
    wait_for(source, [GuestChange(Change.ENDED)])


def test_only_names_of_domains_that_are_here_are_watched(daemon, source):
    source.fileno()
    source.find_guests()
    names = {"/local/domain/7/name", "/local/domain/9/name"}
    daemon.tree |= domain(9, OTHER, "db-01")
    source.find_guests()
    assert daemon.watched() >= names and "/local/domain" not in daemon.watched()
    daemon.write("/local/domain/9", None)
    source.find_guests()
    assert daemon.watched() & names == {"/local/domain/7/name"}


def test_a_guest_that_toggles_its_cards_does_not_wake_us_for_it(daemon, source):
    source.fileno()
    source.find_guests()
    quiet(source)
    for state in "1234":
        daemon.write("/local/domain/0/backend/vif/7/0/state", state)
        daemon.write("/local/domain/7/device/vif/0/state", state)
    assert not select.select([source.fileno()], [], [], 0)[0]
    daemon.fire("@introduceDomain")
    assert set(wait_for(source, [GuestChange(Change.STARTED)])) == {GuestChange(Change.STARTED)}


def test_a_xenstored_that_was_away_is_asked_again(daemon, source):
    before = source.find_guests()
    source.fileno()
    quiet(source)
    daemon.restart()
    wait_for(source, [GuestChange(Change.DESCRIBED)])
    with pytest.raises(HostError, match="xenstored is gone"):
        source.find_guests()
    assert source.find_guests() == before
    quiet(source)
    daemon.fire("@releaseDomain")
    wait_for(source, [GuestChange(Change.ENDED)])


def test_watches_are_set_again_whoever_noticed_that_xenstored_was_away(daemon, source):
    source.find_guests()
    source.fileno()
    daemon.restart()
    daemon.tree |= domain(9, OTHER, "db-01")
    with pytest.raises(HostError):
        source.find_guests()
    assert len(source.find_guests()) == 1  # the second one is none of the hypervisor's
    quiet(source)
    assert source.fileno() >= 0
    source.find_guests()
    quiet(source)
    daemon.write("/local/domain/7/name", "web-02")
    wait_for(source, [GuestChange(Change.DESCRIBED, UUID_TEXT)])


def test_a_host_without_xenstored_is_an_error_and_nothing_to_wait_for(tmp_path):
    source = XenSource(str(tmp_path / "none"))
    assert source.fileno() == -1 and source.changes() == ()
    with pytest.raises(HostError, match="systemctl start xenstored"):
        source.find_guests()
    source.close()


def test_a_rebooted_domain_is_the_same_guest_in_another_life(daemon, source, host):
    before = one(source)
    daemon.write("/local/domain/7", None)
    daemon.tree |= domain(8, UUID_TEXT, "web-01")
    host.state.domid = 8
    after = one(source)
    assert after.id.uuid == before.id.uuid and after.id.instance != before.id.instance and after.domid == 8
    assert is_running(after, daemon.path, host.folder) and not is_running(before, daemon.path, host.folder)


def test_a_life_ends_with_its_domain_whoever_is_asked(daemon, source, host, tmp_path):
    found = one(source)
    (tmp_path / "none").mkdir()

    def answers():
        return is_running(found, daemon.path, host.folder), is_running(found, daemon.path, tmp_path / "none")

    assert answers() == (True, True)
    host.state.dying = 1
    assert answers() == (False, True)
    host.state.dying, host.state.uuid[0] = 0, host.state.uuid[0] ^ 1
    daemon.tree["/local/domain/7/vm"] = f"/vm/{OTHER}"
    assert answers() == (False, False)
    host.state.present = 0
    daemon.write("/local/domain/7", None)
    assert answers() == (False, False)
    assert not is_running(GuestInfo(GuestId("qemu:1"), pid=1))
