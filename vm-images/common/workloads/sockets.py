"""Builds at least COUNT sockets of every kind Linux has words for, holds them, and prints READY.

TIME_WAIT lasts 60 s and cannot be held: SIGUSR1 makes the short-lived kinds anew and prints READY again. Ends when
killed.
"""

import argparse
import ctypes
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

V4, V6 = int(socket.AF_INET), int(socket.AF_INET6)
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
LOOPBACK = {V4: "127.0.0.1", V6: "::1"}
SILENT = {
    V4: "10.77.0.200",
    V6: "fd77::200",
}  # nobody has these addresses; a fixed neighbour entry swallows what is sent
CLONE_NEWNET, CLONE_NEWPID = 0x40000000, 0x20000000
CONTAINER = "/sys/fs/cgroup/system.slice/docker-" + "0123456789abcdef" * 4 + ".scope"
PER_WORKER = 24

held: list[object] = []


def listener(family: int, *, dual: bool = False) -> socket.socket:
    """A TCP listener on a free port of all addresses."""
    sock = socket.socket(family, TCP)
    if family == V6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
    sock.bind(("::" if family == V6 else "0.0.0.0", 0))
    sock.listen(64)
    held.append(sock)
    return sock


def client(family: int, port: int, host: str | None = None, kind: int = TCP) -> socket.socket:
    """A connected socket."""
    sock = socket.socket(family, kind)
    sock.connect((host or LOOPBACK[family], port))
    held.append(sock)
    return sock


def pair(server: socket.socket, host: str | None = None) -> tuple[socket.socket, socket.socket]:
    """Both ends of a new connection, over loopback if no other address is named."""
    near = client(server.family, server.getsockname()[1], host)
    far, _ = server.accept()
    held.append(far)
    return near, far


def worker(hosts: dict[int, str]) -> None:
    """A listener with four connections per family, and UDP sockets of both kinds."""
    for family in (V4, V6):
        server = listener(family)
        for _ in range(4):
            pair(server, hosts[family])
        receiver = socket.socket(family, UDP)
        receiver.bind((hosts[family], 0))
        unbound = socket.socket(family, UDP)
        unbound.bind(("::" if family == V6 else "0.0.0.0", 0))
        held.extend((receiver, unbound))
        client(family, receiver.getsockname()[1], hosts[family], kind=UDP)


def world(addresses: dict[int, str], port: int) -> None:
    """Connections to a server outside the guest."""
    for family, address in addresses.items():
        for _ in range(5):
            client(family, port, address)
        client(family, port, address, UDP)


def v4_mapped() -> None:
    """IPv4 connections to a listener that is an IPv6 socket."""
    server = listener(V6, dual=True)
    for _ in range(3):
        client(V4, server.getsockname()[1])
        held.append(server.accept()[0])


def shared_by_fork() -> None:
    """One connection and one listener that three processes hold."""
    pair(listener(V4))
    for _ in range(2):
        if os.fork() == 0:
            sleep_for_ever()


def opened_by_thread() -> None:
    """A connection opened by a thread that is not the first of its process."""
    server = listener(V6)

    def live() -> None:
        pair(server)
        done.set()
        time.sleep(1e6)

    done = threading.Event()
    threading.Thread(target=live, daemon=True).start()
    done.wait(30)


def other_user() -> None:
    """A process that has given up root."""
    os.setgid(33)
    os.setuid(33)
    pair(listener(V4))


def backlog() -> None:
    """Connections nobody has accepted yet: they belong to no process, their listener does."""
    for family in (V4, V6):
        server = listener(family)
        for _ in range(3):
            client(family, server.getsockname()[1])


def half_closed() -> None:
    """CLOSE_WAIT and FIN_WAIT2, held."""
    near, _ = pair(listener(V4))
    near.shutdown(socket.SHUT_WR)


def raw_and_packet() -> None:
    """Sockets outside the TCP and UDP tables."""
    held.append(socket.socket(V4, socket.SOCK_RAW, socket.IPPROTO_ICMP))
    held.append(socket.socket(V6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6))
    held.append(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))


