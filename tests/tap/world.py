"""A guest's port made of a veth pair: one end stays in a "host" namespace (the port), the other is the "guest"."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

GUEST_IP, HOST_IP = "10.77.0.2", "10.77.0.1"
GUEST_IP6, HOST_IP6 = "fd77::2", "fd77::1"
GUEST_MAC = "52:54:00:77:00:02"
PORT = "tapveth0"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


@dataclass(frozen=True)
class World:
    host: str  # namespace names, as ``ip netns`` knows them
    guest: str

    @property
    def host_path(self) -> str:
        return f"/run/netns/{self.host}"

    @property
    def guest_path(self) -> str:
        return f"/run/netns/{self.guest}"


@contextlib.contextmanager
def make_world(tag: str) -> Iterator[World]:
    world = World(f"psh-{tag}-{os.getpid()}", f"psg-{tag}-{os.getpid()}")
    try:
        for name in (world.host, world.guest):
            ip("netns", "add", name)
        peer = ("peer", "name", "eth0", "netns", world.guest, "address", GUEST_MAC)
        ip("-n", world.host, "link", "add", PORT, "type", "veth", *peer)
        for name, dev, v4, v6 in (
            (world.host, PORT, HOST_IP, HOST_IP6),
            (world.guest, "eth0", GUEST_IP, GUEST_IP6),
        ):
            ip("-n", name, "addr", "add", f"{v4}/24", "dev", dev)
            ip("-n", name, "addr", "add", f"{v6}/64", "dev", dev, "nodad")
            ip("-n", name, "link", "set", dev, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield world
    finally:
        for name in (world.host, world.guest):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=10)
