import struct

import pytest

from appliance.model import Transport
from tests.guest.windows.network import THEM, US, Eye, Meddled, row
from tests.worlds.windows import FAMILIES, Machine


@pytest.mark.parametrize("family", FAMILIES)
def test_listeners_and_udp_sockets_are_told_with_their_addresses_and_owners(family):
    with Machine(family) as machine:
        explorer, services = machine["explorer.exe"], machine["services.exe"]
        machine.listener(services, ("0.0.0.0", 135))
        machine.listener(machine.system, ("::", 445))
        machine.listener(machine.system, (US, 139))
        machine.listener(services, ("fe80::5", 49664))
        machine.udp(services, ("0.0.0.0", 5353))
        machine.udp(services, ("::", 5355))
        machine.udp(explorer, (US, 1900))
        machine.udp(explorer, ("fe80::5", 55000))
        eye = Eye(machine)
        assert eye.rows() == {
            ("tcp", "LISTEN", "0.0.0.0:135", "-", "services.exe"),
            ("tcp", "LISTEN", "[::]:445", "-", "System"),
            ("tcp", "LISTEN", f"{US}:139", "-", "System"),
            ("tcp", "LISTEN", "[fe80::5]:49664", "-", "services.exe"),
            ("udp", "CLOSE", "0.0.0.0:5353", "-", "services.exe"),
            ("udp", "CLOSE", "[::]:5355", "-", "services.exe"),
            ("udp", "CLOSE", f"{US}:1900", "-", "explorer.exe"),
            ("udp", "CLOSE", "[fe80::5]:55000", "-", "explorer.exe"),
        }
        assert eye.sockets.walk().gaps == []


@pytest.mark.parametrize("family", ["19041", "20348", "26100"])
def test_a_connected_udp_socket_is_told_with_its_far_end(family):
    with Machine(family) as machine:
        machine.udp(machine["explorer.exe"], (US, 60001), (THEM, 53))
        machine.udp(machine["explorer.exe"], ("fe80::5", 60002), ("2001:db8::1", 53))
        assert Eye(machine).rows() == {
            ("udp", "ESTABLISHED", f"{US}:60001", f"{THEM}:53", "explorer.exe"),
            ("udp", "ESTABLISHED", "[fe80::5]:60002", "[2001:db8::1]:53", "explorer.exe"),
        }


def test_no_port_is_beyond_reach():
    every = {1, 255, 256, 445, 5353, 49151, 55000, 65535}
    with Machine() as machine:
        for port in every:
            machine.listener(machine["services.exe"], ("0.0.0.0", port))
            machine.udp(machine["services.exe"], ("0.0.0.0", port))
        found = {(socket.protocol, socket.local.port) for socket in Eye(machine).walk()}
        assert found == {(protocol, port) for protocol in ("tcp", "udp") for port in every}


def test_all_that_share_a_port_are_told():
    with Machine() as machine:
        owners = [machine["services.exe"], machine["explorer.exe"], machine["lsass.exe"]]
        for owner in owners:
            machine.udp(owner, ("0.0.0.0", 5353))
        machine.udp(owners[0], (US, 5353))
        machine.udp(owners[0], ("::", 5353))
        assert len(Eye(machine).walk()) == 5


def test_a_refresh_tells_what_was_bound_and_given_up_since():
    with Machine() as machine:
        services = machine["services.exe"]
        first = machine.udp(services, ("0.0.0.0", 5353))
        second = machine.udp(services, (US, 5353))
        eye = Eye(machine)
        assert len(eye.walk()) == 2
        machine.tcp_close(first, poison=False)
        third = machine.listener(services, ("0.0.0.0", 8080))
        eye.sockets.refresh_ports()
        bound = {raw.va for raw in eye.sockets.ports}
        assert third.va in bound and second.va in bound
        machine.tcp_close(second)
        machine.tcp_close(third)
        eye.sockets.refresh_ports()
        assert list(eye.sockets.ports) == []


def test_one_port_is_brought_up_to_date_by_a_few_reads_and_the_others_by_the_next_refresh():
    with Machine() as machine:
        explorer, services = machine["explorer.exe"], machine["services.exe"]
        for number in range(200):
            machine.udp(services, ("0.0.0.0", 1000 + 300 * number))
        memory = Meddled(machine.memory(), lambda: None, lambda _: False)
        eye = Eye(machine, memory=memory)
        eye.walk()

        def owners(port: int) -> list[int]:
            return [raw.owner for raw in eye.sockets.bound(Transport.UDP, port)]

        made = machine.udp(explorer, ("0.0.0.0", 50201))
        machine.udp(explorer, ("0.0.0.0", 50202))
        before = memory.reads
        eye.sockets.refresh_port(Transport.UDP, 50201)
        assert memory.reads - before <= 10
        assert owners(50201) == [explorer.va] and owners(50202) == []
        machine.tcp_close(made)
        machine.udp(services, ("0.0.0.0", 50201))
        machine.udp(explorer, ("127.0.0.1", 50201))
        eye.sockets.refresh_port(Transport.UDP, 50201)
        assert sorted(owners(50201)) == sorted([services.va, explorer.va])
        eye.sockets.refresh_ports()
        assert sorted(owners(50201)) == sorted([services.va, explorer.va]) and owners(50202) == [explorer.va]
        last = machine.udp(explorer, ("0.0.0.0", 50203))
        eye.sockets.refresh_port(Transport.UDP, 50203)
        machine.tcp_close(last)  # its list is as it was at the last refresh
        eye.sockets.refresh_ports()
        assert owners(50203) == []


