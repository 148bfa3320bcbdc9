import random
import time

import pytest

from appliance.model import Direction, Flag, Match, Reason
from tests.guest.windows.network import THEM, US, Eye, Meddled, flow
from tests.worlds.windows import FAMILIES, Machine

IN, OUT = Direction.IN, Direction.OUT


def named(finding) -> tuple[Match, list[str]]:
    return finding.match, [owner.process.name for owner in finding.owners]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_is_its_owners_whether_it_is_new_or_known(family):
    with Machine(family) as machine:
        eye = Eye(machine)
        for number, name in enumerate(("explorer.exe", "services.exe", "lsass.exe")):
            machine.tcp(machine[name], (US, 50000 + number), (THEM, 443))
            asked = flow("tcp", (US, 50000 + number))
            for _ in range(3):
                finding = eye.lookup.find(asked)
                assert named(finding) == (Match.EXACT, [name]) and finding.reason is None and finding.torn == 0
                assert finding.socket is not None and finding.socket.state == "ESTABLISHED"


def test_both_families_of_addresses_are_found():
    with Machine() as machine:
        machine.tcp(machine["lsass.exe"], ("2001:db8::5", 50000), ("2001:db8::1", 443))
        finding = Eye(machine).lookup.find(flow("tcp", ("2001:db8::5", 50000), ("2001:db8::1", 443)))
        assert named(finding) == (Match.EXACT, ["lsass.exe"])


def test_the_state_told_is_that_of_the_moment():
    with Machine() as machine:
        made = machine.tcp(machine["explorer.exe"], (US, 50000), (THEM, 443), state="SYN_SENT")
        eye = Eye(machine)
        assert eye.lookup.find(flow("tcp", (US, 50000))).socket.state == "SYN_SENT"
        machine.tcp_state(made, "ESTABLISHED")
        assert eye.lookup.find(flow("tcp", (US, 50000))).socket.state == "ESTABLISHED"


def test_what_came_in_is_the_listeners_until_the_connection_is_there():
    with Machine() as machine:
        machine.listener(machine["services.exe"], ("0.0.0.0", 8080))
        eye, asked = Eye(machine), flow("tcp", (US, 8080), (THEM, 40000), IN)
        assert named(eye.lookup.find(asked)) == (Match.LISTENER, ["services.exe"])
        machine.tcp(machine["lsass.exe"], (US, 8080), (THEM, 40000))
        assert named(eye.lookup.find(asked)) == (Match.EXACT, ["lsass.exe"])


def test_the_listener_of_the_very_address_comes_before_those_of_all_addresses():
    with Machine() as machine:
        eye = Eye(machine)
        asked = flow("tcp", (US, 8080), (THEM, 40000), IN)
        for owner, address in (("lsass.exe", "::"), ("services.exe", "0.0.0.0"), ("explorer.exe", US)):
            machine.listener(machine[owner], (address, 8080))
            assert named(eye.lookup.find(asked)) == (Match.LISTENER, [owner])
        six = flow("tcp", ("2001:db8::5", 8080), ("2001:db8::1", 40000), IN)
        assert named(eye.lookup.find(six)) == (Match.LISTENER, ["lsass.exe"])


def test_what_the_guest_began_is_no_listeners():
    with Machine() as machine:
        machine.listener(machine["services.exe"], ("0.0.0.0", 50000))
        finding = Eye(machine).lookup.find(flow("tcp", (US, 50000)))
        assert (finding.match, finding.reason, finding.owners) == (Match.NONE, None, ())


def test_a_udp_flow_is_the_connected_sockets_then_that_of_its_address_then_that_of_all():
    with Machine() as machine:
        eye, asked = Eye(machine), flow("udp", (US, 5000), (THEM, 53))
        assert eye.lookup.find(asked).match is Match.NONE
        for owner, address, remote, match in (
            ("lsass.exe", "::", None, Match.UNCONNECTED),
            ("services.exe", "0.0.0.0", None, Match.UNCONNECTED),
            ("winlogon.exe", US, None, Match.UNCONNECTED),
            ("explorer.exe", US, (THEM, 53), Match.EXACT),
        ):
            machine.udp(machine[owner], (address, 5000), remote)
            assert named(eye.lookup.find(asked)) == (match, [owner])
        other = flow("udp", (US, 5000), ("198.51.100.1", 53))
        assert named(eye.lookup.find(other)) == (Match.UNCONNECTED, ["winlogon.exe"])


