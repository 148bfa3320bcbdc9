"""The tables of tcpip.sys of Windows XP and Server 2003: where they are, and all that is in them."""

import struct

import pytest

from appliance.errors import UnsupportedGuest
from appliance.guest.windows.symbols import SymbolStore
from appliance.model import Flag, Match, Reason
from tests.guest.windows.xp_network import HERE, MACHINES, THERE, busy, flow, network_of, told
from tests.worlds.windows.xp import XpMachine
from tests.worlds.windows.xp_kernel import SYMBOLS
from tests.worlds.windows.xp_net import TCP


@pytest.mark.parametrize(("era", "pae"), MACHINES)
def test_every_connection_and_socket_is_found_with_its_owner_and_no_symbols_at_all(era, pae):
    machine, _, hidden = busy(era, pae=pae)
    walk = network_of(machine).walk()
    truth = machine.truth()
    connections, sockets = told(walk)
    assert connections == truth["connections"]
    clients = {(TCP, ("0.0.0.0", local[1]), pid) for local, _, pid in truth["connections"]}
    assert sockets == [each for each in truth["sockets"] if each not in clients]
    assert (walk.gaps, walk.torn) == ((), 0)
    flagged = [each for each in walk.sockets if each.flags]
    assert [each.flags for each in flagged] == [(Flag.HIDDEN_PROCESS,)]
    assert flagged[0].owners[0].process.pid == hidden.pid
    assert flagged[0].owners[0].process.flags == (Flag.HIDDEN_PROCESS,)
    assert {each.state for each in walk.sockets} == {"UNKNOWN", "LISTEN", "CLOSE"}


def test_a_thousand_connections_in_sixteen_chains_are_a_thousand():
    machine = XpMachine(buckets=16)
    owners = [machine.process(f"p{number}.exe") for number in range(20)]
    for number in range(1000):
        machine.tcp(owners[number % 20], (HERE, 2000 + number), (f"203.0.113.{number % 250 + 1}", 80))
    network = network_of(machine)
    connections, sockets = told(network.walk())
    assert connections == machine.truth()["connections"]
    assert sockets == []  # those of clients are told by their connections


def test_a_build_that_no_table_has_is_found_by_its_symbols(tmp_path):
    variables = (0x4A123C, 0x4A0000, 0x4A1400, 0x4A1404)
    variables = tuple(rva & 0x7FFFF for rva in variables)
    machine, *_ = busy("2003-sp2", variables=variables)
    machine.write_symbols(tmp_path, kernel=False)
    network = network_of(machine, symbols=SymbolStore([tmp_path], None))
    connections, _ = told(network.walk())
    assert connections == machine.truth()["connections"]
    assert network.how == "by symbol"


@pytest.mark.parametrize("era", ["xp-sp3", "2003-sp0", "2003-sp2", "2003-sp2-x64"])
def test_a_build_that_nobody_knows_is_measured_by_what_its_data_lead_to(era):
    machine, *_ = busy(era, variables=(0x4A240, 0x40404, 0x49338, 0x49338 + (8 if "x64" in era else 4)))
    network = network_of(machine)
    connections, _ = told(network.walk())
    assert connections == machine.truth()["connections"]
    assert network.how == "measured"


def test_tables_that_cannot_be_told_are_refused_by_name():
    machine = XpMachine(variables=(0x4A240, 0x40404, 0x49338, 0x49350))  # its size is not behind AddrObjTable
    machine.listener(4, ("0.0.0.0", 445))
    with pytest.raises(UnsupportedGuest, match=r"tcpip\.sys is not known"):
        network_of(machine).refresh()
    assert network_of(machine).unlinked([]) == ()
    walk = network_of(machine).walk()
    assert (walk.sockets, [gap.what for gap in walk.gaps]) == ((), ["connections and sockets"])
    finding = network_of(machine).find(flow((HERE, 1038), (THERE, 8080)))
    assert (finding.match, finding.reason) == (Match.NONE, Reason.NO_MEMORY)


def test_where_two_builds_fit_equally_well_neither_is_believed():
    machine, *_ = busy("xp-sp3")
    size, sockets = machine.net.buckets * 4, machine.net.socket_buckets * 4
    for rva, table, length in ((0x49768, machine.net.tcb_table, size), (0x486E0, machine.net.address_table, sockets)):
        copy = machine.pool.take(b"Copy", length)
        machine.space.write(copy, machine.space.read(table, length))
        machine.put_pointer(machine.tcpip + rva, copy)
    machine.space.write(machine.tcpip + 0x3F73C, struct.pack("<I", machine.net.buckets))
    machine.space.write(machine.tcpip + 0x486E4, struct.pack("<I", machine.net.socket_buckets))
    with pytest.raises(UnsupportedGuest, match="may be that of XP 3394 as well as of XP SP3 5625"):
        network_of(machine).refresh()


def test_symbols_that_do_not_fit_the_image_are_not_replaced_by_a_guess(tmp_path):
    machine, *_ = busy()
    right, machine.variables = machine.variables, (0x4A240, 0x40404, 0x49338, 0x49350)
    machine.write_symbols(tmp_path, kernel=False)
    machine.variables = right
    with pytest.raises(UnsupportedGuest, match="where its symbols say"):
        network_of(machine, symbols=SymbolStore([tmp_path], None)).refresh()


def test_a_guest_without_tcpip_is_said_to_be_one():
    machine = XpMachine()
    machine.space.write(machine.base + SYMBOLS["PsLoadedModuleList"], b"")
    head = machine.base + SYMBOLS["PsLoadedModuleList"]
    machine.ring(head)
    with pytest.raises(UnsupportedGuest, match=r"tcpip\.sys is not loaded"):
        network_of(machine)


def test_a_driver_of_ipv6_is_a_gap_and_its_flows_are_not_called_hidden():
    machine, *_ = busy()
    entry = machine.pool.take(b"MmLd", 0x80)
    machine.module_entry(
        machine.space, entry, 0xF8500000, 0x30000, "tcpip6.sys", "\\SystemRoot\\tcpip6.sys", machine.kernel_text
    )
    machine.append(machine.base + SYMBOLS["PsLoadedModuleList"], entry)
    network = network_of(machine)
    assert [gap.what for gap in network.walk().gaps] == ["IPv6"]
    finding = network.find(flow(("fe80::1", 1038), ("fe80::2", 80)))
    assert (finding.match, finding.reason, finding.final) == (Match.NONE, Reason.NO_MEMORY, True)
