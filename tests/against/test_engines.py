"""Two independent engines on the same live guest: volatility3 and drgn must see what we see.

Both look at sockets from the descriptors' side, we from the kernel's hash tables; what only one side can see is named
here, case by case. The guest is quiet; what comes and goes all the same is caught by looking before and after.
"""

from dataclasses import dataclass
from ipaddress import ip_address

import pytest

from appliance.guest.attach import attach
from appliance.guest.linux.eye import LinuxEye
from appliance.memory.qemu import open_qemu
from appliance.model import Missing, Snapshot, Transport
from lab.guest import boot
from lab.image import build
from plugins.parasight.btf import Btf
from plugins.parasight.isf import make_isf
from plugins.parasight.symbols import read_symbols
from tests.against import drgn_reader
from tests.against.symbols import parse_kallsyms
from tests.against.volatility import Volatility, write_isf

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

WORKLOAD = "exec python3 -S -E /opt/workloads/sockets.py --count 200 --server 10.77.0.1 --server6 fd77::1"
IDLE = """import socket, time
s = socket.socket()
s.bind(("127.0.0.1", 4321))
print("READY", flush=True)
time.sleep(1e6)"""
TRANSPORTS = {1: Transport.TCP, 2: Transport.UDP, 3: Transport.RAW}  # by socket type
TCP_CLOSE = 7  # include/net/tcp_states.h


@dataclass
class Worlds:
    """Everything the engines said, between two looks of ours."""

    before: Snapshot
    after: Snapshot
    drgn_processes: dict
    drgn_described: dict
    drgn_sockets: list
    drgn_linear: list
    pslist: list
    sockstat: list


@pytest.fixture(scope="module")
def crowded(network):
    """Volatility cannot page with five levels, hence la57=off."""
    with boot(build("debian-12-cloud"), network, name="crowded", cpu="max,la57=off") as guest:
        guest.spawn(WORKLOAD).wait_for("READY")
        guest.spawn(["/usr/bin/python3", "-S", "-E", "-c", IDLE]).wait_for("READY")
        yield guest


@pytest.fixture(scope="module")
def kernel(crowded):
    memory = open_qemu(crowded.pid)
    yield attach(memory, cache=False)
    memory.close()


@pytest.fixture(scope="module")
def types(crowded) -> Btf:
    """As the guest's own kernel hands them out."""
    return Btf(crowded.get("/sys/kernel/btf/vmlinux"))


@pytest.fixture(scope="module")
def symbols(crowded) -> dict[str, int]:
    return parse_kallsyms(crowded.get("/proc/kallsyms").decode())


@pytest.fixture(scope="module")
def worlds(kernel, types, symbols, tmp_path_factory) -> Worlds:
    eye = LinuxEye(kernel)
    isf = write_isf(make_isf(types, symbols, kernel.image.va), tmp_path_factory.mktemp("isf") / "kernel.json")
    volatility = Volatility(kernel, isf)
    walking = drgn_reader.open_program(kernel, types, symbols, paging="drgn")
    linear = drgn_reader.open_program(kernel, types, symbols, paging="linear")
    return Worlds(
        before=eye.read_snapshot(),
        drgn_processes=drgn_reader.list_processes(walking),
        drgn_described=drgn_reader.describe_processes(walking),
        drgn_sockets=drgn_reader.list_sockets(walking),
        drgn_linear=drgn_reader.list_sockets(linear),
        pslist=volatility.run("pslist"),
        sockstat=volatility.run("sockstat"),
        after=eye.read_snapshot(),
    )


def between(before: dict, seen: dict, after: dict) -> None:
    """All that stayed is seen as it is, and nothing is seen that was at neither time."""
    stable = {key: value for key, value in before.items() if after.get(key) == value}
    assert len(stable) >= 0.95 * len(before), "the guest is not quiet"
    assert {key: seen.get(key) for key in stable} == stable
    assert {key: value for key, value in seen.items() if value not in (before.get(key), after.get(key))} == {}