def test_a_port_in_a_list_that_was_made_since_is_found_all_the_same():
    with Machine() as machine:
        machine.udp(machine["services.exe"], ("0.0.0.0", 500))
        eye = Eye(machine)
        eye.walk()
        machine.udp(machine["explorer.exe"], ("0.0.0.0", 60000))
        eye.sockets.refresh_port(Transport.UDP, 60000)
        assert [raw.owner for raw in eye.sockets.bound(Transport.UDP, 60000)] == [machine["explorer.exe"].va]


def test_the_bitmaps_word_on_taken_ports_is_told_as_it_is():
    with Machine() as machine:
        machine.listener(machine["services.exe"], ("0.0.0.0", 135))
        machine.take_port("tcp", 4444)
        machine.take_port("udp", 0)
        eye = Eye(machine)
        eye.walk()
        assert eye.sockets.ports.taken() == {(Transport.TCP, 1): {135, 4444}, (Transport.UDP, 1): {0}}


def test_a_chain_of_one_port_that_runs_in_a_circle_ends_and_is_named():
    with Machine() as machine:
        services = machine["services.exe"]
        first, second = machine.udp(services, ("0.0.0.0", 5353)), machine.udp(services, (US, 5353))
        at = machine.net.layout["_UDP_ENDPOINT.Next"]
        machine.kernel.set_u64(first.va + at, second.va + at)
        machine.udp(services, ("0.0.0.0", 500))
        eye = Eye(machine)
        found = eye.sockets.walk()
        assert {raw.local.port for raw in found.sockets} == {5353, 500}
        assert [gap.why for gap in found.gaps] == ["its chain leads in a circle"] and found.torn


def test_a_connection_in_the_chain_of_a_port_does_not_hide_what_comes_behind_it():
    with Machine() as machine:
        services = machine["services.exe"]
        machine.listener(services, ("0.0.0.0", 8080))
        entry = machine.net._entry("tcp", 8080)
        behind = machine.kernel.u64(entry)
        # Where a connection keeps the link of its port is not known; the entry points to the link itself.
        connection = machine.tcp(machine["explorer.exe"], (US, 8080), (THEM, 40000))
        link = connection.va + 0x100
        machine.kernel.set_u64(link, behind)
        machine.kernel.set_u64(entry, link | 1)
        assert ("tcp", "LISTEN", "0.0.0.0:8080", "-", "services.exe") in Eye(machine).rows()


def test_the_port_pools_of_all_compartments_are_read():
    with Machine() as machine:
        services = machine["services.exe"]
        machine.listener(services, ("0.0.0.0", 135))
        machine.listener(services, ("0.0.0.0", 8080), compartment=2)
        found = {(raw.local.port, raw.compartment) for raw in Eye(machine).sockets.walk().sockets}
        assert found == {(135, 1), (8080, 2)}


def test_without_port_pools_the_rest_is_told_and_the_lack_is_named():
    with Machine() as machine:
        machine.tcp(machine["explorer.exe"], (US, 50001), (THEM, 443))
        machine.listener(machine["services.exe"], ("0.0.0.0", 135))
        for name in ("TcpCompartmentSet", "UdpCompartmentSet"):
            machine.kernel.set_u64(machine.kernel.tcpip.base + machine.kernel.tcpip_symbols.symbol(name), 0)
        eye = Eye(machine)
        assert {row(socket)[1] for socket in eye.walk()} == {"ESTABLISHED"}
        assert {gap.what for gap in eye.sockets.walk().gaps} == {"tcp port pool", "udp port pool"}


def test_an_address_that_leads_nowhere_is_any_address():
    with Machine() as machine:
        bound = machine.listener(machine["services.exe"], (US, 135))
        sent = machine.udp(machine["services.exe"], (US, 500))
        layout, kernel = machine.net.layout, machine.kernel
        kernel.set_u64(machine.net._local(US)[0] + layout["_LOCAL_ADDRESS.pData"], 0)
        kernel.set_u64(kernel.u64(sent.va + layout["_UDP_ENDPOINT.LocalAddr"]), 0)
        assert bound.alive
        assert {str(raw.local) for raw in Eye(machine).sockets.walk().sockets} == {"0.0.0.0:135", "0.0.0.0:500"}


def test_what_repeats_another_port_than_that_of_its_chain_is_not_believed():
    with Machine() as machine:
        bound = machine.listener(machine["services.exe"], ("0.0.0.0", 135))
        machine.listener(machine["services.exe"], ("0.0.0.0", 445))
        eye = Eye(machine)
        eye.walk()
        machine.kernel.space.write(bound.va + machine.net.layout["_TCP_LISTENER.Port"], struct.pack(">H", 4444))
        found = eye.sockets.walk()
        assert {raw.local.port for raw in found.sockets} == {445} and found.torn