def namespaces() -> None:
    """Another network and pid namespace, in a cgroup as a container has it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET | CLONE_NEWPID) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    Path(CONTAINER).mkdir(parents=True, exist_ok=True)
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        Path(CONTAINER, "cgroup.procs").write_text("0")
        subprocess.run(["/usr/bin/ip", "link", "set", "lo", "up"], check=True)
        worker(LOOPBACK)
        os.write(write_end, b"x")
        sleep_for_ever()
    os.close(write_end)
    if not os.read(read_end, 1):
        raise OSError("the container did not start")


def time_wait() -> None:
    """Connections whose first closer was the client."""
    for family in (V4, V6):
        server = listener(family)
        for _ in range(4):
            near, far = pair(server)
            near.close()
            far.recv(1)
            far.close()


def silent_peers(own: dict[int, str]) -> None:
    """SYN_RECV by SYNs sent in the name of a peer that never answers, and SYN_SENT to that peer."""
    for family, address in own.items():
        server = listener(family)
        for number in range(3):
            send_syn(family, address, server.getsockname()[1], 40000 + number + server.fileno() * 8)
        waiting = socket.socket(family, TCP)
        waiting.setblocking(False)
        waiting.connect_ex((SILENT[family], 9))
        held.append(waiting)


def send_syn(family: int, to: str, port: int, from_port: int) -> None:
    """One SYN with SILENT as its sender (RFC 9293 section 3.1 for the header and its checksum)."""
    source, target = socket.inet_pton(family, SILENT[family]), socket.inet_pton(family, to)
    tcp = struct.pack("!HHIIBBHHH", from_port, port, 1, 0, 5 << 4, 2, 64240, 0, 0)
    checked = source + target + struct.pack("!II", len(tcp), 6) + tcp
    tcp = tcp[:16] + struct.pack("!H", checksum(checked)) + tcp[18:]
    if family == V4:
        header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0, source, target)
    else:
        header = struct.pack("!IHBB16s16s", 6 << 28, len(tcp), 6, 64, source, target)
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        sock.sendto(header + tcp, (to, 0) if family == V4 else (to, 0, 0, 0))


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def in_process(build: Callable[[], None]) -> None:
    """Run it in a process of its own that then keeps what it built; return when it is built."""
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.close(read_end)
        build()
        os.write(write_end, b"x")
        os.close(write_end)
        sleep_for_ever()
    os.close(write_end)
    if not os.read(read_end, 1):
        raise SystemExit(f"{build.__name__} failed")
    os.close(read_end)


def sleep_for_ever() -> None:
    while True:
        time.sleep(1e6)


def own_address(family: int, towards: str) -> str:
    with socket.socket(family, UDP) as sock:
        sock.connect((towards, 9))
        return str(sock.getsockname()[0])


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--count", type=int, default=1000)
    arguments.add_argument("--server", help="an IPv4 address with an echo server")
    arguments.add_argument("--server6", help="an IPv6 address with one")
    arguments.add_argument("--port", type=int, default=7000)
    arguments.add_argument("--own", action="store_true", help="connect to our own address, not over loopback")
    chosen = arguments.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    for address in SILENT.values():
        neighbour = ["/usr/bin/ip", "neigh", "replace", address, "lladdr", "02:00:00:00:02:00", "dev", "eth0"]
        subprocess.run([*neighbour, "nud", "permanent"], check=True)
    Path("/proc/sys/net/ipv4/tcp_synack_retries").write_text("8")
    Path("/proc/sys/net/ipv4/tcp_syn_retries").write_text("8")

    hosts = {f: own_address(f, address) if chosen.own else LOOPBACK[f] for f, address in SILENT.items()}
    servers: dict[int, str] = {f: a for f, a in ((V4, chosen.server), (V6, chosen.server6)) if a}
    special = [
        v4_mapped,
        shared_by_fork,
        opened_by_thread,
        other_user,
        backlog,
        half_closed,
        raw_and_packet,
        namespaces,
    ]
    for build in special:
        in_process(build)
    if servers:
        in_process(lambda: world(servers, chosen.port))
    for _ in range(-(-chosen.count // PER_WORKER)):
        in_process(lambda: worker(hosts))
    while True:
        time_wait()
        silent_peers({family: own_address(family, address) for family, address in SILENT.items()})
        print("READY", flush=True)
        signal.sigwait({signal.SIGUSR1})


if __name__ == "__main__":
    main()
