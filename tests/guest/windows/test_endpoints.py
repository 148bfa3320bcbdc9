import random
import struct

import pytest

from appliance.errors import GuestError, Implausible
from appliance.guest.windows.attach import attach
from appliance.guest.windows.endpoints import BOTH, FIRST, SECOND
from appliance.guest.windows.processes import Processes
from appliance.guest.windows.sockets import Sockets
from appliance.guest.windows.symbols import SymbolStore
from appliance.model import Flag
from tests.guest.windows.network import THEM, US, Eye, Meddled, row
from tests.worlds.windows import FAMILIES, Machine
from tests.worlds.windows.real import REAL, needs_real


def busy(machine: Machine) -> set[tuple[str, str, str, str, str]]:
    """A bit of everything that TCP can do; what should be told of it."""
    explorer, services = machine["explorer.exe"], machine["services.exe"]
    machine.tcp(explorer, (US, 50001), (THEM, 443))
    machine.tcp(explorer, (US, 50002), (THEM, 80), state="SYN_SENT")
    machine.tcp(services, (US, 445), ("10.0.0.9", 51000), state="CLOSE_WAIT")
    machine.tcp(services, ("fe80::5", 50003), ("2001:db8::1", 443), state="FIN_WAIT2")
    machine.tcp(machine.system, (US, 139), ("10.0.0.9", 51001))
    return {
        ("tcp", "ESTABLISHED", f"{US}:50001", f"{THEM}:443", "explorer.exe"),
        ("tcp", "SYN_SENT", f"{US}:50002", f"{THEM}:80", "explorer.exe"),
        ("tcp", "CLOSE_WAIT", f"{US}:445", "10.0.0.9:51000", "services.exe"),
        ("tcp", "FIN_WAIT2", "[fe80::5]:50003", "[2001:db8::1]:443", "services.exe"),
        ("tcp", "ESTABLISHED", f"{US}:139", "10.0.0.9:51001", "System"),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_connection_is_told_with_its_state_and_its_owner(family):
    with Machine(family) as machine:
        expected = busy(machine)
        eye = Eye(machine)
        assert eye.rows() == expected
        found = eye.sockets.walk()
        assert found.gaps == [] and found.torn == 0
        assert not any(socket.flags for socket in eye.walk())


@needs_real
@pytest.mark.parametrize("family", ["17763", "20348"])
def test_a_machine_with_the_structures_of_a_real_build_is_read(family):
    with Machine(family, symbols=REAL) as machine:
        expected = busy(machine)
        kernel = attach(machine.memory(), symbols=SymbolStore((REAL,), None, None))
        processes = Processes(kernel)
        sockets = Sockets(kernel, processes)
        found = sockets.walk()
        assert {row(socket) for socket in sockets.build_all(sockets.own(found.sockets))} == expected
        assert found.gaps == []


def test_a_thousand_connections_in_shared_buckets_are_all_found():
    with Machine(partitions=4) as machine:
        owners = machine["explorer.exe"], machine["services.exe"]
        expected = set()
        for number in range(1000):
            owner, remote = owners[number % 2], (f"198.51.{number % 100}.7", 443)
            machine.tcp(owner, (US, 20000 + number), remote, bucket=number % 16, partition=number % 4)
            expected.add((f"{US}:{20000 + number}", f"{remote[0]}:443", owner.name))
        eye = Eye(machine)
        found = eye.walk()
        assert {row(socket)[2:] for socket in found} == expected and len(found) == 1000
        assert eye.sockets.walk().gaps == []


@pytest.mark.parametrize("size", [256, 300, 1000])
def test_a_table_that_has_grown_beyond_one_directory_is_read_to_its_last_bucket(size):
    with Machine(partitions=1, table_size=size) as machine:
        explorer = machine["explorer.exe"]
        buckets = {0, 127, 128, 129, 255, 256 % size, 299 % size, size // 2, size - 1}
        for number, bucket in enumerate(sorted(buckets)):
            machine.tcp(explorer, (US, 20000 + number), (THEM, 443), bucket=bucket)
        assert len(Eye(machine).walk()) == len(buckets)


def test_more_partitions_than_a_byte_can_count_are_all_read():
    with Machine(partitions=300) as machine:
        for number in range(300):
            machine.tcp(machine["explorer.exe"], (US, 20000 + number), (THEM, 443), partition=number)
        assert len(Eye(machine).walk()) == 300


def test_a_connection_in_one_table_only_is_told_and_flagged():
    with Machine() as machine:
        explorer = machine["explorer.exe"]
        machine.tcp(explorer, (US, 50001), (THEM, 1), tables=(1,))
        machine.tcp(explorer, (US, 50002), (THEM, 2), tables=(2,))
        machine.tcp(explorer, (US, 50003), (THEM, 3))
        machine.tcp(explorer, (US, 50004), (THEM, 4), tables=())
        eye = Eye(machine)
        assert {(socket.local.port, socket.flags) for socket in eye.walk()} == {
            (50001, (Flag.ONE_TABLE_ONLY,)),
            (50002, (Flag.ONE_TABLE_ONLY,)),
            (50003, ()),
        }
        bits = {raw.local.port: raw.tables for raw in eye.sockets.connections}
        assert bits == {50001: FIRST, 50002: SECOND, 50003: BOTH}


def test_an_owner_that_is_hidden_or_has_ended_is_told_as_such():
    with Machine() as machine:
        ghost, gone = machine.process("ghost.exe", hidden=True), machine.process("gone.exe")
        machine.tcp(ghost, (US, 50001), (THEM, 1))
        machine.tcp(gone, (US, 50002), (THEM, 2))
        machine.tcp(machine["explorer.exe"], (US, 50003), (THEM, 3))
        machine.exit(gone)
        found = {socket.local.port: socket for socket in Eye(machine).walk()}
        assert found[50001].owners[0].process.name == "ghost.exe"
        assert found[50001].flags == (Flag.HIDDEN_PROCESS,)
        assert found[50002].owners[0].process.name == "gone.exe"
        assert found[50002].flags == (Flag.OWNER_EXITED,)
        assert found[50003].flags == ()


def ports(eye: Eye) -> set[int]:
    eye.sockets.refresh_connections()
    return {raw.local.port for raw in eye.sockets.connections}


def test_a_refresh_tells_who_came_and_who_left_even_from_the_middle_of_a_chain():
    with Machine(partitions=1) as machine:
        explorer = machine["explorer.exe"]
        here = [machine.tcp(explorer, (US, 50000 + n), (THEM, 443), bucket=5) for n in range(7)]
        eye = Eye(machine)
        eye.walk()
        machine.tcp_close(here.pop(3))  # its neighbours change, its bucket does not
        assert ports(eye) == {each.local[1] for each in here}
        here.append(machine.tcp(explorer, (US, 50100), (THEM, 443), bucket=9))
        machine.tcp_close(here.pop(0))
        assert ports(eye) == {each.local[1] for each in here}
        for each in here:
            machine.tcp_close(each)
        assert ports(eye) == set()


def test_memory_that_is_used_again_for_another_connection_is_told_as_the_other_one():
    with Machine() as machine:
        first = machine.tcp(machine["explorer.exe"], (US, 50001), (THEM, 443), bucket=3)
        eye = Eye(machine)
        eye.walk()
        machine.tcp_close(first, poison=False)
        second = machine.tcp(machine["services.exe"], (US, 50002), ("198.51.100.1", 80), bucket=4)
        assert second.va == first.va  # or the test shows nothing
        assert ports(eye) == {50002}
        assert {row(socket)[4] for socket in eye.walk()} == {"services.exe"}


def test_a_refresh_without_news_reads_heads_only():
    with Machine() as machine:
        for number in range(200):
            machine.tcp(machine["explorer.exe"], (US, 20000 + number), (THEM, 443))
        memory = Meddled(machine.memory(), lambda: None, lambda _: False)
        eye = Eye(machine, memory=memory)
        eye.walk()
        before = memory.reads
        eye.sockets.refresh_connections()
        assert memory.reads - before <= 4


def test_one_new_connection_among_many_costs_a_few_batches_of_reads():
    with Machine() as machine:
        for number in range(200):
            machine.tcp(machine["explorer.exe"], (US, 20000 + number), (THEM, 443))
        memory = Meddled(machine.memory(), lambda: None, lambda _: False)
        eye = Eye(machine, memory=memory)
        eye.walk()
        for number in range(20):
            machine.tcp(machine["services.exe"], (US, 30000 + number), (THEM, 443))
            before = memory.reads
            eye.sockets.refresh_connections()
            assert memory.reads - before <= 10
            assert 30000 + number in {raw.local.port for raw in eye.sockets.connections}


def test_a_connection_with_the_ports_and_in_the_memory_of_another_is_parsed_anew():
    with Machine(partitions=1) as machine:
        machine.tcp(machine["explorer.exe"], (US, 50000), (THEM, 443), bucket=3)
        first = machine.tcp(machine["explorer.exe"], (US, 50001), (THEM, 443), bucket=3)
        eye = Eye(machine)
        eye.walk()
        machine.tcp_close(first, poison=False)
        second = machine.tcp(machine["services.exe"], (US, 50001), ("198.51.100.1", 443), bucket=3)
        assert second.va == first.va  # or the test shows nothing
        machine.tcp(machine["explorer.exe"], (US, 50002), (THEM, 443), bucket=3)  # else no bucket tells
        eye.sockets.refresh_connections()
        told = {(raw.local.port, str(raw.remote.ip)): raw.owner for raw in eye.sockets.connections}
        explorer, services = machine["explorer.exe"].va, machine["services.exe"].va
        assert told == {(50000, THEM): explorer, (50001, "198.51.100.1"): services, (50002, THEM): explorer}


def test_a_look_at_everything_reads_addresses_again_though_the_connection_stayed_as_it_was():
    with Machine() as machine:
        machine.tcp(machine["explorer.exe"], (US, 50001), (THEM, 443))
        machine.tcp(machine["explorer.exe"], (US, 50002), ("198.51.100.1", 443))
        eye = Eye(machine)
        eye.walk()
        raw = next(each for each in eye.sockets.connections if each.local.port == 50002)
        (place,) = (va for va, told in raw.pieces if told == raw.remote.ip.packed)
        machine.kernel.space.write(place, bytes((203, 0, 113, 9)))
        found = {socket.local.port: str(socket.remote.ip) for socket in eye.walk()}
        assert found == {50001: THEM, 50002: "203.0.113.9"}


def test_what_is_left_of_a_connection_is_told_without_an_owner():
    with Machine() as machine:
        past = machine.time_wait((US, 50001), (THEM, 443))
        head = machine.net.head(0, 0, 7)
        machine.net._count(0, 0, 1, 1)
        machine.kernel.insert_head(head, past.va)
        machine.tcp(machine["explorer.exe"], (US, 50002), (THEM, 443))
        eye = Eye(machine)
        assert ("tcp", "TIME_WAIT", f"{US}:50001", f"{THEM}:443", "-") in eye.rows()
        assert eye.sockets.walk().gaps == []


def test_what_only_looks_like_a_third_table_is_passed_over_and_a_lack_of_the_others_is_named():
    with Machine(partitions=1) as machine:
        machine.tcp(machine["explorer.exe"], (US, 50001), (THEM, 443))
        eye = Eye(machine)
        size = machine.kernel.types.offset("_RTL_DYNAMIC_HASH_TABLE.TableSize")
        machine.kernel.space.write(machine.net._headers[0, 0] + size, b"\xff" * 4)
        assert len(eye.walk()) == 1 and eye.sockets.walk().gaps == []
        machine.kernel.space.write(machine.net._headers[0, 2] + size, b"\xff" * 4)
        assert len(eye.walk()) == 1
        assert [gap.why for gap in eye.sockets.walk().gaps] == ["unreadable or implausible"]


def test_a_count_that_does_not_agree_with_the_chains_is_named():
    with Machine(partitions=1) as machine:
        for number in range(5):
            machine.tcp(machine["explorer.exe"], (US, 50000 + number), (THEM, 443), bucket=5)
        machine.net._count(0, 1, 2, 0)  # as if two of them had been unlinked by hand
        eye = Eye(machine)
        found = eye.sockets.walk()
        assert len(found.sockets) == 5
        assert [gap.why for gap in found.gaps] == ["5 entries found, 7 counted by the guest"]


@pytest.mark.parametrize("target", ["itself", "an earlier one", "nowhere", "poison"])
def test_a_chain_that_leads_astray_ends_and_all_others_are_told(target):
    with Machine(partitions=1) as machine:
        explorer = machine["explorer.exe"]
        chain = [machine.tcp(explorer, (US, 50000 + n), (THEM, 443), bucket=5) for n in range(4)]
        machine.tcp(explorer, (US, 50100), (THEM, 443), bucket=6)
        second = chain[2].va + 0x28
        leads = {
            "itself": second,
            "an earlier one": chain[3].va + 0x28,
            "nowhere": 0xFFFF_8000_0000_1000,
            "poison": 0xDDDD_DDDD_DDDD_DDDD,
        }
        machine.kernel.set_u64(second, leads[target])
        eye = Eye(machine)
        found = eye.sockets.walk()
        assert {raw.local.port for raw in found.sockets} == {50000, 50001, 50002, 50003, 50100}  # the other table
        assert any("contradicted itself" in gap.why for gap in found.gaps) and found.torn


def test_connections_that_come_and_go_during_a_look_do_not_harm_those_that_stay():
    with Machine(partitions=2) as machine:
        explorer = machine["explorer.exe"]
        stay = {50000 + n for n in range(60)}
        for port in stay:
            machine.tcp(explorer, (US, port), (THEM, 443), bucket=port % 8)
        chance = random.Random(7)
        passing = []

        def meddle() -> None:
            port = 30000 + chance.randrange(10000)
            passing.append(machine.tcp(explorer, (US, port), (THEM, 443), bucket=chance.randrange(8)))
            if len(passing) > 3:
                machine.tcp_close(passing.pop(chance.randrange(len(passing))), poison=chance.random() < 0.5)

        memory = Meddled(machine.memory(), meddle, lambda number: number % 5 == 0)
        eye = Eye(machine, memory=memory)
        for _ in range(20):
            found = eye.sockets.walk()
            seen = [raw.local.port for raw in found.sockets]
            missing = stay - set(seen)
            assert not missing or found.gaps, missing
            assert all(raw.owner == explorer.va for raw in found.sockets)
            assert all(raw.remote.port == 443 for raw in found.sockets)
        memory._meddle = lambda: None
        settled = eye.sockets.walk()
        assert stay <= {raw.local.port for raw in settled.sockets} and settled.gaps == []


def test_a_partition_table_that_cannot_be_is_refused_by_name():
    with Machine() as machine:
        busy(machine)
        eye = Eye(machine)
        eye.walk()
        place = eye.sockets.symbol("PartitionCount")
        assert place is not None
        machine.kernel.space.write(place, struct.pack("<I", 70_000))
        with pytest.raises(Implausible, match="70000 partitions"):
            eye.sockets.walk()
        machine.kernel.space.write(place, struct.pack("<I", 4))
        assert len(eye.walk()) == 5


def test_random_bytes_never_crash_a_look_and_never_name_a_wrong_process():
    with Machine() as machine:
        busy(machine)
        machine.listener(machine["services.exe"], ("0.0.0.0", 135))
        machine.udp(machine["services.exe"], ("0.0.0.0", 5353))
        names = {process.name for process in machine.all.all}
        eye = Eye(machine)
        eye.walk()
        chance = random.Random(11)
        net = machine.net
        places = [each.va + at for each in machine.truth().connections for at in range(-16, 0x120, 4)]
        places += [net.head(p, t, b) for p in range(4) for t in range(3) for b in range(128)]
        places += [head + at for head in net._headers.values() for at in range(0, 0x40, 4)]
        space = machine.kernel.space
        refused = 0
        for _ in range(200):
            spots = [chance.choice(places) for _ in range(chance.randrange(1, 6))]
            saved = [(va, space.read(va, 4)) for va in spots]
            for va in spots:
                space.write(va, chance.choice([chance.randbytes(4), b"\xff\xff\xff\xff", b"\0\0\0\0"]))
            try:
                found = (eye if chance.random() < 0.8 else Eye(machine)).walk()
                assert {owner.process.name for socket in found for owner in socket.owners} <= names
            except GuestError:
                refused += 1
            for va, data in reversed(saved):
                space.write(va, data)
        assert refused < 200
        assert len(eye.walk()) == 7
