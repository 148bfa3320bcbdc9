"""The inventory of a host with a real libvirtd and QEMUs of other people."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator

import pytest

from appliance.errors import UsageError
from appliance.hosts.inventory import Inventory, is_running
from appliance.hosts.targets import resolve
from appliance.model import Change, GuestState
from lab.libvirtd import Libvirtd
from lab.network import Network

pytestmark = pytest.mark.root("a libvirtd, network namespaces and taps")
MARK = "<p:guest xmlns:p='urn:parasight:domain:1' watch='no' tags='web,prod'/>"


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[Libvirtd]:
    with Network() as network, Libvirtd(network) as made:
        yield made


@pytest.fixture
def inventory(libvirtd, monkeypatch) -> Iterator[Inventory]:
    monkeypatch.setenv("PARASIGHT_LIBVIRT_URI", libvirtd.uri)
    with Inventory.of_this_host(events=True) as made:
        made.find_guests()
        yield made


@contextlib.contextmanager
def running(libvirtd, name, **more):
    """A domain that is started, and its UUID."""
    uuid = libvirtd.define_tiny(name, **more)
    libvirtd.virsh("start", name, "--paused")
    try:
        yield uuid
    finally:
        with contextlib.suppress(Exception):
            libvirtd.virsh("destroy", name)
        libvirtd.virsh("undefine", name)


def guests_of(inventory, uuid):
    return [guest for guest in inventory.find_guests() if guest.id.uuid == uuid]


def wait_for(condition):
    """Until it holds; this only ends a hang."""
    end = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def told(inventory, what, uuid):
    return any(change.what is what and change.uuid == uuid for change in inventory.wait(0.5))


def test_a_domain_and_its_process_are_one_guest(libvirtd, inventory) -> None:
    with running(libvirtd, "inv-1", metadata=MARK) as uuid:
        (guest,) = guests_of(inventory, uuid)
        pid = libvirtd.qemu_pid("inv-1")
        assert (guest.pid, guest.id.target, guest.id.name) == (pid, f"qemu:{pid}", "inv-1")
        assert (guest.state, guest.tags, guest.wanted) == (GuestState.PAUSED, ("web", "prod"), False)
        assert guest.routes == ("qemu", "libvirt")
        (port,) = guest.ports
        assert port.ifname.startswith("tap")
        assert f"mac address='{port.mac}'" in libvirtd.virsh("dumpxml", "inv-1")
        for word in ("inv-1", uuid, uuid.upper(), f"qemu:{pid}"):
            assert resolve(word, inventory).wanted is False
        libvirtd.virsh("resume", "inv-1")
        wait_for(lambda: told(inventory, Change.RESUMED, uuid))
        assert guests_of(inventory, uuid)[0].state is GuestState.RUNNING


def test_a_card_that_is_plugged_in_is_told_and_listed(libvirtd, inventory) -> None:
    with running(libvirtd, "inv-nic") as uuid:
        libvirtd.virsh("resume", "inv-nic")
        assert len(guests_of(inventory, uuid)[0].ports) == 1
        card = ("--target", "tapnic", "--mac", "52:54:00:00:00:77", "--model", "virtio", "--live")
        libvirtd.virsh("attach-interface", "inv-nic", "bridge", "br0", *card)
        wait_for(lambda: told(inventory, Change.DEVICES, uuid))
        ports = {port.ifname: port.mac for port in guests_of(inventory, uuid)[0].ports}
        assert len(ports) == 2
        assert ports["tapnic"] == "52:54:00:00:00:77"


def test_a_domain_that_is_off_is_known_by_name(libvirtd, inventory) -> None:
    with running(libvirtd, "inv-off") as uuid:
        libvirtd.virsh("destroy", "inv-off")
        for word in ("inv-off", uuid, uuid.upper()):
            with pytest.raises(UsageError, match="does not run; it is started by: virsh start"):
                resolve(word, inventory)
        with pytest.raises(UsageError, match="did you mean inv-off"):
            resolve("inv-of", inventory)


def test_another_life_is_another_instance_of_the_same_guest(libvirtd, inventory) -> None:
    with running(libvirtd, "inv-2") as uuid:
        (first,) = guests_of(inventory, uuid)
        libvirtd.virsh("destroy", "inv-2")
        wait_for(lambda: told(inventory, Change.ENDED, uuid))
        assert guests_of(inventory, uuid) == []
        assert not is_running(first)
        libvirtd.virsh("domrename", "inv-2", "inv-3")
        libvirtd.virsh("start", "inv-3", "--paused")
        wait_for(lambda: told(inventory, Change.STARTED, uuid))
        (second,) = guests_of(inventory, uuid)
        assert (second.id.name, second.pid) == ("inv-3", libvirtd.qemu_pid("inv-3"))
        assert second.id.instance != first.id.instance
        os.kill(second.pid, 9)
        wait_for(lambda: not is_running(second))
        assert guests_of(inventory, uuid) == []
        wait_for(lambda: told(inventory, Change.ENDED, uuid))
        libvirtd.virsh("domrename", "inv-3", "inv-2")


def test_a_machine_started_by_hand_with_a_domains_uuid_is_not_taken_for_it(libvirtd, inventory) -> None:
    with running(libvirtd, "inv-4", metadata=MARK) as uuid:
        words = ["-name", "inv-4", "-uuid", uuid, "-S", "-m", "16", "-nodefaults", "-display", "none"]
        by_hand = subprocess.Popen(["qemu-system-x86_64", "-accel", "tcg", *words])
        try:
            wait_for(lambda: len(guests_of(inventory, uuid)) == 2)
            wanted = {guest.pid: guest.wanted for guest in guests_of(inventory, uuid)}
            assert wanted == {by_hand.pid: None, libvirtd.qemu_pid("inv-4"): False}
            with pytest.raises(UsageError, match="several guests are called"):
                resolve(uuid, inventory)
        finally:
            by_hand.kill()
            by_hand.wait()


def test_a_daemon_that_is_stuck_or_restarted_takes_no_guest_away(libvirtd, inventory) -> None:
    with running(libvirtd, "inv-5", metadata=MARK) as uuid:
        before = guests_of(inventory, uuid)
        assert len(before) == 1
        with libvirtd.stuck():
            assert guests_of(inventory, uuid) == before
            assert not inventory.troubles  # it may only be slow
            wait_for(lambda: guests_of(inventory, uuid) == before and inventory.troubles)
            assert any("does not answer" in trouble for trouble in inventory.troubles)
            assert is_running(before[0])
        wait_for(lambda: guests_of(inventory, uuid) == before and not inventory.troubles)
        libvirtd.stop()
        wait_for(lambda: told(inventory, Change.DESCRIBED, None))
        assert guests_of(inventory, uuid) == before
        assert any("cannot be asked" in trouble for trouble in inventory.troubles)
        libvirtd.start()
        wait_for(lambda: guests_of(inventory, uuid) == before and not inventory.troubles)
        libvirtd.virsh("resume", "inv-5")
        wait_for(lambda: told(inventory, Change.RESUMED, uuid))
        assert guests_of(inventory, uuid)[0].state is GuestState.RUNNING


def test_whoever_is_listed_is_not_changed(libvirtd, inventory) -> None:
    with running(libvirtd, "inv-6", metadata=MARK) as uuid:
        before = [libvirtd.virsh("dumpxml", "inv-6"), libvirtd.virsh("dominfo", "inv-6")]
        for _ in range(3):
            assert len(guests_of(inventory, uuid)) == 1
        assert [libvirtd.virsh("dumpxml", "inv-6"), libvirtd.virsh("dominfo", "inv-6")] == before
