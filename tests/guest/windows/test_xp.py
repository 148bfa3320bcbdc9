"""Windows XP and Server 2003: from FS to the tables of tcpip.sys, and whose connections they are."""

import random
import struct
from ipaddress import ip_address

import pytest

from appliance.errors import GuestError, Implausible, UnsupportedGuest
from appliance.guest.windows import xp_types
from appliance.guest.windows.attach import attach
from appliance.guest.windows.eye import WindowsEye
from appliance.guest.windows.pools import PoolHeader, Sweep
from appliance.guest.windows.processes import Processes
from appliance.guest.windows.space import AddressSpace, Mode
from appliance.guest.windows.symbols import SymbolStore
from appliance.guest.windows.xp import XpNetwork
from appliance.guest.windows.xp_kpcr import find_by_kpcr
from appliance.model import Direction, Endpoint, FiveTuple, Flag, Flow, FlowId, GuestId, Match, Reason, Transport
from tests.worlds.overlay import Overlay
from tests.worlds.windows.xp import SYMBOLS, TCP, UDP, VARIABLES, XpMachine

MACHINES = [(era, pae) for era in VARIABLES for pae in (True, False) if pae or "x64" not in era]
X86 = [each for each in MACHINES if "x64" not in each[0]]
HERE, THERE = "172.16.112.128", "41.168.5.140"
PAGE = 4096


class Spoiled(Overlay):
    """A memory with changed pages that keeps the registers; ``at`` some read, something happens in the guest."""

    def __init__(self, memory):
        super().__init__(memory)
        self._cpus, self.at, self.then, self.reads = memory.vcpus(), -1, None, 0

    def vcpus(self):
        return self._cpus

    def readv(self, spans):
        self.reads += 1
        if self.reads == self.at:
            self.then()
        return self._memory.readv(spans) if not self.pages else super().readv(spans)


def network_of(machine, memory=None, **options):
    kernel = attach(memory or machine.memory(), **options)
    return XpNetwork(kernel, Processes(kernel))


def flow(local, remote, protocol=Transport.TCP, direction=Direction.OUT, **more):
    ends = Endpoint(ip_address(local[0]), local[1]), Endpoint(ip_address(remote[0]), remote[1])
    return Flow(FlowId(GuestId("file:xp"), 1), FiveTuple(protocol, *ends), direction, 0, **more)


def told(walk):
    """What was told, as `XpMachine.truth` tells it."""
    numbers = {Transport.TCP: TCP, Transport.UDP: UDP}
    connections, sockets = [], []
    for each in walk.sockets:
        pid = each.owners[0].process.pid if each.owners else None
        local = (str(each.local.ip), each.local.port)
        if each.remote is not None:
            connections.append((local, (str(each.remote.ip), each.remote.port), pid))
        else:
            sockets.append((numbers.get(each.protocol, each.local.port), local, pid))
    return sorted(connections), sorted(sockets)


def busy(era="xp-sp3", **options):
    """A machine with one of everything; returned with its processes by name."""
    machine = XpMachine(era, **options)
    browser, hidden = machine.process("iexplore.exe"), machine.process("hidden.exe", hidden=True)
    machine.tcp(machine.explorer, (HERE, 1038), (THERE, 8080))
    machine.tcp(browser, (HERE, 1039), (THERE, 80))
    machine.tcp(hidden, (HERE, 1040), ("193.104.41.75", 80))
    machine.listener(machine.svchost, ("0.0.0.0", 135))
    machine.listener(4, ("0.0.0.0", 445))
    machine.udp(4, (HERE, 137))
    machine.udp(machine.svchost, ("0.0.0.0", 1900))
    return machine, browser, hidden


# -- the way there --


@pytest.mark.parametrize(("era", "pae"), X86)
def test_the_block_at_fs_leads_to_the_kernel_its_modules_and_its_debugger_data(era, pae):
    machine = XpMachine(era, pae=pae)
    space = AddressSpace(machine.memory(), machine.root, Mode.PAE if pae else Mode.LEGACY)
    view = find_by_kpcr(space, machine.memory().vcpus()[0].fs_base)
    assert view is not None
    assert (view.base, view.modules) == (machine.base, machine.base + SYMBOLS["PsLoadedModuleList"])
    assert view.kdbg == machine.base + SYMBOLS["KdDebuggerDataBlock"]
    assert view.build == (2600 if era.startswith("xp") else 3790)


