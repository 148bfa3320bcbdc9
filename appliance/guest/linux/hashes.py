"""The hashes by which Linux files sockets, and which variant of them this guest uses.

Bob Jenkins' lookup3 as in include/linux/jhash.h. The secrets of the connection hash are static locals
(``inet_ehash_secret`` and so on, net/ipv4/inet_hashtables.c, net/ipv6/inet6_hashtables.c) which some kernels do not
list as symbols; they are then found as the RIP-relative operands of the functions that use them. Nothing of this is
believed before a live socket's own ``skc_hash`` confirms it: one 32-bit match is proof.

Variants, all in use: the local port inside the hash, or added to it ("inet: change lport contribution to
inet_ehashfn() and inet6_ehashfn()", 6.15); ``__ipv6_addr_jhash`` as jhash_3words(a0 ^ a1, a2, a3) or, since 2025 and in
stable backports, jhash2 of all four words (include/net/ipv6.h).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from itertools import product
from typing import NamedTuple

from appliance.errors import UnreadableMemory
from appliance.guest.kernel import Kernel

M = 0xFFFF_FFFF
JHASH_INITVAL = 0xDEADBEEF
_IN6 = struct.Struct("<4I").unpack
CODE_BYTES = 640  # more than any of these functions is long
MAX_CANDIDATES = 48
SAMPLES = 8


def jhash_final(a: int, b: int, c: int) -> int:
    """``__jhash_final``; returns c."""
    c = ((c ^ b) - ((b << 14 | b >> 18) & M)) & M
    a = ((a ^ c) - ((c << 11 | c >> 21) & M)) & M
    b = ((b ^ a) - ((a << 25 | a >> 7) & M)) & M
    c = ((c ^ b) - ((b << 16 | b >> 16) & M)) & M
    a = ((a ^ c) - ((c << 4 | c >> 28) & M)) & M
    b = ((b ^ a) - ((a << 14 | a >> 18) & M)) & M
    return ((c ^ b) - ((b << 24 | b >> 8) & M)) & M


def jhash_1word(a: int, initval: int) -> int:
    """``jhash_1word``."""
    seed = (initval + JHASH_INITVAL + 4) & M
    return jhash_final((a + seed) & M, seed, seed)


def jhash_3words(a: int, b: int, c: int, initval: int) -> int:
    """``jhash_3words``."""
    seed = initval + JHASH_INITVAL + 12
    return jhash_final((a + seed) & M, (b + seed) & M, (c + seed) & M)


def jhash2_4(address: bytes, initval: int) -> int:
    """``jhash2`` of the four words of an ``in6_addr``."""
    k0, k1, k2, k3 = _IN6(address)
    seed = JHASH_INITVAL + 16 + initval
    a, b, c = (seed + k0) & M, (seed + k1) & M, (seed + k2) & M
    a = ((a - c) ^ (c << 4 | c >> 28)) & M
    c = (c + b) & M
    b = ((b - a) ^ (a << 6 | a >> 26)) & M
    a = (a + c) & M
    c = ((c - b) ^ (b << 8 | b >> 24)) & M
    b = (b + a) & M
    a = ((a - c) ^ (c << 16 | c >> 16)) & M
    c = (c + b) & M
    b = ((b - a) ^ (a << 19 | a >> 13)) & M
    a = (a + c) & M
    c = ((c - b) ^ (b << 4 | b >> 28)) & M
    b = (b + a) & M
    return jhash_final((a + k3) & M, b, c)


def addr_jhash_xor(address: bytes, initval: int) -> int:
    """``__ipv6_addr_jhash`` of older kernels."""
    k0, k1, k2, k3 = _IN6(address)
    return jhash_3words(k0 ^ k1, k2, k3, initval)


def portaddr4(mix: int, address: int, port: int) -> int:
    """``ipv4_portaddr_hash`` (include/net/ip.h); ``address`` as the kernel holds it, a little-endian load."""
    return jhash_1word(address, mix) ^ port


def portaddr6(mix: int, address: bytes, port: int) -> int:
    """``ipv6_portaddr_hash`` (include/net/ipv6.h)."""
    if not any(address):
        return jhash_1word(0, mix) ^ port
    if address.startswith(V4_MAPPED):
        return jhash_1word(int.from_bytes(address[12:], "little"), mix) ^ port
    return jhash2_4(address, mix) ^ port


V4_MAPPED = bytes(10) + b"\xff\xff"
AddressHash = Callable[[bytes, int], int]


class Sample(NamedTuple):
    """A live socket of the connection hash: its tuple, its namespace's mix, and the hash the guest itself stored."""

    laddr: int | bytes
    lport: int
    faddr: int | bytes
    fport: int  # as the kernel holds it: network order, loaded little-endian
    mix: int
    hash: int


