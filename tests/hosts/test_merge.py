"""When a process and a domain are one guest."""

import os
import subprocess
from dataclasses import replace

import pytest

from appliance.hosts.arguments import parse_arguments
from appliance.hosts.domains import name_life
from appliance.hosts.merge import join, note_twins
from appliance.hosts.qemu import is_managed
from appliance.model import GuestId, GuestInfo, GuestPort, GuestState

UUID = "3d1f3c6a-5b5e-4c7a-9d53-0f3a5b6c7d8e"
KEY = "-object secret,id=masterKey0,file=/var/lib/libvirt/qemu/domain-{}-web/master-key.aes"


def process(pid: int, words: str = KEY.format(4), uuid: str = UUID, routes=("qemu",)):
    guest = GuestId(f"qemu:{pid}", uuid, "web", f"{pid}-99")
    return GuestInfo(guest, pid, routes=routes, hypervisor="qemu"), parse_arguments(["qemu", *words.split()])


def domain(life: int = 4, **more) -> GuestInfo:
    guest = GuestId(UUID, UUID, "web-1", name_life(UUID, life))
    return replace(GuestInfo(guest, routes=("libvirt",), hypervisor="qemu", tags=("web",), wanted=False), **more)


def test_a_domain_and_its_process_are_one_guest_with_what_both_know() -> None:
    guests, joined, alone = join([process(10)], [(domain(state=GuestState.PAUSED), {})])
    (guest,) = guests
    assert (guest.pid, guest.id.target, guest.id.instance, guest.id.name) == (10, "qemu:10", "10-99", "web-1")
    assert (guest.tags, guest.wanted, guest.state) == (("web",), False, GuestState.PAUSED)
    assert guest.routes == ("qemu", "libvirt")
    assert len(joined) == 1
    assert alone == []


def test_a_card_that_was_plugged_in_later_has_the_mac_that_libvirt_gave_it() -> None:
    info, arguments = process(10)
    held = replace(info, ports=(GuestPort("vnet0", "52:54:00:00:00:01"), GuestPort("vnet1")))
    (guest,), _, _ = join([(held, arguments)], [(domain(), {"vnet1": "52:54:00:00:00:02"})])
    assert [port.mac for port in guest.ports] == ["52:54:00:00:00:01", "52:54:00:00:00:02"]


def test_another_life_of_the_domain_is_not_its_process() -> None:
    guests, _, alone = join([process(10, KEY.format(3))], [(domain(4), {})])
    assert [guest.wanted for guest in guests] == [None]
    assert len(alone) == 1


def test_a_machine_started_by_hand_with_the_uuid_of_a_domain_is_not_taken_for_it() -> None:
    guests, _, _ = join([process(9, "-name web"), process(10)], [(domain(), {})])
    by_hand, real = note_twins(guests)
    assert (by_hand.pid, by_hand.wanted, by_hand.routes) == (9, None, ("qemu",))
    assert (real.pid, real.wanted) == (10, False)
    assert "qemu:10 has the same UUID" in by_hand.notes[-1]
    assert "qemu:9 has the same UUID" in real.notes[-1]


def test_where_two_processes_could_be_the_domain_none_is_taken_for_it() -> None:
    guests, joined, alone = join([process(9), process(10)], [(domain(), {})])
    assert [guest.wanted for guest in guests] == [None, None]
    assert (joined, len(alone)) == ([], 1)


def test_memory_that_libvirt_knows_to_be_encrypted_is_not_read_by_the_process_either() -> None:
    (guest,), _, _ = join([process(10)], [(domain(routes=(), notes=("its memory is encrypted",)), {})])
    assert (guest.routes, guest.notes) == ((), ("its memory is encrypted",))


def test_only_a_process_that_takes_over_a_state_is_incoming() -> None:
    arriving = domain(state=GuestState.INCOMING)
    (leaving,), _, _ = join([process(10)], [(arriving, {})])
    (coming,), _, _ = join([process(10, KEY.format(4) + " -incoming defer")], [(arriving, {})])
    assert (leaving.state, coming.state) == (GuestState.PAUSED, GuestState.INCOMING)


def test_machines_without_a_uuid_are_nobodys_twins() -> None:
    guests, _, _ = join([process(9, "-m 64", None), process(10, "-m 64", None)], [])
    assert [guest.notes for guest in note_twins(guests)] == [(), ()]


@pytest.mark.root("a process of another user")
def test_of_two_that_say_they_are_a_domains_the_one_is_that_runs_as_libvirt_runs_it(tmp_path) -> None:
    folder = tmp_path / "domain-4-web"
    folder.mkdir()
    (folder / "master-key.aes").touch()
    words = f"-object secret,id=masterKey0,file={folder}/master-key.aes"
    other = subprocess.Popen(["sleep", "60"], user=65534)
    try:
        both = [process(os.getpid(), words), process(other.pid, words)]
        guests, joined, alone = join(both, [(domain(), {})], is_managed)
        assert {guest.pid: guest.tags for guest in guests} == {os.getpid(): ("web",), other.pid: ()}
        assert (len(joined), alone) == (1, [])
    finally:
        other.kill()
        other.wait()