@pytest.mark.parametrize("fs_base", [0, 0x7FFDE000, 0xF8C40000, 0xFFFFFFF0])
def test_where_fs_is_a_threads_or_another_processors_the_block_of_processor_0_serves(fs_base):
    machine = XpMachine()
    other = 0xF8C40000  # of a second processor: it has no version block
    machine.space.map(other, machine.ram.page())
    for at, value in ((0x1C, other), (0x20, other + 0x120), (0x34, 0)):
        machine.space.write(other + at, struct.pack("<I", value))
    view = find_by_kpcr(AddressSpace(machine.memory(), machine.root, Mode.PAE), fs_base)
    assert view is not None
    assert view.base == machine.base


@pytest.mark.parametrize("at", [0x1C, 0x20, 0x34])
def test_a_block_that_does_not_name_itself_leads_nowhere(at):
    machine = XpMachine()
    machine.space.write(0xFFDFF000 + at, struct.pack("<I", 0xFFDF0000))
    assert find_by_kpcr(AddressSpace(machine.memory(), machine.root, Mode.PAE)) is None


def test_a_version_block_whose_list_of_modules_does_not_lead_back_is_not_believed():
    machine = XpMachine()
    machine.space.write(machine.base + SYMBOLS["PsLoadedModuleList"], struct.pack("<I", machine.system.va))
    assert find_by_kpcr(AddressSpace(machine.memory(), machine.root, Mode.PAE)) is None


# -- layouts of the kernel --


@pytest.mark.parametrize(("era", "pae"), MACHINES)
def test_the_layout_is_chosen_by_the_guests_own_system_process(era, pae):
    machine = XpMachine(era, pae=pae)
    mode = Mode.LONG4 if machine.wide else Mode.PAE if pae else Mode.LEGACY
    space = AddressSpace(machine.memory(), machine.root, mode)
    kdbg = machine.base + SYMBOLS["KdDebuggerDataBlock"]
    chosen, types = xp_types.choose(space, machine.base, machine.image_size, machine.kind.build, kdbg)
    assert chosen is machine.kind
    assert xp_types.verify(space, types, machine.base, kdbg) == machine.system.va


def test_headers_that_were_overwritten_refuse_no_layout():
    machine = XpMachine()
    for va, path in ((machine.system.va, "_EPROCESS.Pcb.Header"), (machine.system.threads[0], "_ETHREAD.Tcb.Header")):
        machine._put(va, f"{path}.Type", 0)
        machine._put(va, f"{path}.Size", 0)
    assert attach(machine.memory()).build == 2600


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("_EPROCESS.UniqueProcessId", 8),
        ("_EPROCESS.Pcb.Header.Size", 0x1E),
        ("_EPROCESS.ImageFileName", b"Systen\0"),
        ("_EPROCESS.ThreadListHead.Flink", 0x81800008),
    ],
)
def test_a_system_process_that_contradicts_a_layout_refuses_it(path, value):
    machine = XpMachine()
    machine._put(machine.system.va, path, value)
    with pytest.raises(UnsupportedGuest, match="Windows XP"):
        attach(machine.memory())


@pytest.mark.parametrize(
    ("path", "value"),
    [("_ETHREAD.ThreadsProcess", 0x81800008), ("_ETHREAD.Cid.UniqueProcess", 8), ("_ETHREAD.Tcb.Header.Size", 0x6E)],
)
def test_a_system_thread_that_contradicts_a_layout_refuses_it(path, value):
    machine = XpMachine()
    machine._put(machine.system.threads[0], path, value)
    with pytest.raises(UnsupportedGuest, match=r"first thread|_KTHREAD"):
        attach(machine.memory())


