import struct

import pytest

from appliance.errors import UnsupportedGuest
from appliance.guest.windows.endpoints import Kind
from appliance.guest.windows.layouts import X64, X86, candidates
from appliance.model import Direction, Match, Reason
from tests.guest.windows.network import THEM, US, Eye, flow, row
from tests.worlds.windows import FAMILIES, Machine

EVERY = frozenset((Kind.TCP, Kind.LISTENER, Kind.UDP))
OWNERS = {"17763": 0x2C8, "19041": 0x2D8, "20348": 0x2F0, "26100": 0x328}


def populate(machine: Machine) -> None:
    for number, name in enumerate(("explorer.exe", "services.exe", "lsass.exe")):
        machine.tcp(machine[name], (US, 50000 + number), (THEM, 443))
    machine.listener(machine["services.exe"], ("0.0.0.0", 135))
    machine.udp(machine["explorer.exe"], ("0.0.0.0", 5353))


def move_owners(machine: Machine, to: int) -> None:
    """Let every connection hold its owner somewhere else."""
    at = machine.net.layout["_TCP_ENDPOINT.Owner"]
    for each in machine.truth().connections:
        if each.kind == "TcpE":
            owner = machine.kernel.u64(each.va + at)
            machine.kernel.set_u64(each.va + at, 0x1122_3344_5566)
            machine.kernel.set_u64(each.va + to, owner)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layout_is_verified_by_the_guest_itself(family):
    with Machine(family) as machine:
        populate(machine)
        eye = Eye(machine)
        eye.walk()
        measured = eye.sockets._measured
        assert measured is not None and measured.verified == EVERY and measured.doubts == ()
        assert measured.layout.tcp.owner == OWNERS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_connection_is_enough_to_find_where_owners_are(family):
    with Machine(family) as machine:
        machine.tcp(machine["lsass.exe"], (US, 50001), (THEM, 443))
        assert {row(socket)[4] for socket in Eye(machine).walk()} == {"lsass.exe"}


@pytest.mark.parametrize("build", [22621, 27000])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_build_that_nobody_has_described_is_measured(family, build):
    with Machine(family) as machine:
        populate(machine)
        eye = Eye(machine, build=build)
        assert {row(socket)[4] for socket in eye.walk()} == {"explorer.exe", "services.exe", "lsass.exe"}
        assert eye.sockets.layout.tcp.owner == OWNERS[family] and not eye.sockets.layout.known


def test_a_known_build_whose_owner_has_moved_is_read_where_it_has_moved_to():
    with Machine("20348") as machine:
        populate(machine)
        move_owners(machine, 0x1F8)
        eye = Eye(machine)
        assert {row(socket)[3:] for socket in eye.walk() if socket.remote} == {
            (f"{THEM}:443", name) for name in ("explorer.exe", "services.exe", "lsass.exe")
        }
        assert eye.sockets.layout.tcp.owner == 0x1F8


def test_where_two_places_could_be_the_owners_nobody_is_named():
    with Machine("26100") as machine:
        populate(machine)
        for each in machine.truth().connections:
            if each.kind == "TcpE":  # another process in each of them, too
                machine.kernel.set_u64(each.va + 0x1F8, machine["csrss.exe"].va)
        eye = Eye(machine)
        connections = [socket for socket in eye.walk() if socket.remote]
        assert len(connections) == 3 and not any(socket.owners for socket in connections)
        assert any("owner" in gap.why for gap in eye.sockets.walk().gaps)
        finding = eye.lookup.find(flow("tcp", (US, 50000)))
        assert (finding.match, finding.owners, finding.reason) == (Match.NONE, (), Reason.ORPHAN)
        assert finding.evidence[0].kind == "unverified-layout"


def test_two_places_that_agree_about_one_process_are_not_told_apart_by_it():
    with Machine("26100") as machine:
        explorer, services = machine["explorer.exe"], machine["services.exe"]
        made = machine.tcp(explorer, (US, 50000), (THEM, 443))
        machine.kernel.set_u64(made.va + 0x1F8, explorer.va)
        eye = Eye(machine)
        assert {row(socket)[4] for socket in eye.walk()} == {"-"}
        other = machine.tcp(services, (US, 50001), (THEM, 443))
        machine.kernel.set_u64(other.va + 0x1F8, explorer.va)  # whoever made it, say
        for _ in range(3):
            assert {row(socket)[4] for socket in eye.walk()} == {"-"}
        machine.kernel.set_u64(other.va + 0x1F8, 0x1234)
        names = [row(socket)[4] for _ in range(8) for socket in eye.walk()]
        assert set(names[-2:]) == {"explorer.exe", "services.exe"}


def test_in_a_known_build_another_process_in_a_connection_does_not_distract():
    with Machine("20348") as machine:
        populate(machine)
        for each in machine.truth().connections:
            if each.kind == "TcpE":
                machine.kernel.set_u64(each.va + 0x1F8, machine["csrss.exe"].va)
        names = {row(socket)[4] for socket in Eye(machine).walk() if socket.remote}
        assert names == {"explorer.exe", "services.exe", "lsass.exe"}


