"""The Windows eye as the appliance uses it: full looks, one flow's owner, deadlines, eras."""

import json
from dataclasses import replace
from itertools import count

import pytest

from appliance.errors import GuestGone, UnsupportedGuest
from appliance.guest.windows.attach import attach
from appliance.guest.windows.eye import UNREAD_S, WindowsEye
from appliance.guest.windows.isf import parse_isf
from appliance.model import Direction, Flag, Match, ProcessKey, Reason, Transport
from tests.guest.windows.eyes import Store, eye_of, odd_processes, odd_sockets
from tests.guest.windows.machines import OLD, REAL, make
from tests.guest.windows.network import Meddled, flow
from tests.worlds.windows import FAMILIES, Machine
from tests.worlds.windows.symbols import invented

HOME, PEER = "10.0.0.5", "203.0.113.9"
S = 1_000_000_000
PORTS = range(1100, 1110)  # a client of any era may have them


def old_flow(eye_now_ns, *args, **kwargs):
    """A flow that began ten seconds ago."""
    return replace(flow(*args, **kwargs), started_ns=eye_now_ns - 10 * S)


@pytest.mark.parametrize("name", [*FAMILIES, *OLD, *REAL])
def test_every_era_is_opened_by_looking_and_tells_processes_connections_and_owners(name):
    machine = make(name)
    server = machine.process("server.exe")
    for port in PORTS:
        machine.tcp(server, (HOME, port), (PEER, 443))
    machine.listener(server, ("0.0.0.0", 8080))
    machine.udp(server, ("0.0.0.0", 5353))
    eye = eye_of(machine)
    snapshot = eye.read_snapshot()
    assert (eye.os, eye.live, snapshot.gaps) == ("windows", True, ())
    assert eye.describe.startswith("Windows ")
    names = {process.name.lower() for process in snapshot.processes}
    assert names >= {"system", "smss.exe", "server.exe", "explorer.exe"}
    ends = {(one.protocol, one.local.port, one.remote and one.remote.port) for one in snapshot.sockets}
    assert ends == {
        *((Transport.TCP, port, 443) for port in PORTS),
        (Transport.TCP, 8080, None),
        (Transport.UDP, 5353, None),
    }
    assert {owner.process.pid for one in snapshot.sockets for owner in one.owners} == {server.pid}
    assert all(len(one.owners) == 1 for one in snapshot.sockets)
    assert odd_sockets(snapshot) == {} and odd_processes(snapshot) == {}
    found = eye.find_owner(flow("tcp", (HOME, PORTS[3]), (PEER, 443)))
    assert (found.match, [owner.process.pid for owner in found.owners]) == (Match.EXACT, [server.pid])
    assert eye.find_owner(flow("tcp", (HOME, 1200), (PEER, 443))).match is Match.NONE
    machine.close()


@pytest.mark.parametrize("name", [*FAMILIES, *OLD, *REAL])
def test_what_is_taken_out_of_its_table_or_list_is_told_in_every_era(name):
    machine = make(name)
    server, hidden = machine.process("server.exe"), machine.process("hidden.exe", hidden=True)
    for port in PORTS:
        machine.tcp(server, (HOME, port), (PEER, 443))
    machine.tcp(hidden, (HOME, 1300), (PEER, 443))
    if name in OLD:
        machine.tcp(server, (HOME, 1301), (PEER, 443), linked=False)
    else:
        machine.tcp(server, (HOME, 1301), (PEER, 443), tables=())
    machine.tick(5)
    snapshot = eye_of(machine).read_snapshot()
    assert odd_sockets(snapshot)["tcp", 1300] == {Flag.HIDDEN_PROCESS}
    assert odd_sockets(snapshot)["tcp", 1301] == {Flag.UNLINKED_ENDPOINT}
    assert odd_processes(snapshot) == {hidden.pid: {Flag.HIDDEN_PROCESS}}
    machine.close()


def test_a_connection_of_a_hidden_process_is_bound_to_it_and_its_process_is_flagged():
    with Machine("20348") as machine:
        hidden = machine.process("hidden.exe", hidden=True)
        machine.tcp(hidden, (HOME, 50000), (PEER, 443))
        found = eye_of(machine).find_owner(flow("tcp", (HOME, 50000), (PEER, 443)))
        assert found.match is Match.EXACT
        assert [(one.process.name, one.process.flags) for one in found.owners] == [
            ("hidden.exe", (Flag.HIDDEN_PROCESS,))
        ]