class TupleHash:
    """``inet_ehashfn`` and ``inet6_ehashfn`` of one guest. ``ready4``/``ready6`` say which is confirmed."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.ready4 = self.ready6 = False
        self._port_inside4 = self._port_inside6 = True
        self._secret4 = self._secret6 = self._secret_addr = 0
        self._addr_hash: AddressHash = jhash2_4
        self._remote: dict[bytes, int] = {}  # hash of remote addresses seen, bounded

    def v4(self, laddr: int, lport: int, faddr: int, fport: int, mix: int) -> int:
        """``inet_ehashfn``: addresses and ``fport`` as loaded by the kernel, ``lport`` in host order."""
        seed = self._secret4 + mix + JHASH_INITVAL + 12  # jhash_3words
        if self._port_inside4:
            return jhash_final((laddr + seed) & M, (faddr + seed) & M, ((lport << 16 | fport) + seed) & M)
        return (lport + jhash_final((laddr + seed) & M, (faddr + seed) & M, (fport + seed) & M)) & M

    def v6(self, laddr: bytes, lport: int, faddr: bytes, fport: int, mix: int) -> int:
        """``inet6_ehashfn``."""
        remote = self._remote.get(faddr)
        if remote is None:
            if len(self._remote) > 4096:
                self._remote.clear()
            remote = self._remote[faddr] = self._addr_hash(faddr, self._secret_addr)
        local = int.from_bytes(laddr[12:], "little")
        if self._port_inside6:
            return jhash_3words(local, remote, lport << 16 | fport, self._secret6 + mix)
        return (lport + jhash_3words(local, remote, fport, self._secret6 + mix)) & M

    def calibrate4(self, samples: Iterable[Sample]) -> bool:
        """Find the secret and the variant that reproduce a sample's hash."""
        samples = list(samples)[:SAMPLES]
        if not samples or self.ready4:
            return self.ready4
        candidates = self._values("inet_ehash_secret", ("inet_ehashfn", "sk_ehashfn", "__inet_lookup_established"))
        for self._port_inside4, self._secret4 in product((True, False), candidates):
            for s in samples:
                assert isinstance(s.laddr, int) and isinstance(s.faddr, int)
                if self.v4(s.laddr, s.lport, s.faddr, s.fport, s.mix) == s.hash:
                    self.ready4 = True
                    return True
        return False

    def calibrate6(self, samples: Iterable[Sample]) -> bool:
        """Find both secrets and the variants that reproduce a sample's hash."""
        samples = list(samples)[:SAMPLES]
        if not samples or self.ready6:
            return self.ready6
        code = ("inet6_ehashfn", "sk_ehashfn", "__inet6_lookup_established")
        own, address = self._values("inet6_ehash_secret", code), self._values("ipv6_hash_secret", code)
        variants: tuple[AddressHash, ...] = (jhash2_4, addr_jhash_xor)
        for self._addr_hash, self._secret_addr in product(variants, address):
            self._remote.clear()
            for self._port_inside6, self._secret6 in product((True, False), own):
                for s in samples[:2]:
                    assert isinstance(s.laddr, bytes) and isinstance(s.faddr, bytes)
                    if self.v6(s.laddr, s.lport, s.faddr, s.fport, s.mix) == s.hash:
                        self.ready6 = True
                        return True
        self._remote.clear()
        return False

    def _values(self, secret: str, functions: tuple[str, ...]) -> list[int]:
        """Values that may be the secret: of its symbol if there is one, else of every word the code loads."""
        symbol = self._kernel.symbols.find_prefix(secret)
        places = [symbol] if symbol is not None else list(self._operands(functions))
        raws = self._kernel.readv([(place, 4) for place in places])
        values = (int.from_bytes(raw, "little") for raw in raws if raw is not None)
        return list(dict.fromkeys(value for value in values if value))

    def _operands(self, functions: tuple[str, ...]) -> Iterable[int]:
        """Addresses of the 32-bit words that these functions load or add by RIP-relative operands."""
        places: dict[int, None] = {}
        for function in functions:
            start = self._kernel.symbols.find(function)
            if start is None:
                continue
            try:
                code = self._kernel.read(start, CODE_BYTES)
            except UnreadableMemory:
                continue
            for at in range(len(code) - 5):
                # MOV r32, m32 (8B) and ADD r32, m32 (03) with mod 0, r/m 5: RIP + disp32 (Intel SDM vol. 2, 2.2.1.6)
                if code[at] in (0x8B, 0x03) and code[at + 1] & 0xC7 == 0x05:
                    place = start + at + 6 + int.from_bytes(code[at + 2 : at + 6], "little", signed=True)
                    if not place & 3:
                        places[place] = None
        return list(places)[:MAX_CANDIDATES]
