"""Records, chains and names: what the walkers are made of, on memory made of bytes."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import UnreadableMemory, UnsupportedGuest
from appliance.guest.layout import Field
from appliance.guest.linux.chains import ChainWalker
from appliance.guest.linux.namespaces import MAX_BUCKETS
from appliance.guest.linux.passwd import _parse
from appliance.guest.linux.processes import container_of
from appliance.guest.linux.record import Record

BASE = 0xFF11_0000_0000_0000
LINK = 8  # offset of the node in our objects: [hash u64][next u64]
RECORD = Record("thing", [Field(0, 8), Field(LINK, 8)])


class Ram:
    """One flat piece of kernel memory."""

    def __init__(self, data):
        self.data = data

    def read(self, va, size):
        if not BASE <= va <= va + size <= BASE + len(self.data):
            raise UnreadableMemory(va, size)
        return bytes(self.data[va - BASE : va - BASE + size])

    def readv(self, spans):
        return [self.read(va, size) if BASE <= va <= va + size <= BASE + len(self.data) else None for va, size in spans]


def table(chains, nulls=True):
    """Bucket heads at the start, then objects of 16 bytes each."""
    heads, objects = [], []
    place = BASE + 8 * len(chains)
    for bucket, values in enumerate(chains):
        end = bucket << 1 | 1 if nulls else 0
        nodes = [place + 16 * (len(objects) + i) + LINK for i in range(len(values))]
        heads.append(nodes[0] if nodes else end)
        objects += list(zip(values, [*nodes[1:], end], strict=True)) if nodes else []
    return bytearray(struct.pack(f"<{len(heads)}Q", *heads) + b"".join(struct.pack("<2Q", *item) for item in objects))


def walk(data, count, nulls=True):
    return ChainWalker(Ram(data), "things", RECORD, LINK).walk(BASE, count, 8, 0, nulls)


@given(st.lists(st.lists(st.integers(0, 2**63), max_size=5), min_size=1, max_size=20), st.booleans())
def test_every_node_of_every_chain_is_found_once(chains, nulls):
    found = walk(table(chains, nulls), len(chains), nulls)
    seen = sorted((node.bucket, RECORD.parse(node.raw)[0]) for node in found.nodes)
    assert seen == sorted((bucket, value) for bucket, values in enumerate(chains) for value in values)
    assert (found.gaps, found.torn) == ([], 0)


def test_a_chain_that_ends_in_another_bucket_is_walked_again_and_then_named():
    data = table([[1], [2]])
    struct.pack_into("<Q", data, len(data) - 8, 0 << 1 | 1)  # bucket 1 ends with the number of bucket 0
    found = walk(data, 2)
    assert found.torn > 0
    assert [gap.what for gap in found.gaps] == ["things"]


def test_a_chain_in_a_circle_ends():
    data = table([[1, 2, 3]])
    first = BASE + 8 + LINK
    struct.pack_into("<Q", data, len(data) - 8, first)
    assert len(walk(data, 1).nodes) <= 3 * 3


@given(st.binary(min_size=160, max_size=160), st.booleans())
def test_whatever_the_pointers_say_the_walk_ends(data, nulls):
    found = walk(bytearray(data), 4, nulls)
    assert len(found.nodes) <= 3 * 20


def test_a_table_that_is_not_there_is_a_gap():
    assert walk(bytearray(8), MAX_BUCKETS).gaps[0].address == BASE


def test_a_record_reads_missing_members_as_zero_and_refuses_overlapping_ones():
    record = Record("thing", [Field(8, 4), None, Field(0, 2)])
    assert (record.low, record.size) == (0, 12)
    assert record.parse(b"\x01\x02" + bytes(6) + b"\x03\0\0\0") == (3, 0, 0x201)
    with pytest.raises(UnsupportedGuest):
        Record("thing", [Field(0, 8), Field(4, 8)])
    with pytest.raises(UnsupportedGuest):
        Record("thing", [None])


ID = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (f"/system.slice/docker-{ID}.scope", ID),
        (f"/docker/{ID}", ID),
        (f"/machine.slice/libpod-{ID}.scope/container", ID),
        (f"/user.slice/user-1000.slice/libpod-{ID}.scope", ID),
        (f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-{ID}.scope", ID),
        (f"/kubepods/besteffort/pod6a1d/{ID}", ID),
        (f"/kubepods.slice/kubepods-pod1.slice/crio-{ID}.scope", ID),
        (f"/system.slice/docker-{ID}.scope/init.scope", ID),
        ("/lxc/web/init.scope", "web"),
        ("/lxc.payload.web", "web"),
        ("/machine.slice/systemd-nspawn@web.service/payload", "web"),
        ("/machine.slice/machine-web.scope", "web"),
        ("/system.slice/docker.service", None),
        ("/user.slice/user-1000.slice/session-1.scope", None),
        ("/", None),
    ],
)
def test_containers_are_named_by_their_control_group(path, name):
    assert container_of(path) == name


@given(st.binary(max_size=300))
def test_any_bytes_are_a_passwd_file(content):
    assert all(isinstance(name, str) for name in _parse(content).values())


def test_passwd_lines():
    assert _parse(b"root:x:0:0:root:/root:/bin/sh\nbad\nwww-data:x:33:33::/:\n") == {0: "root", 33: "www-data"}