# -- what all engines build on --


def test_the_type_information_is_byte_for_byte_the_guests_own(kernel, types):
    assert kernel.types.blob == types.blob


def test_every_symbol_is_where_the_guest_says(kernel, symbols):
    assert read_symbols(kernel) == symbols


def test_a_second_reader_of_btf_finds_every_member_at_the_same_place(kernel, types):
    names = "task_struct sock sock_common inet_sock tcp_sock udp_sock socket file files_struct fdtable net cred nsproxy"
    names += " mm_struct vm_area_struct inode dentry inet_timewait_sock request_sock inet_hashinfo udp_table css_set"
    checked = 0
    for name in names.split():
        record = types.by_name[4, name]
        assert kernel.types.size(name) == record.value
        for member in types.members(record):
            if member.name:
                field = kernel.types.field(f"{name}.{member.name}")
                assert 8 * field.offset + field.bit == member.bit_offset, (name, member)
                checked += 1
    assert checked > 800


# -- processes --


def named(snapshot: Snapshot) -> dict:
    return {process.pid: process.name for process in snapshot.processes}


def test_drgn_lists_the_same_processes(worlds):
    between(named(worlds.before), worlds.drgn_processes, named(worlds.after))


def test_drgn_describes_every_process_alike(worlds):
    def described(snapshot):
        return {
            one.pid: (one.path, one.command, one.parent_pid, one.uid, one.key.started_ns, one.cgroup, one.netns)
            for one in snapshot.processes
        }

    def text(value):
        return Missing.NOT_APPLICABLE if value is None else value.decode().strip()

    seen = {
        pid: (text(one.path), text(one.command), one.parent_pid, one.uid, one.started_ns, text(one.cgroup), one.netns)
        for pid, one in worlds.drgn_described.items()
    }
    between(described(worlds.before), seen, described(worlds.after))


def test_volatility_lists_the_same_processes(worlds):
    between(named(worlds.before), {row["PID"]: row["COMM"] for row in worlds.pslist}, named(worlds.after))


def test_volatility_agrees_on_parents_and_users(worlds):
    def described(snapshot):
        return {process.pid: (process.parent_pid, process.uid) for process in snapshot.processes}

    seen = {row["PID"]: (row["PPID"], row["UID"]) for row in worlds.pslist}
    between(described(worlds.before), seen, described(worlds.after))


# -- sockets --


def held(snapshot: Snapshot) -> dict:
    """Our sockets with an owner, by what is compared: all that the descriptors' side can see of them."""
    return {
        one.address: (
            one.protocol,
            None if one.protocol is Transport.PACKET else (one.local.ip, one.local.port),
            (one.remote.ip, one.remote.port) if one.remote else None,
            one.netns,
            frozenset((owner.process.pid, fd) for owner in one.owners for fd in owner.fds),
        )
        for one in snapshot.sockets
        if one.owners
    }


def by_drgn(found: list) -> dict:
    holders: dict = {}
    for one in found:
        holders.setdefault(one.sock, set()).add((one.pid, one.fd))
    return {
        one.sock: (
            Transport.PACKET if one.family == drgn_reader.AF_PACKET else TRANSPORTS[one.kind],
            one.local,
            one.remote if one.remote and one.remote[1] else None,
            one.netns,
            frozenset(holders[one.sock]),
        )
        for one in found
        if not is_idle(one.kind, one.state)
    }


def is_idle(kind: int, state: int) -> bool:
    """A TCP socket that neither listens nor is connected: in no table, so neither we nor ss can see it."""
    return kind == 1 and state == TCP_CLOSE