def test_an_unknown_build_without_connections_names_nobody_until_there_are_some():
    with Machine("26100") as machine:
        eye = Eye(machine)
        assert eye.walk() == [] and eye.sockets._measured is not None
        assert eye.sockets._measured.verified == frozenset()
        populate(machine)
        unowned = [eye.sockets.is_trusted(raw) for raw in eye.sockets.connections]
        assert not any(unowned)
        assert {row(socket)[4] for socket in eye.walk()} == {"explorer.exe", "services.exe", "lsass.exe"}


def test_an_unknown_build_is_measured_by_look_ups_too():
    with Machine("26100") as machine:
        eye, asked = Eye(machine), flow("tcp", (US, 50000))
        assert eye.lookup.find(asked).match is Match.NONE
        populate(machine)
        eye.now_ns += 10**9
        finding = eye.lookup.find(asked)
        assert finding.match is Match.EXACT and finding.owners[0].process.name == "explorer.exe"


def test_a_known_build_whose_only_connection_is_a_hidden_processes_is_told_with_it():
    with Machine("20348") as machine:
        ghost = machine.process("ghost.exe", hidden=True)
        machine.tcp(ghost, (US, 50001), (THEM, 443))
        assert {row(socket)[4] for socket in Eye(machine).walk()} == {"ghost.exe"}


@pytest.mark.parametrize("moved_by", [8, 16])
def test_what_is_bound_is_found_when_all_of_it_has_moved(moved_by):
    with Machine("20348") as machine:
        layout = machine.net.layout
        for name in ("_TCP_LISTENER", "_UDP_ENDPOINT"):
            for field in ("InetAF", "Owner", "CreateTime", "LocalAddr", "Port", "Next"):
                layout._moved[f"{name}.{field}"] = layout[f"{name}.{field}"] + moved_by
        machine.listener(machine["services.exe"], (US, 135))
        machine.udp(machine["explorer.exe"], ("0.0.0.0", 5353))
        assert Eye(machine, build=30000).rows() == {
            ("tcp", "LISTEN", f"{US}:135", "-", "services.exe"),
            ("udp", "CLOSE", "0.0.0.0:5353", "-", "explorer.exe"),
        }


def test_connections_that_fit_no_layout_are_refused_by_name():
    with Machine("20348") as machine:
        for number in range(10):
            made = machine.tcp(machine["explorer.exe"], (US, 50001 + number), (THEM, 443))
            machine.kernel.space.write(made.va + 0x58, b"\xaa" * 0x40)  # no state anywhere
        with pytest.raises(UnsupportedGuest, match="a layout of tcpip's connections for build 20348"):
            Eye(machine).walk()


def test_without_its_symbols_tcpip_is_refused_by_name():
    with Machine() as machine:
        populate(machine)
        eye = Eye(machine)
        eye.sockets._symbols = eye.kernel.types
        with pytest.raises(UnsupportedGuest, match="PartitionTable"):
            eye.sockets.walk()


def test_torn_connections_among_the_sound_ones_do_not_spoil_the_measuring():
    with Machine("26100") as machine:
        for number in range(40):
            made = machine.tcp(machine["explorer.exe"], (US, 50000 + number), (THEM, 443))
            if number in (7, 23):
                machine.kernel.space.write(made.va + 0x6C, struct.pack("<I", 0xDDDDDDDD))
        eye = Eye(machine)
        found = eye.walk()
        assert len(found) == 38 and {row(socket)[4] for socket in found} == {"explorer.exe"}


@pytest.mark.parametrize("family", ["17763", "20348"])
@pytest.mark.parametrize("lost", [[2], range(4)])
def test_a_table_that_is_gone_takes_nothing_with_it_that_another_one_has(family, lost):
    with Machine(family) as machine:
        eye = Eye(machine)
        for number in range(40):
            machine.tcp(machine["explorer.exe"], (US, 50000 + number), (THEM, 443))
        table = machine.kernel.u64(eye.sockets.symbol("PartitionTable"))
        stride = next(row.stride for row in X64 if row.first <= eye.kernel.build <= row.last)
        for number in lost:
            machine.kernel.set_u64(table + number * stride + 0x10, 0)
        found = eye.walk()
        assert len(found) == 40 and {row(socket)[4] for socket in found} == {"explorer.exe"}
        lacks = [gap.why for gap in eye.sockets.connections.gaps]
        assert f"{len(lost)} partitions lack a table" in lacks


@pytest.mark.parametrize("pointer", [8, 4])
@pytest.mark.parametrize(
    "build", [6000, 6002, 7601, 9200, 9600, 10240, 10586, 14393, 15063, 16299, 17134, 18363, 19045]
)
def test_every_build_from_vista_on_has_a_row_of_its_own(build, pointer):
    rows, known = candidates(build, pointer)
    assert rows[0].first <= build <= rows[0].last and rows[0].pointer == pointer
    assert known or build < 7000
    assert set(rows) == set(X64 if pointer == 8 else X86)


def test_builds_that_nobody_has_read_before_are_not_called_known():
    assert not any(candidates(build, 8)[1] for build in (22000, 22631, 26100, 28000))


def test_a_direction_is_no_part_of_a_layout():
    """An incoming flow of a machine that has not been measured yet measures it, too."""
    with Machine("26100") as machine:
        machine.listener(machine["services.exe"], ("0.0.0.0", 135))
        finding = Eye(machine).lookup.find(flow("tcp", (US, 135), direction=Direction.IN))
        assert finding.match is Match.LISTENER and finding.owners[0].process.name == "services.exe"
