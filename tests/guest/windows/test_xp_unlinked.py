"""What was taken out of the tables of Windows XP, hidden processes, and what a whole look tells of both."""

import pytest

from appliance.guest.windows.attach import attach
from appliance.guest.windows.eye import WindowsEye
from appliance.guest.windows.processes import Processes
from appliance.guest.windows.xp import XpNetwork
from appliance.model import Flag, Match
from tests.guest.windows.xp_network import HERE, PAGE, THERE, busy, connections_in_ram, flow
from tests.worlds.windows.xp import XpMachine


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
    machine.net.push(late)
    assert [each.address for each in network.unlinked(blocks)] == [taken.va]


def test_a_hidden_process_that_only_its_pool_tells_of_owns_its_connection():
    machine, _, hidden = busy("xp-sp3", pae=True)
    machine.put(machine.cid, "_HANDLE_TABLE.TableCode", 0)
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