def test_where_the_kernel_itself_says_otherwise_a_layout_is_refused():
    machine = XpMachine("2003-sp2")
    machine.space.write(machine.base + SYMBOLS["KdDebuggerDataBlock"] + 0x2AA, struct.pack("<H", 0x190))  # Peb
    with pytest.raises(UnsupportedGuest, match=r"the kernel itself says otherwise of _EPROCESS\.Peb"):
        attach(machine.memory())


def test_debugger_data_of_another_kernel_is_not_believed():
    machine = XpMachine()
    space = AddressSpace(machine.memory(), machine.root, Mode.PAE)
    with pytest.raises(Implausible, match="debugger data"):
        xp_types.kdbg_symbols(space, machine.base + SYMBOLS["KdDebuggerDataBlock"], machine.base - PAGE, 0x200000)


# -- the tables --


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
    size, sockets = machine.buckets * 4, machine.socket_buckets * 4
    for rva, table, length in ((0x49768, machine.tcb_table, size), (0x486E0, machine.address_table, sockets)):
        copy = machine.pool.take(b"Copy", length)
        machine.space.write(copy, machine.space.read(table, length))
        machine._pointer(machine.tcpip + rva, copy)
    machine.space.write(machine.tcpip + 0x3F73C, struct.pack("<I", machine.buckets))
    machine.space.write(machine.tcpip + 0x486E4, struct.pack("<I", machine.socket_buckets))
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
    machine._ring(head)
    with pytest.raises(UnsupportedGuest, match=r"tcpip\.sys is not loaded"):
        network_of(machine)


def test_a_driver_of_ipv6_is_a_gap_and_its_flows_are_not_called_hidden():
    machine, *_ = busy()
    entry = machine.pool.take(b"MmLd", 0x80)
    machine._entry(
        machine.space, entry, 0xF8500000, 0x30000, "tcpip6.sys", "\\SystemRoot\\tcpip6.sys", machine._kernel_text
    )
    machine._append(machine.base + SYMBOLS["PsLoadedModuleList"], entry)
    network = network_of(machine)
    assert [gap.what for gap in network.walk().gaps] == ["IPv6"]
    finding = network.find(flow(("fe80::1", 1038), ("fe80::2", 80)))
    assert (finding.match, finding.reason, finding.final) == (Match.NONE, Reason.NO_MEMORY, True)


# -- whose it is --


def test_a_pid_that_is_another_processs_now_names_nobody():
    machine = XpMachine()
    old = machine.filetime()
    machine.tick(60)
    reused = machine.process("calc.exe", pid=2000)
    machine.udp(2000, ("0.0.0.0", 5000), created=old)
    kept = machine.udp(2000, ("0.0.0.0", 5001))
    network = network_of(machine)
    by_port = {each.local.port: each for each in network.walk().sockets}
    assert (by_port[5000].owners, by_port[5000].flags) == ((), (Flag.OWNER_EXITED,))
    assert [owner.process.pid for owner in by_port[5001].owners] == [reused.pid] == [kept.pid]
    finding = network.find(flow((HERE, 5000), (THERE, 53), Transport.UDP))
    assert (finding.match, finding.owners) == (Match.NONE, ())
    assert [claim.kind for claim in finding.evidence] == ["pid-reused"]


def test_a_connection_is_not_given_to_a_process_that_began_after_its_socket():
    machine = XpMachine()
    machine.tcp(2000, (HERE, 1044), (THERE, 80))  # and its address object, made now
    machine.tick(60)
    machine.process("calc.exe", pid=2000)
    finding = network_of(machine).find(flow((HERE, 1044), (THERE, 80)))
    assert (finding.match, finding.owners) == (Match.NONE, ())


def test_a_connection_seen_before_its_pid_was_reused_is_nobodys_after():
    machine = XpMachine()
    victim = machine.process("cmd.exe", pid=2000)
    machine.tcp(victim, (HERE, 1044), (THERE, 80), socket=False)
    machine.listener(machine.svchost, ("0.0.0.0", 135))
    network = network_of(machine)
    assert network.find(flow((HERE, 1044), (THERE, 80))).owners[0].process.name == "cmd.exe"
    machine.tick(60)
    machine._put(victim.va, "_EPROCESS.CreateTime", machine.filetime())  # another one, at the same place
    finding = network.find(flow((HERE, 1044), (THERE, 80)))
    assert (finding.match, finding.owners) == (Match.NONE, ())


