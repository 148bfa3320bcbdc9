"""A machine made of bytes as the RAM of a real QEMU with a real port: what the appliance finds on a hypervisor.

QEMU is started and never runs a single instruction (``-S``): whoever made the RAM is the guest. Frames that are written
to the tap's own descriptor are frames that the guest sends.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import threading
from ipaddress import ip_address
from pathlib import Path

from appliance.tap.netns import call_in_netns
from lab.network import Network, Port

TUNSETIFF, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x400454CA, 0x0002, 0x1000, 0x4000  # include/uapi/linux/if_tun.h
VNET_HEADER = bytes(10)  # struct virtio_net_hdr: no offload is asked for
SYN, ACK, FIN, RST = 0x02, 0x10, 0x01, 0x04
GATEWAY = "52:54:00:77:ff:01"  # nobody: what is sent there is seen on the port and answered by no one


class Hosted:
    """One QEMU whose RAM is the file ``ram``, on a port of the lab's network."""

    def __init__(
        self, network: Network, ram: Path, *, name: str = "win-01", uuid: str | None = None, shared: bool = True
    ) -> None:
        self.network, self.port = network, network.add_port()
        self.fd = call_in_netns(str(network.path()), lambda: _open_tap(self.port))
        size = ram.stat().st_size
        memory = ["-m", str(size >> 20)]
        if shared:
            memory += ["-object", f"memory-backend-file,id=ram,size={size},mem-path={ram},share=on"]
            machine = "pc,memory-backend=ram,accel=tcg"
        else:
            memory += ["-device", f"loader,file={ram},addr=0,force-raw=on"]
            machine = "pc,accel=tcg"
        command = ["qemu-system-x86_64", "-name", name, "-machine", machine, "-cpu", "qemu64", *memory]
        command += ["-uuid", uuid] if uuid is not None else []
        command += ["-nodefaults", "-display", "none", "-S", "-netdev", f"tap,id=n0,fd={self.fd}"]
        command += ["-device", f"virtio-net-pci,netdev=n0,mac={self.port.mac},romfile="]
        self._process = subprocess.Popen(
            network.enter(*command), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=(self.fd,)
        )
        self.pid = self._process.pid
        self._lock = threading.Lock()

    def send(self, frame: bytes) -> None:
        """Send a frame as the guest."""
        with self._lock:
            os.write(self.fd, VNET_HEADER + frame)

    def tcp(self, local: tuple[str, int], remote: tuple[str, int], flags: int, seq: int = 1, data: bytes = b"") -> None:
        """Send one TCP segment as the guest."""
        segment = struct.pack(">HHIIBBHHH", local[1], remote[1], seq, 0, 0x50, flags, 64240, 0, 0) + data
        self.send(self._frame(local[0], remote[0], 6, segment))

    def udp(self, local: tuple[str, int], remote: tuple[str, int], data: bytes = b"x") -> None:
        """Send one datagram as the guest."""
        datagram = struct.pack(">HHHH", local[1], remote[1], 8 + len(data), 0) + data
        self.send(self._frame(local[0], remote[0], 17, datagram))

    def _frame(self, source: str, target: str, protocol: int, payload: bytes) -> bytes:
        macs = bytes.fromhex((GATEWAY + self.port.mac).replace(":", ""))
        ends = ip_address(source).packed + ip_address(target).packed
        pseudo = ends + struct.pack(">IHBB", len(payload), 0, 0, protocol)
        check_at = 16 if protocol == 6 else 6
        check = _checksum(pseudo + payload)
        payload = payload[:check_at] + check.to_bytes(2, "big") + payload[check_at + 2 :]
        if len(ends) == 32:
            return macs + b"\x86\xdd" + struct.pack(">IHBB", 6 << 28, len(payload), protocol, 64) + ends + payload
        header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0x4000, 64, protocol, 0) + ends
        header = header[:10] + _checksum(header).to_bytes(2, "big") + header[12:]
        return macs + b"\x08\0" + header + payload

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        os.close(self.fd)
        self.network.remove_port(self.port)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_tap(port: Port) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    request = struct.pack("16sH22x", port.ifname.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
    fcntl.ioctl(fd, TUNSETIFF, request)
    return fd


def _checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