def test_all_who_share_a_port_are_told_and_it_is_ambiguous():
    with Machine() as machine:
        machine.udp(machine["services.exe"], ("0.0.0.0", 5353))
        machine.udp(machine["explorer.exe"], ("0.0.0.0", 5353))
        finding = Eye(machine).lookup.find(flow("udp", (US, 5353), ("224.0.0.251", 5353)))
        assert {owner.process.name for owner in finding.owners} == {"services.exe", "explorer.exe"}
        assert finding.reason is Reason.AMBIGUOUS


def test_ports_of_the_kernel_are_the_system_process():
    with Machine() as machine:
        machine.listener(machine.system, ("0.0.0.0", 445))
        finding = Eye(machine).lookup.find(flow("tcp", (US, 445), (THEM, 40000), IN))
        assert named(finding) == (Match.LISTENER, ["System"]) and finding.owners[0].process.pid == 4


def test_what_the_kernel_sends_of_its_own_accord_is_the_kernels():
    with Machine() as machine:
        lookup = Eye(machine).lookup
        assert lookup.find(flow("icmp", (US, 0), (THEM, 0), IN, icmp_type=8)).match is Match.KERNEL
        assert lookup.find(flow("icmp", (US, 0), (THEM, 0), OUT, icmp_type=0)).match is Match.KERNEL
        assert lookup.find(flow("icmp", ("fe80::5", 0), ("ff02::1", 0), OUT, icmp_type=135)).match is Match.KERNEL
        assert lookup.find(flow("icmp", (US, 0), (THEM, 0), OUT, icmp_type=8)).match is Match.KERNEL  # IcmpSendEcho
        assert lookup.find(flow("icmp", (US, 0), (THEM, 0), OUT, icmp_type=13)).match is Match.NONE


def test_where_nobody_listens_is_closed_and_an_address_that_is_nobodys_says_nothing():
    with Machine() as machine:
        machine.udp(machine["services.exe"], (US, 137))
        lookup = Eye(machine).lookup
        assert lookup.find(flow("tcp", (US, 8080), (THEM, 40000), IN)).reason is Reason.CLOSED
        assert lookup.find(flow("tcp", ("10.0.0.77", 8080), (THEM, 40000), IN)).reason is None
        assert lookup.find(flow("tcp", (US, 8080), (THEM, 40000), IN, midstream=True)).reason is None
        assert lookup.find(flow("tcp", (US, 8080))).reason is None


def test_what_is_left_of_a_connection_has_no_owner_and_that_is_final():
    with Machine() as machine:
        past = machine.time_wait((US, 50001), (THEM, 443))
        machine.net._count(0, 0, 1, 1)
        machine.kernel.insert_head(machine.net.head(0, 0, 7), past.va)
        finding = Eye(machine).lookup.find(flow("tcp", (US, 50001)))
        assert (finding.match, finding.reason, finding.final) == (Match.NONE, Reason.TIME_WAIT, True)
        assert finding.socket is not None and finding.socket.state == "TIME_WAIT"


def test_the_owner_of_freed_memory_is_not_told():
    with Machine() as machine:
        eye, asked = Eye(machine), flow("tcp", (US, 50000))
        first = machine.tcp(machine["explorer.exe"], (US, 50000), (THEM, 443))
        assert named(eye.lookup.find(asked)) == (Match.EXACT, ["explorer.exe"])
        machine.tcp_close(first, poison=False, reuse=False)  # every byte of it is still there
        assert eye.lookup.find(asked).match is Match.NONE
        machine.tcp(machine["lsass.exe"], (US, 50000), (THEM, 443))
        assert named(eye.lookup.find(asked)) == (Match.EXACT, ["lsass.exe"])