def by_volatility(rows: list) -> dict:
    kinds = {"STREAM": Transport.TCP, "DGRAM": Transport.UDP, "RAW": Transport.RAW}
    inet = [row for row in rows if row["Family"] in ("AF_INET", "AF_INET6")]
    packet = [row for row in rows if row["Family"] == "AF_PACKET"]
    holders: dict = {}
    for row in inet + packet:
        holders.setdefault(row["Sock Offset"], set()).add((row["PID"], row["FD"]))
    found = {}
    for row in inet:
        remote = (ip_address(row["Destination Addr"]), int(row["Destination Port"]))
        found[row["Sock Offset"]] = (
            kinds[row["Type"]],
            (ip_address(row["Source Addr"]), int(row["Source Port"])),
            remote if remote[1] else None,
            row["NetNS"],
            frozenset(holders[row["Sock Offset"]]),
        )
        if row["Type"] == "STREAM" and row["State"] == "CLOSE":
            del found[row["Sock Offset"]]
    for row in packet:
        offset = row["Sock Offset"]
        found[offset] = (Transport.PACKET, None, None, row["NetNS"], frozenset(holders[offset]))
    return found


def plain(sockets: dict) -> dict:
    """With addresses cut to 48 bits, as Volatility prints them."""
    return {address & (1 << 48) - 1: value for address, value in sockets.items()}


def test_drgn_which_walks_the_page_tables_itself_sees_the_same_sockets_and_owners(worlds):
    assert len(held(worlds.before)) > 200
    between(held(worlds.before), by_drgn(worlds.drgn_sockets), held(worlds.after))


def test_drgn_sees_the_same_through_the_direct_map(worlds):
    between(held(worlds.before), by_drgn(worlds.drgn_linear), held(worlds.after))


def test_volatility_sees_the_same_sockets_and_owners(worlds):
    between(plain(held(worlds.before)), by_volatility(worlds.sockstat), plain(held(worlds.after)))


def test_volatility_agrees_on_the_states_of_tcp_and_knows_none_of_udp(worlds):
    """It prints ``socket->state`` for datagrams, which the kernel leaves at SS_UNCONNECTED even after connect()."""
    rows = {row["Sock Offset"]: row for row in worlds.sockstat}
    states = set()
    for one in worlds.before.sockets:
        row = rows.get(one.address & (1 << 48) - 1)
        if row is not None and one.protocol is Transport.TCP:
            assert row["State"] == one.state
            states.add(one.state)
        elif row is not None:
            assert row["State"] == "UNCONNECTED"
    assert {"ESTABLISHED", "LISTEN", "SYN_SENT", "CLOSE_WAIT", "FIN_WAIT2"} <= states


# -- explained differences --


def test_only_we_see_sockets_without_a_descriptor(worlds):
    """TIME_WAIT and SYN_RECV are mini sockets; what waits to be accepted has no file yet."""
    ownerless = [one for one in worlds.before.sockets if not one.owners]
    listeners = {one.local.port for one in worlds.before.sockets if one.state == "LISTEN"}
    assert {one.state for one in ownerless} == {"TIME_WAIT", "SYN_RECV", "ESTABLISHED"}
    assert all(one.local.port in listeners for one in ownerless if one.state == "ESTABLISHED")
    seen = {one.sock for one in worlds.drgn_sockets}
    assert seen.isdisjoint(one.address for one in ownerless)
    low = {address & (1 << 48) - 1 for address in (one.address for one in ownerless)}
    assert low.isdisjoint(row["Sock Offset"] for row in worlds.sockstat)


def test_only_the_descriptors_side_sees_a_tcp_socket_that_is_in_no_table(worlds):
    idle = [one for one in worlds.drgn_sockets if is_idle(one.kind, one.state)]
    assert 4321 in {one.local[1] for one in idle}
    assert {one.sock for one in idle}.isdisjoint(one.address for one in worlds.before.sockets)
    assert any(row["State"] == "CLOSE" and row["Source Port"] == "4321" for row in worlds.sockstat)


def test_volatility_names_the_namespace_of_the_task_which_here_is_that_of_the_socket(worlds):
    assert len({row["NetNS"] for row in worlds.sockstat if row["Family"] == "AF_INET"}) == 2
