"""The tables of Windows XP and Server 2003 in machines made of bytes, and flows to ask for."""

from ipaddress import ip_address

from appliance.guest.windows.attach import attach
from appliance.guest.windows.pools import PoolHeader, Sweep
from appliance.guest.windows.processes import Processes
from appliance.guest.windows.xp import XpNetwork
from appliance.model import Direction, Endpoint, FiveTuple, Flow, FlowId, GuestId, Transport
from tests.worlds.windows.xp import XpMachine
from tests.worlds.windows.xp_net import TCP, UDP, VARIABLES

MACHINES = [(era, pae) for era in VARIABLES for pae in (True, False) if pae or "x64" not in era]
HERE, THERE = "172.16.112.128", "41.168.5.140"
PAGE = 4096


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


def connections_in_ram(machine, network, kernel):
    sweep = Sweep(kernel.memory, PoolHeader(kernel.types, kernel.pointer_size), (b"TCPT", b"TCPA"))
    blocks = sweep.run(lambda: False)
    pages = {gpa: va for va, gpa in machine.space.pages.items()}
    return [(pages[block.at & -PAGE] + block.at % PAGE, block) for block in blocks]
