"""Views of one guest against each other: everything planted is told with its flag, and nothing else has one."""

from dataclasses import replace

import pytest

from appliance.model import Flag
from tests.guest.windows.eyes import eye_of, odd_processes, odd_sockets, row, truth
from tests.guest.windows.network import flow
from tests.worlds.windows import FAMILIES, Machine
from tests.worlds.windows.scene import plant

HOME, PEER, S = "10.0.0.5", "203.0.113.9", 10**9


def busy(machine):
    """A machine in full use, in which nothing is odd: closed connections, ended processes and all."""
    server, browser = machine["svchost.exe"], machine["explorer.exe"]
    for port in (135, 445, 3389):
        machine.listener(server, ("0.0.0.0", port))
        machine.listener(server, ("::", port))
    for port in (123, 5353, 5355):
        machine.udp(server, ("0.0.0.0", port))
    for number in range(60):
        machine.tcp(browser, (HOME, 49700 + number), (PEER, 443), bucket=number % 7)
        machine.tcp(server, (HOME, 445), ("10.0.0.77", 50000 + number))
    for number in range(30):
        closed = machine.tcp(browser, (HOME, 50100 + number), (PEER, 80))
        machine.tcp_close(closed, poison=bool(number % 2), reuse=bool(number % 3))
        machine.tcp_close(machine.udp(browser, (HOME, 52000 + number)), poison=False, reuse=bool(number % 2))
    for number in range(10):
        machine.time_wait((HOME, 50200 + number), (PEER, 443))
        short = machine.process(f"short{number}.exe", parent=browser)
        machine.delete(short, poison=bool(number % 2))
    machine.tick(5)


@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_busy_machine_nothing_is_odd_and_every_socket_has_its_owner(family):
    with Machine(family) as machine:
        busy(machine)
        snapshot = eye_of(machine).read_snapshot()
        assert odd_sockets(snapshot) == {}
        assert odd_processes(snapshot) == {}
        assert snapshot.gaps == ()
        assert {row(socket) for socket in snapshot.sockets} == truth(machine)
        assert len(snapshot.sockets) == len(truth(machine))


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_machine_that_stands_still_what_is_left_of_closed_sockets_is_stale_and_nothing_else_is_odd(family):
    with Machine(family) as machine:
        busy(machine)
        snapshot = eye_of(machine, live=False).read_snapshot()
        assert all(flags == {Flag.STALE} for flags in odd_sockets(snapshot).values())
        assert all(flags == {Flag.STALE} for flags in odd_processes(snapshot).values())
        assert {row(socket) for socket in snapshot.sockets if not socket.flags} == truth(machine)


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_planted_anomaly_is_told_with_its_flag_and_nothing_else_is(family, live):
    with Machine(family) as machine:
        scene = plant(machine)
        machine.take_port("tcp", 50999)
        snapshot = eye_of(machine, live=live).read_snapshot()
        expected = {
            ("tcp", scene.unlinked.local[1]): {Flag.UNLINKED_ENDPOINT},
            ("tcp", scene.first_only.local[1]): {Flag.ONE_TABLE_ONLY},
            ("tcp", scene.second_only.local[1]): {Flag.ONE_TABLE_ONLY},
            ("tcp", scene.of_hidden.local[1]): {Flag.HIDDEN_PROCESS},
            ("tcp", scene.of_ended.local[1]): {Flag.OWNER_EXITED},
            ("tcp", 50999): {Flag.PORT_WITHOUT_ENDPOINT},
        }
        if not live:
            expected["tcp", scene.closed.local[1]] = {Flag.STALE}
        assert odd_sockets(snapshot) == expected
        assert odd_processes(snapshot) == {scene.hidden.pid: {Flag.HIDDEN_PROCESS}, scene.ended.pid: {Flag.STALE}}
        owners = {socket.local.port: [one.process.name for one in socket.owners] for socket in snapshot.sockets}
        assert owners[scene.unlinked.local[1]] == ["notepad.exe"]
        assert owners[scene.of_hidden.local[1]] == ["hidden.exe"]
        assert owners[50999] == []


def test_a_thousand_endpoints_in_shared_buckets_are_all_told_with_their_owners():
    with Machine("20348", ram=128 << 20) as machine:
        browsers = [machine.process(f"browser{number}.exe") for number in range(10)]
        for number in range(1000):
            process = browsers[number % 10]
            machine.tcp(process, (HOME, 50000 + number), (PEER, 443), bucket=number % 16, partition=number % 4)
        snapshot = eye_of(machine).read_snapshot()
        assert {row(socket) for socket in snapshot.sockets} == truth(machine)
        assert len(snapshot.sockets) == 1000
        assert odd_sockets(snapshot) == {}


