"""The world outside the guest: its servers and the clients that call on the guest, as processes in the world namespace.

`World` and `Caller` are for the tests; run as a script this file is the process itself.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Protocol, Self, cast

ECHO_PORT, HTTP_PORT, DNS_PORT, SINK_PORT = 7000, 80, 53, 4444
ADDRESSES = ("10.77.0.1", "fd77::1")
NAMES = {"updates.lab.test": ADDRESSES}
THINK_S = 0.15  # the HTTP server takes its time, so that the guest's own ss can see the connection
PAGE = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n" + b"update " * 128


class Enters(Protocol):
    """What of a Network is needed here."""

    def enter(self, *command: str, world: bool = False) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Calls:
    """What a caller did."""

    done: int
    failed: int
    seconds: float


class _Child:
    """A process in the world, ended by its pid."""

    def __init__(self, enter: list[str]) -> None:
        self._process = subprocess.Popen(enter, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        atexit.register(self.close)

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process of the lab's world ended early; its error is on stderr")
        return line

    def close(self) -> None:
        atexit.unregister(self.close)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class World(_Child):
    """Servers on 10.77.0.1 and fd77::1: echo on 7000 (TCP, UDP), HTTP on 80, DNS on 53 (UDP), a TCP sink on 4444.

    `names` maps a host name to its IPv4 and IPv6 address. Listening when made.
    """

    def __init__(self, network: Enters, names: dict[str, tuple[str, str]] | None = None) -> None:
        table = json.dumps(names or NAMES)
        super().__init__(network.enter(sys.executable, "-I", __file__, "serve", table, world=True))
        self._line()


class Caller(_Child):
    """Calls on a guest's servers again and again, ends after `seconds` or `count` calls.

    A call is: connect, send a line that is also an HTTP request, read to the end, close. `pause_s` is between calls,
    `hold_s` between connecting and sending.
    """

    def __init__(
        self,
        network: Enters,
        addresses: list[str],
        *,
        tcp: tuple[int, ...] = (),
        udp: tuple[int, ...] = (),
        seconds: float = 10.0,
        count: int = 1_000_000,
        pause_s: float = 0.0,
        hold_s: float = 0.0,
        threads: int = 1,
    ) -> None:
        bounds = {"seconds": seconds, "count": count, "pause_s": pause_s, "hold_s": hold_s}
        orders = json.dumps([addresses, tcp, udp, threads, bounds])
        super().__init__(network.enter(sys.executable, "-I", __file__, "call", orders, world=True))

    def wait(self) -> Calls:
        """Its result, at its own end."""
        calls = Calls(**json.loads(self._line()))
        self.close()
        return calls


async def _serve(names: dict[str, list[str]]) -> None:
    loop = asyncio.get_running_loop()
    for address in ADDRESSES:
        await asyncio.start_server(_echo, address, ECHO_PORT, backlog=1024)
        await asyncio.start_server(_page, address, HTTP_PORT, backlog=1024)
        await asyncio.start_server(_sink, address, SINK_PORT, backlog=128)
        await loop.create_datagram_endpoint(_UdpEcho, (address, ECHO_PORT))
        await loop.create_datagram_endpoint(lambda: _Dns(names), (address, DNS_PORT))
    print("READY", flush=True)
    await asyncio.Event().wait()


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(4096):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass  # the guest reset the connection
    writer.close()


async def _page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(THINK_S)
        writer.write(PAGE)
        await writer.drain()
    except (OSError, EOFError, asyncio.LimitOverrunError):
        pass
    writer.close()


async def _sink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while await reader.read(4096):
            pass
    except OSError:
        pass
    writer.close()


class _UdpEcho(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.transport.sendto(data, addr)


class _Dns(_UdpEcho):
    """Answers A and AAAA from a table, everything else with NXDOMAIN or no data (RFC 1035 section 4.1)."""

    def __init__(self, names: dict[str, list[str]]) -> None:
        self.names = names

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if len(data) > 17:
            self.transport.sendto(self._answer(data), addr)

    def _answer(self, query: bytes) -> bytes:
        labels, at = [], 12
        while at < len(query) and (length := query[at]):
            labels.append(query[at + 1 : at + 1 + length].decode(errors="replace"))
            at += 1 + length
        question = query[12 : at + 5]
        (kind,) = struct.unpack("!H", question[-4:-2])
        known = self.names.get(".".join(labels).lower())
        record = b""
        if known and kind in (1, 28):
            family, text = (socket.AF_INET, known[0]) if kind == 1 else (socket.AF_INET6, known[1])
            address = socket.inet_pton(family, text)
            record = struct.pack("!HHHIH", 0xC00C, kind, 1, 30, len(address)) + address
        flags = 0x8580 if known else 0x8583
        return query[:2] + struct.pack("!HHHHH", flags, 1, 1 if record else 0, 0, 0) + question + record


def _call(
    addresses: list[str], tcp: list[int], udp: list[int], *, seconds: float, count: int, pause_s: float, hold_s: float
) -> Counter[str]:
    kinds = ((socket.SOCK_STREAM, tcp), (socket.SOCK_DGRAM, udp))
    targets = [(address, port, kind) for address in addresses for kind, ports in kinds for port in ports]
    result: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while True:
        for address, port, kind in targets:
            if time.monotonic() >= end or result.total() >= count:
                return result
            result[_call_once(address, port, kind, hold_s)] += 1
            time.sleep(pause_s)


def _call_once(address: str, port: int, kind: socket.SocketKind, hold_s: float) -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, kind) as sock:
        sock.settimeout(5 if kind == socket.SOCK_STREAM else 0.5)
        try:
            sock.connect((address, port))
            time.sleep(hold_s)
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            while sock.recv(4096) and kind == socket.SOCK_STREAM:
                pass
        except OSError:
            return "failed"
    return "done"


def _main(role: str, orders: str) -> None:
    if role == "serve":
        asyncio.run(_serve(json.loads(orders)))
        return
    addresses, tcp, udp, threads, bounds = json.loads(orders)
    start, results = time.monotonic(), []
    callers = [
        threading.Thread(target=lambda: results.append(_call(addresses, tcp, udp, **bounds))) for _ in range(threads)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    total = sum(results, Counter[str]())
    print(
        json.dumps({"done": total["done"], "failed": total["failed"], "seconds": time.monotonic() - start}), flush=True
    )


if __name__ == "__main__":
    _main(*sys.argv[1:])
