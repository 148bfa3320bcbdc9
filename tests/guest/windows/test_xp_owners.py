"""Whose a connection or a socket of Windows XP is, and whose it is not."""

from appliance.model import Direction, Flag, Match, Reason, Transport
from tests.guest.windows.xp_network import HERE, THERE, busy, flow, network_of, told
from tests.worlds.windows.xp import XpMachine


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
    machine.put(victim.va, "_EPROCESS.CreateTime", machine.filetime())  # another one, at the same place
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
