"""The classic BPF filter of the tap: how many bytes of which frame the kernel copies to us.

Nothing is dropped, so that what is ignored is still counted; but of a frame that is no IP (ARP, spanning tree, ...)
only the head is copied. Sources: Documentation/networking/filter.rst, include/uapi/linux/{filter,bpf_common}.h.
"""

from __future__ import annotations

import ctypes
from struct import pack
from typing import Final

HEAD: Final = 64  # of a frame that is no IP
ETHERTYPES: Final = (0x0800, 0x86DD, 0x8100, 0x88A8, 0x9100)

_LD_H_ABS: Final = 0x28  # BPF_LD | BPF_H | BPF_ABS
_JEQ_K: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RET_K: Final = 0x06  # BPF_RET | BPF_K


def build_filter(snap: int) -> list[bytes]:
    """Instructions (``struct sock_filter``) that copy ``snap`` bytes of IP and tagged frames, ``HEAD`` of others."""
    checks = len(ETHERTYPES)
    program = [pack("=HBBI", _LD_H_ABS, 0, 0, 12)]
    program += [pack("=HBBI", _JEQ_K, checks - index, 0, kind) for index, kind in enumerate(ETHERTYPES)]
    return [*program, pack("=HBBI", _RET_K, 0, 0, HEAD), pack("=HBBI", _RET_K, 0, 0, snap)]


class Program:
    """A ``struct sock_fprog`` for SO_ATTACH_FILTER; it must live until the kernel has copied it."""

    def __init__(self, instructions: list[bytes]) -> None:
        code = b"".join(instructions)
        self._code = ctypes.create_string_buffer(code, len(code))
        self.option = pack("@HP", len(instructions), ctypes.addressof(self._code))