def test_a_pid_that_nobody_has_is_told_as_such():
    machine = XpMachine()
    machine.tcp(4444, (HERE, 1044), (THERE, 80))
    network = network_of(machine)
    connection = next(each for each in network.walk().sockets if each.remote)
    assert (connection.owners, connection.flags) == ((), (Flag.OWNER_EXITED,))
    finding = network.find(flow((HERE, 1044), (THERE, 80)))
    assert (finding.match, finding.reason) == (Match.NONE, Reason.HIDDEN)
    assert finding.socket == connection


def test_an_exact_connection_is_found_and_a_new_one_too():
    machine, browser, _ = busy()
    network = network_of(machine)
    network.walk()
    finding = network.find(flow((HERE, 1039), (THERE, 80)))
    assert (finding.match, finding.reason) == (Match.EXACT, None)
    assert [owner.process.pid for owner in finding.owners] == [browser.pid]
    machine.tcp(browser, (HERE, 1050), (THERE, 443))
    finding = network.find(flow((HERE, 1050), (THERE, 443)))
    assert (finding.match, finding.owners[0].process.pid) == (Match.EXACT, browser.pid)


def test_a_connection_that_was_closed_in_the_middle_of_its_chain_is_found_no_more():
    machine = XpMachine(buckets=1)
    made = [machine.tcp(machine.explorer, (HERE, 1030 + number), (THERE, 80)) for number in range(5)]
    network = network_of(machine)
    assert len(told(network.walk())[0]) == 5
    machine.tcp_close(made[2])
    network.refresh()
    assert network.find(flow((HERE, 1032), (THERE, 80))).match is Match.NONE
    walk = network.walk()
    assert told(walk)[0] == machine.truth()["connections"]
    assert walk.torn == 0  # the refresh has seen it
    assert network.find(flow((HERE, 1033), (THERE, 80))).match is Match.EXACT


def test_an_incoming_connection_goes_to_its_listener_until_it_is_accepted():
    machine, *_ = busy()
    network = network_of(machine)
    incoming = flow((HERE, 135), ("10.1.1.1", 40000), direction=Direction.IN)
    finding = network.find(incoming)
    assert (finding.match, finding.owners[0].process.pid) == (Match.LISTENER, machine.svchost.pid)
    machine.tcp(machine.svchost, (HERE, 135), ("10.1.1.1", 40000), socket=False)
    assert network.find(incoming).match is Match.EXACT


def test_what_comes_to_a_port_that_nobody_has_is_refused_by_the_kernel():
    machine, *_ = busy()
    finding = network_of(machine).find(flow((HERE, 23), ("10.1.1.1", 40000), direction=Direction.IN))
    assert (finding.match, finding.reason) == (Match.NONE, Reason.CLOSED)


def test_what_comes_to_a_clients_port_is_not_given_to_the_client():
    machine, *_ = busy()
    finding = network_of(machine).find(flow((HERE, 1039), ("10.1.1.1", 40000), direction=Direction.IN))
    assert (finding.match, finding.reason, finding.owners) == (Match.NONE, None, ())


def test_a_server_in_the_range_of_clients_is_a_listener_once_it_was_seen_without_a_connection():
    machine = XpMachine()
    machine.listener(machine.svchost, ("0.0.0.0", 3389))
    network = network_of(machine)
    assert [each.state for each in network.walk().sockets] == ["LISTEN"]
    machine.tcp(machine.svchost, (HERE, 3389), ("10.1.1.1", 50000), socket=False)
    assert sorted(each.state for each in network.walk().sockets) == ["LISTEN", "UNKNOWN"]


