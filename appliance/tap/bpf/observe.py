"""The kernel program on a packet socket: it sees every frame of a port and changes none.

The program runs where a packet socket's filter runs, tells its events, and answers that no byte is to be queued. It
needs no qdisc, so it works beside a foreign one that leaves us no hook, and it sees frames before tc does: also those
that a foreign filter then drops. Sources: packet(7), SO_ATTACH_BPF in socket(7), ``packet_rcv`` in
net/packet/af_packet.c, ``dev_queue_xmit_nit`` and ``__netif_receive_skb_core`` in net/core/dev.c.
"""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from struct import pack
from typing import Final

from appliance.errors import HostError, PermissionRefused, UsageError
from appliance.model import GuestPort
from appliance.tap.netns import call_in_netns

SO_ATTACH_BPF: Final = 50  # include/uapi/asm-generic/socket.h
ETH_P_ALL: Final = 3
ARPHRD: Final = frozenset({1, 772})  # include/uapi/linux/if_arp.h: Ethernet, loopback


class Observation:
    """The program on one port; nothing of it is left when the socket is closed or its process gone."""

    def __init__(self, port: GuestPort, program: int) -> None:
        """Raises UsageError, PermissionRefused, HostError."""
        self.port = port
        self.ifindex = 0
        self._socket = call_in_netns(port.netns, lambda: self._open(program))

    def detach(self) -> None:
        """See nothing more; may be called twice."""
        self._socket.close()

    def _open(self, program: int) -> socket.socket:
        name = self.port.ifname
        try:
            # Protocol 0: nothing is received before it is bound, so no foreign frame is ever seen.
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        except OSError as error:
            raise _explain(error, name) from error
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, pack("=i", program))
            self.ifindex = _find_index(name)
            if self.port.ifindex not in {None, self.ifindex}:
                raise HostError(
                    f"port {name} is another interface by now (index {self.ifindex}, not {self.port.ifindex})"
                )
            sock.bind((name, ETH_P_ALL))
            if (kind := sock.getsockname()[3]) not in ARPHRD:
                raise UsageError(f"port {name} is no Ethernet interface (ARPHRD type {kind})")
        except OSError as error:
            sock.close()
            raise _explain(error, name) from error
        except (HostError, UsageError):
            sock.close()
            raise
        return sock


def _find_index(name: str) -> int:
    with suppress(OSError):  # without errno
        return socket.if_nametoindex(name)
    raise OSError(errno.ENODEV, "no such interface")


def _explain(error: OSError, name: str) -> Exception:
    match error.errno:
        case errno.EPERM | errno.EACCES:
            return PermissionRefused(f"cannot observe port {name}: CAP_NET_RAW is needed; run as root")
        case errno.ENODEV | errno.ENXIO:
            return UsageError(f"there is no port {name}")
        case errno.ENOPROTOOPT | errno.EINVAL:
            return HostError(f"cannot observe port {name}: this kernel takes no eBPF program on a socket")
    return HostError(f"cannot observe port {name}: {error.strerror or error}")