def test_the_owner_of_a_port_that_was_given_up_is_not_told():
    with Machine() as machine:
        eye, asked = Eye(machine), flow("udp", (US, 5000), (THEM, 53))
        first = machine.udp(machine["explorer.exe"], ("0.0.0.0", 5000))
        assert named(eye.lookup.find(asked)) == (Match.UNCONNECTED, ["explorer.exe"])
        machine.tcp_close(first, poison=False, reuse=False)
        assert eye.lookup.find(asked).match is Match.NONE
        machine.udp(machine["lsass.exe"], ("0.0.0.0", 5000))
        assert named(eye.lookup.find(asked)) == (Match.UNCONNECTED, ["lsass.exe"])


def test_a_connection_in_the_memory_of_another_is_found_though_no_head_has_changed():
    with Machine(partitions=1) as machine:
        eye = Eye(machine)
        first = machine.tcp(machine["explorer.exe"], (US, 50000), (THEM, 443), bucket=3)
        eye.walk()
        machine.tcp_close(first)
        second = machine.tcp(machine["lsass.exe"], (US, 50001), (THEM, 443), bucket=3)
        assert second.va == first.va
        assert named(eye.lookup.find(flow("tcp", (US, 50001)))) == (Match.EXACT, ["lsass.exe"])
        assert eye.lookup.find(flow("tcp", (US, 50000))).match is Match.NONE


def test_misses_look_at_everything_only_after_a_rest():
    with Machine() as machine:
        memory = Meddled(machine.memory(), lambda: None, lambda _: False)
        for number in range(50):
            machine.tcp(machine["explorer.exe"], (US, 50000 + number), (THEM, 443))
        eye = Eye(machine, memory=memory)
        eye.lookup.find(flow("tcp", (US, 1)))
        looks = eye.sockets.looks
        for port in range(2, 50):
            eye.lookup.find(flow("tcp", (US, port)))
        assert eye.sockets.looks == looks
        eye.now_ns += 10**9
        eye.lookup.find(flow("tcp", (US, 1)))
        assert eye.sockets.looks == looks + 1


def test_an_owner_that_is_hidden_or_has_ended_is_told_as_such():
    with Machine() as machine:
        ghost, gone = machine.process("ghost.exe", hidden=True), machine.process("gone.exe")
        machine.tcp(ghost, (US, 50001), (THEM, 443))
        machine.tcp(gone, (US, 50002), (THEM, 443))
        machine.exit(gone)
        lookup = Eye(machine).lookup
        finding = lookup.find(flow("tcp", (US, 50001)))
        assert named(finding) == (Match.EXACT, ["ghost.exe"])
        assert Flag.HIDDEN_PROCESS in finding.owners[0].process.flags
        assert finding.socket.flags == (Flag.HIDDEN_PROCESS,)
        finding = lookup.find(flow("tcp", (US, 50002)))
        assert named(finding) == (Match.EXACT, ["gone.exe"]) and finding.socket.flags == (Flag.OWNER_EXITED,)


def test_a_process_in_the_memory_of_the_owner_is_not_told_for_it():
    with Machine() as machine:
        short = machine.process("short.exe")
        made = machine.tcp(short, (US, 50001), (THEM, 443))
        machine.tcp(machine["lsass.exe"], (US, 50002), (THEM, 443))
        eye, asked = Eye(machine), flow("tcp", (US, 50001))
        assert named(eye.lookup.find(asked)) == (Match.EXACT, ["short.exe"])
        machine.delete(short)
        finding = eye.lookup.find(asked)
        assert (finding.match, finding.reason, finding.torn) == (Match.NONE, Reason.TORN, 3)
        assert made.alive


def test_a_connection_that_was_taken_out_of_its_tables_can_still_be_checked_where_it_lies():
    with Machine() as machine:
        for number in range(3):
            made = machine.tcp(machine["explorer.exe"], (US, 50000 + number), (THEM, 443), bucket=3)
        machine.tcp(machine["lsass.exe"], (US, 50003), (THEM, 443), bucket=3)
        eye = Eye(machine)
        eye.walk()
        for table in (1, 2):
            machine.net._unlink(made, table)  # its own links stay as they were
        eye.sockets.refresh_connections()
        raw = eye.sockets.connections.at([made.va])[0]
        assert raw.tables == 0
        checked = eye.sockets.check(raw)
        assert checked is not None and checked[1] is not None and checked[1].name == "explorer.exe"