def test_a_datagram_belongs_to_who_is_bound_to_its_address_rather_than_to_any():
    machine = XpMachine()
    exact, other = machine.process("exact.exe"), machine.process("any.exe")
    machine.udp(exact, (HERE, 5000))
    machine.udp(other, ("0.0.0.0", 5000))
    network = network_of(machine)
    finding = network.find(flow((HERE, 5000), (THERE, 53), Transport.UDP))
    assert (finding.match, [owner.process.pid for owner in finding.owners]) == (Match.UNCONNECTED, [exact.pid])
    finding = network.find(flow(("10.0.0.9", 5000), (THERE, 53), Transport.UDP))
    assert [owner.process.pid for owner in finding.owners] == [other.pid]
    both = network.find(flow(("255.255.255.255", 5000), (THERE, 53), Transport.UDP, Direction.IN))
    assert both.reason is Reason.AMBIGUOUS
    assert {owner.process.pid for owner in both.owners} == {exact.pid, other.pid}


def test_raw_packets_belong_to_who_holds_a_raw_socket_and_else_to_the_kernel_or_nobody():
    machine, browser, _ = busy()
    network = network_of(machine)
    echo = flow((HERE, 0), (THERE, 0), Transport.ICMP, icmp_type=8)
    assert network.find(echo).match is Match.KERNEL  # which sends it for ping (IcmpSendEcho)
    stamp = flow((HERE, 0), (THERE, 0), Transport.ICMP, icmp_type=13)
    assert network.find(stamp).match is Match.NONE
    machine.raw(browser, ("0.0.0.0", 0), 1)
    finding = network.find(echo)
    assert (finding.match, finding.reason) == (Match.UNCONNECTED, Reason.RAW)
    assert finding.owners[0].process.pid == browser.pid
    answer = flow((HERE, 0), (THERE, 0), Transport.ICMP, Direction.IN, icmp_type=8)
    assert network.find(answer).match is Match.KERNEL


# -- adversaries --


@pytest.mark.parametrize("shape", ["itself", "another chain", "nowhere", "user space", "odd"])
def test_a_chain_that_leads_astray_ends_and_is_named(shape):
    machine = XpMachine(buckets=16)
    made = [machine.tcp(machine.explorer, (HERE, 1030 + number), (THERE, 80)) for number in range(8)]
    last = made[0]
    target = {
        "itself": last.va,
        "another chain": made[5].va,
        "nowhere": 0xE0000000,
        "user space": 0x00400000,
        "odd": made[5].va + 2,
    }[shape]
    machine.space.map(0x00400000, machine.ram.page())
    machine.space.write(0x00400000, machine.space.read(made[5].va, 0x100))
    machine.space.map(0x003FF000, machine.ram.page())
    machine.space.write(0x00400000 - 8, machine.space.read(made[5].va - 8, 8))  # a connection as good as any
    machine._pointer(last.va, target)
    walk = network_of(machine).walk()
    found, _ = told(walk)
    assert len(found) == len(set(found)) >= 7
    assert [gap.what for gap in walk.gaps] == ["connection table"]


def test_an_object_whose_block_was_given_to_something_else_is_not_believed():
    machine = XpMachine(buckets=16)
    made = [machine.tcp(machine.explorer, (HERE, 1030 + number), (THERE, 80)) for number in range(8)]
    machine.space.write(made[0].va - 4, b"Irp ")
    walk = network_of(machine).walk()
    assert len(told(walk)[0]) == 7
    assert [gap.address for gap in walk.gaps] == [made[0].va]


def connections_in_ram(machine, network, kernel):
    sweep = Sweep(kernel.memory, PoolHeader(kernel.types, kernel.pointer_size), (b"TCPT", b"TCPA"))
    blocks = sweep.run(lambda: False)
    pages = {gpa: va for va, gpa in machine.space.pages.items()}
    return [(pages[block.at & -PAGE] + block.at % PAGE, block) for block in blocks]


