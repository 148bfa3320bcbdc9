"""The hashes, against vectors computed by a C transcript of include/linux/jhash.h, and their calibration."""

from typing import ClassVar

from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import UnreadableMemory
from appliance.guest.linux.hashes import (
    Sample,
    TupleHash,
    addr_jhash_xor,
    jhash2_4,
    jhash_1word,
    jhash_3words,
    portaddr4,
    portaddr6,
)

CODE, DATA = 0xFFFF_FFFF_8100_0000, 0xFFFF_FFFF_8200_0000
words = st.integers(0, 0xFFFF_FFFF)


class Symbols:
    def __init__(self, **known):
        self.known = known

    def find(self, name):
        return self.known.get(name)

    def find_prefix(self, name):
        return self.known.get(name)


class FakeKernel:
    """Memory made of a few pieces, and symbols."""

    def __init__(self, pieces, **symbols):
        self.pieces, self.symbols = pieces, Symbols(**symbols)

    def read(self, va, size):
        for start, data in self.pieces.items():
            if start <= va and va + size <= start + len(data):
                return data[va - start : va - start + size]
        raise UnreadableMemory(va, size)

    def readv(self, spans):
        found = []
        for va, size in spans:
            try:
                found.append(self.read(va, size))
            except UnreadableMemory:
                found.append(None)
        return found


class Kernels:
    """Two generations of inet_ehashfn."""

    old: ClassVar = staticmethod(lambda la, lp, fa, fp, iv: jhash_3words(la, fa, lp << 16 | fp, iv))
    new: ClassVar = staticmethod(lambda la, lp, fa, fp, iv: (lp + jhash_3words(la, fa, fp, iv)) & 0xFFFF_FFFF)


def test_jhash_agrees_with_the_kernel():
    assert jhash_1word(1, 2) == 0xF1524A01
    assert jhash_3words(1, 2, 3, 4) == 0x8103143F
    assert jhash2_4(bytes(range(16)), 5) == 0xCCC85808


@given(words, st.integers(1, 65535), words, st.integers(1, 65535), words, st.integers(1, 0xFFFF_FFFF))
def test_either_variant_is_learnt_from_one_socket(laddr, lport, faddr, fport, mix, secret):
    for variant in (Kernels.old, Kernels.new):
        hashes = TupleHash(FakeKernel({DATA: secret.to_bytes(4, "little")}, inet_ehash_secret=DATA))
        value = variant(laddr, lport, faddr, fport, (secret + mix) & 0xFFFF_FFFF)
        assert hashes.calibrate4([Sample(laddr, lport, faddr, fport, mix, value)])
        assert hashes.v4(laddr, lport, faddr, fport, mix) == value


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16), words, st.integers(1, 0xFFFF_FFFF))
def test_ipv6_learns_both_secrets_and_the_address_hash(local, remote, mix, secret):
    other = secret ^ 0x5A5A5A5A or 1
    for addr_hash in (jhash2_4, addr_jhash_xor):
        memory = {DATA: secret.to_bytes(4, "little") + other.to_bytes(4, "little")}
        hashes = TupleHash(FakeKernel(memory, inet6_ehash_secret=DATA, ipv6_hash_secret=DATA + 4))
        fhash = addr_hash(remote, other)
        last = int.from_bytes(local[12:], "little")
        value = jhash_3words(last, fhash, 80 << 16 | 443, (secret + mix) & 0xFFFF_FFFF)
        assert hashes.calibrate6([Sample(local, 80, remote, 443, mix, value)])
        assert hashes.v6(local, 80, remote, 443, mix) == value


def test_a_secret_without_a_symbol_is_found_in_the_code_that_uses_it():
    load = 7
    displacement = (DATA + 8 - (CODE + load + 6)).to_bytes(4, "little", signed=True)
    code = b"\x90" * load + b"\x03\x05" + displacement + b"\xc3" * 700  # add 0x...(%rip),%eax
    memory = {CODE: code, DATA: bytes(8) + (0xC0FFEE).to_bytes(4, "little")}
    hashes = TupleHash(FakeKernel(memory, inet_ehashfn=CODE))
    value = Kernels.old(1, 2, 3, 4, 0xC0FFEE)
    assert hashes.calibrate4([Sample(1, 2, 3, 4, 0, value)])


def test_nothing_is_believed_that_no_socket_confirms():
    hashes = TupleHash(FakeKernel({DATA: b"\x01\0\0\0"}, inet_ehash_secret=DATA))
    assert not hashes.calibrate4([Sample(1, 2, 3, 4, 0, 12345)])
    assert not hashes.calibrate4([])
    assert not hashes.ready4


def test_the_port_hash_treats_mapped_and_wildcard_addresses_as_ipv4():
    assert portaddr6(7, bytes(16), 80) == portaddr4(7, 0, 80)
    mapped = bytes(10) + b"\xff\xff" + bytes([10, 77, 0, 1])
    assert portaddr6(7, mapped, 80) == portaddr4(7, int.from_bytes(bytes([10, 77, 0, 1]), "little"), 80)