def test_an_owner_that_is_no_process_is_nobody():
    with Machine() as machine:
        machine.tcp(machine["lsass.exe"], (US, 50002), (THEM, 443))
        made = machine.tcp(machine["explorer.exe"], (US, 50001), (THEM, 443))
        eye = Eye(machine)
        eye.walk()
        for wrong in (made.va, 0xDDDD_DDDD_DDDD_DDDD, machine["explorer.exe"].va + 0x10):
            machine.kernel.set_u64(made.va + machine.net.layout["_TCP_ENDPOINT.Owner"], wrong)
            finding = eye.lookup.find(flow("tcp", (US, 50001)))
            assert finding.match is Match.NONE and finding.owners == ()


@pytest.mark.parametrize("seed", range(2))
def test_nobody_is_ever_told_for_another_while_everything_changes_under_the_eye(seed):
    with Machine(partitions=2) as machine:
        chance = random.Random(seed)
        owners = [machine[name] for name in ("explorer.exe", "services.exe", "lsass.exe", "winlogon.exe")]
        living = {}  # local port: endpoint
        past = {port: set() for port in range(50000, 50012)}  # every name that ever had a port during one look

        def meddle() -> None:
            port = chance.choice(list(past))
            if port in living:
                machine.tcp_close(living.pop(port), poison=chance.random() < 0.3, reuse=chance.random() < 0.7)
            if chance.random() < 0.7:
                owner = chance.choice(owners)
                living[port] = machine.tcp(owner, (US, port), (THEM, 443), bucket=chance.randrange(3))
                past[port].add(owner.name)

        memory = Meddled(machine.memory(), meddle, lambda _: chance.random() < 0.08)
        eye = Eye(machine, memory=memory)
        told = 0
        for _ in range(400):
            eye.now_ns += 30_000_000
            meddle()
            port = chance.choice(list(past))
            past[port] = {living[port].process.name} if port in living else set()
            finding = eye.lookup.find(flow("tcp", (US, port)))
            names = {owner.process.name for owner in finding.owners}
            assert names <= past[port], (names, past[port])
            told += bool(names)
        assert told > 100


def test_a_known_connection_is_found_in_a_few_reads():
    with Machine() as machine:
        for number in range(100):
            machine.tcp(machine["explorer.exe"], (US, 50000 + number), (THEM, 443))
        memory = Meddled(machine.memory(), lambda: None, lambda _: False)
        eye = Eye(machine, memory=memory)
        eye.walk()
        asked = [flow("tcp", (US, 50000 + number)) for number in range(100)]
        for each in asked:
            eye.lookup.find(each)
        before = memory.reads
        for each in asked:
            assert eye.lookup.find(each).match is Match.EXACT
        assert memory.reads - before == 200


def test_a_look_up_costs_no_more_than_a_small_part_of_a_look_at_everything():
    with Machine() as machine:
        for number in range(1000):
            machine.tcp(machine["explorer.exe"], (US, 20000 + number), (THEM, 443), bucket=number % 128)
        eye = Eye(machine)
        eye.sockets.walk()
        asked = [flow("tcp", (US, 20000 + number)) for number in range(0, 1000, 20)]

        def best_of(times: int, work) -> float:
            taken = []
            for _ in range(times):
                began = time.perf_counter()
                work()
                taken.append(time.perf_counter() - began)
            return min(taken)

        whole = best_of(3, eye.sockets.walk)
        refresh = best_of(20, eye.sockets.refresh_connections)
        find = min(best_of(5, lambda each=each: eye.lookup.find(each)) for each in asked)
        print(f"whole {whole * 1e3:.1f} ms, refresh {refresh * 1e3:.2f} ms, one look-up {find * 1e6:.0f} us")
        assert refresh * 10 < whole and find * 100 < whole