def test_a_connection_on_the_wire_that_no_table_has_is_found_beside_the_others_once_it_is_old():
    with Machine("20348") as machine:
        now_ns = 1000 * S
        victim = machine["explorer.exe"]
        for number in range(20):
            machine.tcp(victim, (HOME, 50000 + number), (PEER, 443))
        eye = eye_of(machine, thorough=False, clock_ns=lambda: now_ns, clock_s=lambda: 0.0)
        eye.read_snapshot()
        unlinked = machine.tcp(machine["lsass.exe"], (HOME, 50100), (PEER, 443), tables=())
        young = replace(flow("tcp", (HOME, 50100), (PEER, 443)), started_ns=now_ns - S // 2)
        assert eye.find_owner(young).match is Match.NONE
        found = eye.find_owner(old_flow(now_ns, "tcp", (HOME, 50100), (PEER, 443)))
        assert (found.match, [one.process.name for one in found.owners]) == (Match.EXACT, ["lsass.exe"])
        assert found.socket.flags == (Flag.UNLINKED_ENDPOINT,)
        assert [(one.kind, one.address, one.weight) for one in found.evidence] == [
            ("unlinked-endpoint", unlinked.va, 2)
        ]
        machine.tcp_close(unlinked)
        assert eye.find_owner(old_flow(now_ns, "tcp", (HOME, 50100), (PEER, 443))).match is Match.NONE


def test_a_first_look_that_has_no_time_for_all_memory_sees_what_lies_beside_the_others():
    with Machine("20348") as machine:
        for number in range(20):
            machine.tcp(machine["explorer.exe"], (HOME, 50000 + number), (PEER, 443))
        machine.tcp(machine["lsass.exe"], (HOME, 50100), (PEER, 443), tables=())
        eye = eye_of(machine, thorough=False, clock_s=lambda: 0.0)
        assert odd_sockets(eye.read_snapshot()) == {("tcp", 50100): {Flag.UNLINKED_ENDPOINT}}
        young = flow("tcp", (HOME, 50100), (PEER, 443))
        assert [one.process.name for one in eye.find_owner(young).owners] == ["lsass.exe"]


def test_misses_do_not_make_the_memory_be_searched_more_often_than_it_rests():
    with Machine("20348") as machine:
        now_ns = 1000 * S
        machine.tcp(machine["explorer.exe"], (HOME, 50000), (PEER, 443))
        eye = eye_of(machine, thorough=False, clock_ns=lambda: now_ns, clock_s=lambda: 0.0)
        eye.read_snapshot()
        assert eye.find_owner(old_flow(now_ns, "tcp", (HOME, 50100), (PEER, 443))).match is Match.NONE
        machine.tcp(machine["lsass.exe"], (HOME, 50100), (PEER, 443), tables=())
        assert eye.find_owner(old_flow(now_ns, "tcp", (HOME, 50100), (PEER, 443))).match is Match.NONE
        now_ns += S
        assert eye.find_owner(old_flow(now_ns, "tcp", (HOME, 50100), (PEER, 443))).match is Match.EXACT


def test_in_an_image_the_unlinked_connection_of_a_recorded_flow_is_found():
    with Machine("17763") as machine:
        machine.tcp(machine["lsass.exe"], (HOME, 50100), (PEER, 443), tables=())
        eye = eye_of(machine, live=False)
        eye.read_snapshot()
        found = eye.find_owner(flow("tcp", (HOME, 50100), (PEER, 443)))
        assert [one.process.name for one in found.owners] == ["lsass.exe"]


def test_what_is_left_of_a_closed_connection_has_no_owner_on_the_wire():
    with Machine("17763") as machine:
        closed = machine.tcp(machine["lsass.exe"], (HOME, 50100), (PEER, 443))
        machine.tcp_close(closed, poison=False, reuse=False)
        eye = eye_of(machine, live=False)
        assert odd_sockets(eye.read_snapshot()) == {("tcp", 50100): {Flag.STALE}}
        assert eye.find_owner(flow("tcp", (HOME, 50100), (PEER, 443))).match is Match.NONE


def test_a_full_look_that_takes_too_long_tells_that_and_nothing_else():
    with Machine("20348") as machine:
        ticks = count()
        eye = eye_of(machine, clock_s=lambda: next(ticks), look_s=5)
        snapshot = eye.read_snapshot()
        assert (snapshot.processes, snapshot.sockets) == ((), ())
        assert [gap.what for gap in snapshot.gaps] == ["full look"]


def test_a_lookup_that_takes_too_long_is_torn():
    with Machine("20348") as machine:
        machine.tcp(machine["lsass.exe"], (HOME, 50100), (PEER, 443))
        ticks = count()
        eye = eye_of(machine, clock_s=lambda: next(ticks), look_s=3)
        found = eye.find_owner(flow("tcp", (HOME, 50100), (PEER, 443)))
        assert (found.match, found.reason) == (Match.NONE, Reason.TORN)


def test_a_sweep_that_is_cut_short_says_how_much_it_left_out_and_suspects_no_port():
    with Machine("20348") as machine:
        machine.tcp(machine["lsass.exe"], (HOME, 50100), (PEER, 443))
        machine.take_port("tcp", 50999)
        now_s = 0.0

        class Slow:
            """Each large piece takes a second."""

            live = True

            def __init__(self, memory):
                self._memory = memory

            def __getattr__(self, name):
                return getattr(self._memory, name)

            def readv(self, spans):
                nonlocal now_s
                now_s += sum(size for _, size in spans) / (1 << 20)
                return self._memory.readv(spans)

        eye = eye_of(machine, memory=Slow(machine.memory()), clock_s=lambda: now_s, look_s=1000)
        eye._sweep_s = 0.25
        snapshot = eye.read_snapshot()
        assert [gap.what for gap in snapshot.gaps] == ["pools"]
        assert "MiB of RAM: not looked at" in snapshot.gaps[0].why
        assert odd_sockets(snapshot) == {}
        assert len(snapshot.sockets) == 1


def test_a_process_is_described_afresh_by_its_identity_and_never_by_its_pid_alone():
    with Machine("20348") as machine:
        process = machine.process("worker.exe")
        eye = eye_of(machine)
        key = ProcessKey(process.pid, process.created_ns)
        assert eye.read_process(key).name == "worker.exe"
        assert eye.read_process(ProcessKey(process.pid, process.created_ns + 100)) is None
        machine.exit(process)
        assert eye.read_process(key) is None


def test_a_hidden_process_can_be_described_and_looked_through():
    with Machine("20348") as machine:
        hidden = machine.process("hidden.exe", hidden=True)
        machine.inject(hidden)
        machine.tick(5)
        eye = eye_of(machine)
        process = eye.read_process(ProcessKey(hidden.pid, hidden.created_ns))
        assert process.flags == (Flag.HIDDEN_PROCESS,)
        assert "injected-pe" in {one.kind for one in eye.find_foreign(process)}


def test_types_that_are_too_few_to_look_into_a_process_cost_only_that():
    with Machine("20348") as machine:
        process = machine.process("notepad.exe")
        machine.tcp(process, (HOME, 50000), (PEER, 443))
        document = json.loads(json.dumps(invented("20348")[0].document))
        del document["user_types"]["_ETHREAD"]["fields"]["StartAddress"]
        few = parse_isf(json.dumps(document).encode())

        class Poor(Store):
            def find(self, pdb):
                return few if pdb == few.pdb else super().find(pdb)

        eye = WindowsEye(attach(machine.memory(), symbols=Poor()))
        (socket,) = (each for each in eye.read_snapshot().sockets if each.remote)
        (owner,) = (each.process for each in socket.owners)
        assert owner.pid == process.pid
        (lack,) = eye.find_foreign(owner)
        assert (lack.kind, lack.weight) == ("gap", 0) and "_ETHREAD.StartAddress" in lack.claim


def test_the_pulse_beats_while_the_guest_runs_and_stops_when_it_is_gone():
    with Machine("20348") as machine:

        class Mortal:
            gone = False

            def __init__(self, memory):
                self._memory = memory

            def __getattr__(self, name):
                return getattr(self._memory, name)

            def check_alive(self):
                if self.gone:
                    raise GuestGone("it ended")

        memory = Mortal(machine.memory())
        eye = eye_of(machine, memory=memory)
        before = eye.read_pulse()
        assert eye.read_pulse() == before
        machine.tick()
        assert eye.read_pulse() > before
        memory.gone = True
        with pytest.raises(GuestGone):
            eye.read_pulse()


def test_an_incoming_connection_belongs_to_its_listener_until_it_is_there():
    with Machine("19041") as machine:
        server = machine["svchost.exe"]
        machine.listener(server, ("0.0.0.0", 445))
        eye = eye_of(machine)
        incoming = flow("tcp", (HOME, 445), (PEER, 50000), Direction.IN)
        assert eye.find_owner(incoming).match is Match.LISTENER
        machine.tcp(server, (HOME, 445), (PEER, 50000))
        found = eye.find_owner(incoming)
        assert (found.match, [one.process.pid for one in found.owners]) == (Match.EXACT, [server.pid])


@pytest.mark.parametrize("step", [3, 11, 23, 61, 127])
def test_while_connections_come_and_go_during_a_look_no_owner_is_wrong_and_nothing_is_odd(step):
    with Machine("20348") as machine:
        here, there = machine["explorer.exe"], machine["lsass.exe"]
        ever = set()
        for number in range(40):
            machine.tcp(here, (HOME, 49700 + number), (PEER, 443), bucket=number % 3)
        steady = {(HOME, 49700 + number) for number in range(40)}
        numbers, living = count(), []

        def meddle():
            number = next(numbers)
            process = (here, there)[number % 2]
            living.append(machine.tcp(process, (HOME, 51000 + number % 3000), (PEER, 443), bucket=number % 3))
            ever.add((51000 + number % 3000, process.pid))
            if len(living) > 5:
                machine.tcp_close(living.pop(0), poison=bool(number % 3))

        memory = Meddled(machine.memory(), meddle, lambda read: read > 400 and not read % step)
        eye = eye_of(machine, memory=memory)
        for _ in range(3):
            snapshot = eye.read_snapshot()
            assert odd_sockets(snapshot) == {}
            told = {(one.local.port, owner.process.pid) for one in snapshot.sockets for owner in one.owners}
            assert {end for end in told if end[0] >= 51000} <= ever
            seen = {one.local.port for one in snapshot.sockets}
            assert snapshot.gaps or seen >= {port for _, port in steady}
        assert ever


class Half:
    """A store that has the kernel's symbols only."""

    def find(self, pdb):
        if pdb.name.startswith("tcpip"):
            raise UnsupportedGuest((f"no symbols for {pdb}",))
        return Store().find(pdb)


def test_without_the_symbols_of_tcpip_processes_are_told_and_connections_are_a_gap():
    with Machine("20348") as machine:
        machine.tcp(machine["lsass.exe"], (HOME, 50100), (PEER, 443))
        ghost = machine.process("ghost.exe", hidden=True)
        eye = WindowsEye(attach(machine.memory(), symbols=Half()), thorough=True)
        snapshot = eye.read_snapshot()
        assert {process.pid for process in snapshot.processes} >= {machine["lsass.exe"].pid, ghost.pid}
        assert snapshot.sockets == ()
        (gap,) = snapshot.gaps
        assert (gap.what, "no symbols for tcpip.pdb" in gap.why) == ("connections and sockets", True)
        found = eye.find_owner(flow("tcp", (HOME, 50100), (PEER, 443)))
        assert (found.match, found.reason, found.final) == (Match.NONE, Reason.NO_MEMORY, True)


def test_a_layout_of_tcpip_that_cannot_be_told_is_a_gap_until_it_can_be():
    with Machine("20348") as machine:
        made = [machine.tcp(machine["lsass.exe"], (HOME, 50100 + n), (PEER, 443)) for n in range(10)]
        sound = [machine.kernel.space.read(one.va + 0x58, 0x40) for one in made]
        for one in made:
            machine.kernel.space.write(one.va + 0x58, b"\xaa" * 0x40)  # no state anywhere
        now = [1000.0]
        eye = eye_of(machine, clock_s=lambda: now[0])
        snapshot = eye.read_snapshot()
        assert snapshot.processes and not snapshot.sockets
        assert [gap.what for gap in snapshot.gaps] == ["connections and sockets"]
        for one, content in zip(made, sound, strict=True):
            machine.kernel.space.write(one.va + 0x58, content)
        asked = flow("tcp", (HOME, 50100), (PEER, 443))
        assert eye.find_owner(asked).reason is Reason.NO_MEMORY
        now[0] += UNREAD_S
        assert eye.find_owner(asked).match is Match.EXACT
