"""Interfaces by name in the network namespace of the ports."""

from __future__ import annotations

import socket
from fcntl import ioctl
from struct import pack
from typing import Final

from appliance.tap.netns import call_in_netns

SIOCGIFNAME: Final = 0x8910
SIOCGIFINDEX: Final = 0x8933  # include/uapi/linux/sockios.h


class Netdevs:
    """A socket stays in the namespace it was made in, also when that has lost its name."""

    def __init__(self, netns: str | None) -> None:
        self._socket = call_in_netns(netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))

    def find(self, ifname: str) -> int:
        """Its ifindex now; 0 when there is none of this name."""
        try:
            answer = ioctl(self._socket, SIOCGIFINDEX, pack("=16si20x", ifname.encode()[:15], 0))
        except OSError:
            return 0
        return int.from_bytes(answer[16:20], "little")

    def has(self, ifindex: int) -> bool:
        """Whether there still is an interface of this index, under whatever name."""
        try:
            ioctl(self._socket, SIOCGIFNAME, pack("=16xi20x", ifindex))
        except OSError:
            return False
        return True

    def close(self) -> None:
        """May be called twice."""
        self._socket.close()