@pytest.mark.parametrize("era", ["xp-sp3", "2003-sp2", "2003-sp2-x64"])
def test_what_was_taken_out_of_the_tables_is_told_from_what_is_over(era):
    machine, browser, _ = busy(era)
    taken = machine.tcp(browser, (HERE, 1060), ("193.104.41.75", 80), linked=False)  # with its address object
    half = machine.tcp(browser, (HERE, 1061), ("193.104.41.76", 80))  # its address object stays
    machine.tcp_close(half, poison=False)
    over = machine.tcp(browser, (HERE, 1062), ("193.104.41.77", 80), socket=False)
    machine.tcp_close(over, poison=False)
    server = machine.listener(browser, ("0.0.0.0", 31337), linked=False)
    machine.tcp_close(machine.udp(browser, ("0.0.0.0", 6000)))  # freed and poisoned
    kernel = attach(machine.memory())
    network = XpNetwork(kernel, Processes(kernel))
    network.walk()
    loose = {each.address: each for each in network.unlinked(connections_in_ram(machine, network, kernel))}
    assert {va: each.flags for va, each in loose.items()} == {
        taken.va: (Flag.UNLINKED_ENDPOINT,),
        half.va: (Flag.UNLINKED_ENDPOINT,),
        over.va: (Flag.STALE,),
        server.va: (Flag.UNLINKED_ENDPOINT,),
    }
    assert all(each.owners[0].process.pid == browser.pid for each in loose.values())


def test_the_owner_of_a_connection_that_was_taken_out_is_named_once_a_sweep_has_found_it():
    machine, browser, _ = busy()
    machine.tcp(browser, (HERE, 1060), ("193.104.41.75", 80), linked=False)
    kernel = attach(machine.memory())
    network = XpNetwork(kernel, Processes(kernel))
    network.walk()
    asked = flow((HERE, 1060), ("193.104.41.75", 80))
    assert network.find(asked).match is Match.NONE
    network.unlinked(connections_in_ram(machine, network, kernel))
    finding = network.find(asked)
    assert (finding.match, finding.owners[0].process.pid) == (Match.EXACT, browser.pid)
    assert finding.socket is not None
    assert finding.socket.flags == (Flag.UNLINKED_ENDPOINT,)
    assert [(claim.kind, claim.weight) for claim in finding.evidence] == [("unlinked-endpoint", 2)]


def test_of_a_running_guest_what_is_over_is_not_told_nor_what_is_linked_meanwhile():
    machine, browser, _ = busy()
    over = machine.tcp(browser, (HERE, 1062), ("193.104.41.77", 80), socket=False)
    machine.tcp_close(over, poison=False)
    taken = machine.tcp(browser, (HERE, 1060), ("193.104.41.75", 80), linked=False)
    late = machine.tcp(browser, (HERE, 1061), ("193.104.41.76", 80), linked=False, socket=False)
    memory = machine.memory()
    memory.live = True
    kernel = attach(memory)
    network = XpNetwork(kernel, Processes(kernel))
    network.walk()
    blocks = connections_in_ram(machine, network, kernel)
    machine._push(late)
    assert [each.address for each in network.unlinked(blocks)] == [taken.va]


def test_a_hidden_process_that_only_its_pool_tells_of_owns_its_connection():
    machine, _, hidden = busy("xp-sp3", pae=True)
    machine._put(machine._cid, "_HANDLE_TABLE.TableCode", 0)
    eye = WindowsEye(attach(machine.memory()))
    for _ in range(2):
        (connection,) = (each for each in eye.read_snapshot().sockets if each.local.port == 1040 and each.remote)
        assert connection.flags == (Flag.HIDDEN_PROCESS,)
        assert [owner.process.task_va for owner in connection.owners] == [hidden.va]


@pytest.mark.parametrize(
    ("era", "pae"), [("xp-sp2", False), ("xp-sp3", True), ("2003-sp2", True), ("2003-sp2-x64", True)]
)
def test_the_eye_sees_a_foreign_connection_its_host_and_what_was_put_into_it(era, pae):
    machine, _, hidden = busy(era, pae=pae)
    region = machine.inject(machine.explorer)
    module = machine.foreign_dll(machine.explorer)
    taken = machine.tcp(machine.explorer, (HERE, 1060), ("193.104.41.75", 80), linked=False)
    eye = WindowsEye(attach(machine.memory()))
    snapshot = eye.read_snapshot()
    assert {each.pid for each in snapshot.processes} == {each.pid for each in machine.processes}
    odd = {each.pid: each.flags for each in snapshot.processes if each.flags}
    assert odd == {hidden.pid: (Flag.HIDDEN_PROCESS,)}
    flagged = {(each.remote.port, each.local.port): each.flags for each in snapshot.sockets if each.flags}
    assert flagged == {(80, 1040): (Flag.HIDDEN_PROCESS,), (80, taken.local[1]): (Flag.UNLINKED_ENDPOINT,)}
    (host,) = eye.find_owner(flow((HERE, 1038), (THERE, 8080))).owners
    assert host.process.pid == machine.explorer.pid
    evidence = {(claim.kind, claim.address & -PAGE) for claim in eye.find_foreign(host.process) if claim.weight == 2}
    assert {("injected-pe", region.start), ("foreign-thread", region.start), ("unlisted-module", module)} <= evidence