def test_a_process_that_gave_up_its_place_in_every_table_is_found_in_its_pool():
    with Machine("19041") as machine:
        ghost = machine.process("ghost.exe", hidden=True)
        machine.all.enter_cid(ghost.pid, 0)
        machine.tick(5)
        assert odd_processes(eye_of(machine, thorough=False).read_snapshot()) == {}
        assert odd_processes(eye_of(machine).read_snapshot()) == {ghost.pid: {Flag.HIDDEN_PROCESS}}


def test_a_process_that_is_just_being_made_is_not_called_hidden():
    with Machine("20348") as machine:
        machine.tick(60)
        young = machine.process("young.exe", hidden=True, created=machine.kernel.now_ns)
        assert young.pid not in odd_processes(eye_of(machine).read_snapshot())
        machine.tick(5)
        assert odd_processes(eye_of(machine).read_snapshot()) == {young.pid: {Flag.HIDDEN_PROCESS}}


def test_a_listener_that_was_taken_out_of_its_port_is_unlinked():
    with Machine("20348") as machine:
        server = machine["svchost.exe"]
        machine.listener(server, ("0.0.0.0", 445))
        backdoor = machine.listener(machine["lsass.exe"], ("0.0.0.0", 4444))
        machine.net._unchain(backdoor)
        machine.take_port("tcp", 4444)
        snapshot = eye_of(machine).read_snapshot()
        assert odd_sockets(snapshot) == {("tcp", 4444): {Flag.UNLINKED_ENDPOINT}}
        assert [row(one)[1:] for one in snapshot.sockets if one.local.port == 4444] == [
            ("LISTEN", "0.0.0.0:4444", "*", (machine["lsass.exe"].pid,))
        ]


def test_a_range_of_reserved_ports_is_not_told_port_by_port():
    with Machine("20348") as machine:
        for port in range(50000, 50100):
            machine.take_port("tcp", port)
        machine.take_port("udp", 6000)
        assert odd_sockets(eye_of(machine).read_snapshot()) == {("udp", 6000): {Flag.PORT_WITHOUT_ENDPOINT}}


def test_where_the_two_tables_never_agree_they_are_not_held_against_each_other():
    with Machine("20348") as machine:
        for number in range(20):
            machine.tcp(machine["explorer.exe"], (HOME, 50000 + number), (PEER, 443), tables=(1,))
        snapshot = eye_of(machine).read_snapshot()
        assert odd_sockets(snapshot) == {}
        assert [gap.what for gap in snapshot.gaps] == ["connection tables"]
        assert len(snapshot.sockets) == 20


def test_on_the_wire_too_the_tables_are_compared_only_where_they_agree_as_a_rule():
    with Machine("20348") as machine:
        machine.tcp(machine["explorer.exe"], (HOME, 50000), (PEER, 443), tables=(1,))
        eye = eye_of(machine, clock_ns=lambda: 10**12)
        asked = flow("tcp", (HOME, 50000), (PEER, 443))
        assert eye.find_owner(asked).socket.flags == ()
        for number in range(3):
            machine.tcp(machine["explorer.exe"], (HOME, 50001 + number), (PEER, 443))
        eye.read_snapshot()
        assert eye.find_owner(asked).socket.flags == (Flag.ONE_TABLE_ONLY,)


def test_a_connection_that_was_seen_while_it_was_linked_is_not_told_as_in_one_table_later():
    with Machine("20348") as machine:
        now_ns = 1000 * S
        for number in range(4):
            machine.tcp(machine["explorer.exe"], (HOME, 50001 + number), (PEER, 443))
        made = machine.tcp(machine["explorer.exe"], (HOME, 50000), (PEER, 443), tables=(1,))
        eye = eye_of(machine, thorough=False, clock_ns=lambda: now_ns, clock_s=lambda: 0.0)
        asked = replace(flow("tcp", (HOME, 50000), (PEER, 443)), started_ns=now_ns)
        assert eye.find_owner(asked).socket.flags == ()
        machine.net._link(made, 2)
        now_ns += 10 * S
        assert eye.find_owner(asked).socket.flags == ()
        machine.net._unlink(made, 1)
        eye.read_snapshot()
        assert eye.find_owner(asked).socket.flags == (Flag.ONE_TABLE_ONLY,)


@pytest.mark.parametrize("live", [True, False])
def test_a_connection_whose_block_is_made_to_look_free_is_given_away_by_its_port(live):
    with Machine("20348") as machine:
        gone = machine.tcp(machine["explorer.exe"], (HOME, 50000), (PEER, 443))
        machine.tcp_close(gone, poison=False, reuse=False)
        concealed = machine.tcp(machine["lsass.exe"], (HOME, 50001), (PEER, 443), tables=())
        machine.kernel.space.write(concealed.va - 13, b"\0")  # PoolType
        expected = {("tcp", 50001): {Flag.UNLINKED_ENDPOINT}} | ({} if live else {("tcp", 50000): {Flag.STALE}})
        assert odd_sockets(eye_of(machine, live=live).read_snapshot()) == expected
