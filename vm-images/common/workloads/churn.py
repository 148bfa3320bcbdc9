"""Opens and closes connections as fast as it can for SECONDS, and writes down who held each of them.

One JSON object per line in LOG: protocol, local, lport, remote, rport (the guest's side is local), direction, pids (all
holders; of a forking server the parent and the child), t (CLOCK_MONOTONIC, before the first packet for "out", after
accept or receipt for "in"), connected (UDP). Lines with `listener` name the holders of a server's socket. Ports: 8001
pre-forked TCP, 8002 forking TCP, 8003 UDP. Prints READY when its servers listen, DONE at the end.
"""

import argparse
import json
import os
import signal
import socket
import time
from collections.abc import Callable

V4, V6 = socket.AF_INET, socket.AF_INET6
PREFORKED, FORKING, DATAGRAM = 8001, 8002, 8003
PREFORKED_CHILDREN = 3

Address = tuple[str, int]


class Log:
    """Lines of all processes in one file; an append of one short line is atomic."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o644)

    def write(self, **line: object) -> None:
        os.write(self.fd, json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def flow(
        self, protocol: str, direction: str, local: Address, remote: Address, pids: list[int], t: float, **more: object
    ) -> None:
        ends = {"local": local[0], "lport": local[1], "remote": remote[0], "rport": remote[1]}
        self.write(protocol=protocol, direction=direction, **ends, pids=pids, t=t, **more)


def tcp_out(log: Log, servers: dict[int, str], port: int) -> None:
    for family, address in servers.items():
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            t = time.monotonic()
            sock.settimeout(5)
            try:
                sock.connect((address, port))
                log.flow("tcp", "out", sock.getsockname(), (address, port), [os.getpid()], t)
                sock.sendall(b"hello\n")
                sock.recv(64)
            except OSError:
                continue


def udp_out(log: Log, servers: dict[int, str], port: int) -> None:
    for connected in (True, False):
        for family, address in servers.items():
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.settimeout(1)
                t = time.monotonic()
                if connected:
                    sock.connect((address, port))
                    sock.send(b"hello\n")
                else:
                    sock.sendto(b"hello\n", (address, port))
                local = (
                    sock.getsockname() if connected else ("0.0.0.0" if family == V4 else "::", sock.getsockname()[1])
                )
                log.flow("udp", "out", local, (address, port), [os.getpid()], t, connected=connected)
                try:
                    sock.recv(64)
                except OSError:
                    continue


def listen(family: int, port: int, kind: int) -> socket.socket:
    sock = socket.socket(family, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == V6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(("0.0.0.0" if family == V4 else "::", port))
    if kind == socket.SOCK_STREAM:
        sock.listen(256)
    return sock


def reply(sock: socket.socket) -> None:
    try:
        sock.settimeout(5)
        sock.recv(1024)
        sock.sendall(b"HTTP/1.0 200 OK\r\n\r\nhello\n")
    except OSError:
        pass
    sock.close()


def accept_and_reply(log: Log, server: socket.socket) -> None:
    sock, remote = server.accept()
    log.flow("tcp", "in", sock.getsockname(), remote, [os.getpid()], time.monotonic())
    reply(sock)


def accept_and_fork(log: Log, server: socket.socket) -> None:
    sock, remote = server.accept()
    t = time.monotonic()
    child = os.fork()
    if child == 0:
        reply(sock)
        os._exit(0)
    log.flow("tcp", "in", sock.getsockname(), remote, [os.getpid(), child], t)
    sock.close()


def answer(log: Log, server: socket.socket) -> None:
    data, remote = server.recvfrom(2048)
    log.flow("udp", "in", server.getsockname(), remote, [os.getpid()], time.monotonic())
    server.sendto(data, remote)


def start(step: Callable[[], None]) -> int:
    """A process that repeats the step until it is killed."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies of the forking server
        while True:
            step()
    return child


def start_servers(log: Log) -> list[int]:
    children = []
    for family in (V4, V6):
        shared = listen(family, PREFORKED, socket.SOCK_STREAM)
        pids = [start(lambda s=shared: accept_and_reply(log, s)) for _ in range(PREFORKED_CHILDREN)]
        shared.close()
        log.write(listener=True, protocol="tcp", lport=PREFORKED, family=family, pids=pids)
        children += pids
        for protocol, port, kind, serve in (
            ("tcp", FORKING, socket.SOCK_STREAM, accept_and_fork),
            ("udp", DATAGRAM, socket.SOCK_DGRAM, answer),
        ):
            sock = listen(family, port, kind)
            pid = start(lambda s=sock, serve=serve: serve(log, s))
            sock.close()
            log.write(listener=True, protocol=protocol, lport=port, family=family, pids=[pid])
            children.append(pid)
    return children


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seconds", type=float, default=10)
    arguments.add_argument("--server", default="10.77.0.1")
    arguments.add_argument("--server6", default="fd77::1")
    arguments.add_argument("--port", type=int, default=7000)
    arguments.add_argument("--log", default="/tmp/churn.jsonl")
    arguments.add_argument("--clients", type=int, default=2, help="processes per kind of client")
    arguments.add_argument("--no-servers", action="store_true", help="outgoing connections only")
    chosen = arguments.parse_args()
    log = Log(chosen.log)
    servers = {V4: chosen.server, V6: chosen.server6}
    children = [] if chosen.no_servers else start_servers(log)
    print("READY", flush=True)
    end = time.monotonic() + chosen.seconds
    for _ in range(chosen.clients):
        for step in (tcp_out, udp_out):
            children.append(start(lambda step=step: step(log, servers, chosen.port)))
    time.sleep(max(0.0, end - time.monotonic()))
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print("DONE", flush=True)


if __name__ == "__main__":
    main()