@pytest.mark.parametrize("era", ["xp-sp2", "2003-sp1"])
def test_nothing_is_flagged_on_a_machine_that_hides_nothing(era):
    machine = XpMachine(era)
    for number in range(50):
        machine.tcp(machine.explorer, (HERE, 1100 + number), (THERE, 80))
        machine.udp(machine.svchost, ("0.0.0.0", 4000 + number))
    kernel = attach(machine.memory())
    network = XpNetwork(kernel, Processes(kernel))
    assert not any(each.flags for each in network.walk().sockets)
    assert network.unlinked(connections_in_ram(machine, network, kernel)) == ()


@pytest.mark.parametrize("at", [1, 2])
def test_whatever_happens_between_two_reads_nobody_else_is_named(at):
    machine, browser, _ = busy()
    victim = next(each for each in machine.connections if each.remote and each.local[1] == 1038)
    memory = Spoiled(machine.memory())
    network = network_of(machine, memory)
    network.walk()

    def reuse():  # the object becomes another connection, of another process
        machine.space.write(victim.va + 0x10, bytes([10, 0, 0, 1]))
        machine.space.write(victim.va + 0x18, struct.pack("<I", browser.pid))

    memory.at, memory.then = memory.reads + at, reuse
    finding = network.find(flow((HERE, 1038), (THERE, 8080)))
    assert memory.reads >= memory.at
    assert finding.match is Match.NONE
    assert finding.torn > 0 or at == 1


@pytest.mark.parametrize(("era", "pae"), [("xp-sp3", True), ("2003-sp2", False), ("2003-sp2-x64", True)])
def test_with_bytes_changed_at_random_nothing_is_raised_but_a_guests_error(era, pae):
    machine, *_ = busy(era, pae=pae)
    machine.tcp(machine.explorer, (HERE, 1060), (THERE, 443))
    watched = Overlay(machine.memory())
    kernel = attach(machine.memory())
    pages = sorted(
        {gpa // PAGE for va, gpa in machine.space.pages.items() if gpa >= 0x800000 or va == machine.base + 0x82000}
    )
    chance = random.Random(7)
    names = {each.pid: each.name.lower() for each in machine.processes}
    outcomes = set()
    for _ in range(200):
        memory = Spoiled(machine.memory())
        for _ in range(chance.randrange(1, 4)):
            number = chance.choice(pages)
            page = bytearray(watched.read(number * PAGE, PAGE))
            for _ in range(chance.randrange(1, 40)):
                at = chance.randrange(PAGE)
                page[at : at + 4] = chance.choice(
                    [b"\0\0\0\0", b"\xff\xff\xff\xff", bytes(page[at : at + 2]) + b"\0\x80"]
                )[: PAGE - at]
            memory.pages[number] = bytes(page)
        space = AddressSpace(memory, kernel.space.root, kernel.space.mode)
        try:
            spoiled = type(kernel)(
                space, base=kernel.base, size=kernel.size, types=kernel.types, shared=kernel.read_shared()
            )
            network = XpNetwork(spoiled, Processes(spoiled))
            with spoiled.limit(5.0):
                walk = network.walk()
                found = network.find(flow((HERE, 1038), (THERE, 8080)))
        except GuestError as error:
            outcomes.add(type(error))
            continue
        outcomes.add(found.match)
        for owner in found.owners:
            assert owner.process.pid in names
        assert len(walk.sockets) < 1000
    assert Match.EXACT in outcomes
    assert len(outcomes) > 1
