"""Capture files: every format, every damage, and real captures where they are at hand."""

import csv
import os
import struct
from collections import defaultdict
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from appliance.errors import ConfigError, UsageError
from appliance.flow.table import FlowTable
from appliance.flow.tracking import TrackedTap
from appliance.model import Direction, FlowStarted, GuestId
from appliance.tap.pcap import PcapSource

CAPTURES = Path(os.environ.get("PARASIGHT_PCAPS", "/nonexistent"))
VM = GuestId("file:test.pcap")
SYN = IP(src="10.0.0.2", dst="192.0.2.1") / TCP(sport=4000, dport=80, flags="S")
ANSWER = IP(src="192.0.2.1", dst="10.0.0.2") / TCP(sport=80, dport=4000, flags="SA", ack=1)
MACS = {"src": "52:54:00:00:00:02", "dst": "52:54:00:00:00:01"}
FRAMES = [bytes(Ether(**MACS) / SYN), bytes(Ether(src=MACS["dst"], dst=MACS["src"]) / ANSWER)]
AT_NS = 1_700_000_000_123_456_789


def pcap(packets: list[bytes], order: str = "<", nano: bool = False, link: int = 1) -> bytes:
    magic, unit = (0xA1B23C4D, 1) if nano else (0xA1B2C3D4, 1000)
    out = struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 65535, link)
    for packet in packets:
        head = (AT_NS // 10**9, AT_NS % 10**9 // unit, len(packet), len(packet))
        out += struct.pack(order + "IIII", *head) + packet
    return out


def block(order: str, kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    length = len(body) + 12
    return struct.pack(order + "II", kind, length) + body + struct.pack(order + "I", length)


def pcapng(packets: list[bytes], order: str = "<", nano: bool = False, link: int = 1, simple: bool = False) -> bytes:
    out = block(order, 0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1))
    options = struct.pack(order + "HHB3xHH", 9, 1, 9, 0, 0) if nano else b""
    out += block(order, 1, struct.pack(order + "HHI", link, 0, 65535) + options)
    out += block(order, 0x4242, b"unknown blocks are skipped")
    units = AT_NS if nano else AT_NS // 1000
    for packet in packets:
        if simple:
            out += block(order, 3, struct.pack(order + "I", len(packet)) + packet)
        else:
            head = struct.pack(order + "IIIII", 0, units >> 32, units & 0xFFFFFFFF, len(packet), len(packet))
            out += block(order, 6, head + packet)
    return out


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "test.pcap"
    path.write_bytes(data)
    return path


def read(source: PcapSource) -> list:
    frames = []
    while not source.exhausted:
        frames += source.frames(0)
    return frames


def guess(path: Path) -> tuple[str, ...]:
    source = PcapSource(path)
    source.close()
    return source.sides.addresses


def flows(path: Path, local=None) -> list:
    tap = TrackedTap(VM, PcapSource(path, local), FlowTable(VM))
    events = []
    while not tap.exhausted:
        events += tap.poll(0)
    events += tap.close()
    return [event.flow for event in events if isinstance(event, FlowStarted)]


@pytest.mark.parametrize("make", [pcap, pcapng])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("nano", [False, True])
def test_both_formats_byte_orders_and_clocks_are_read(tmp_path, make, order: str, nano: bool) -> None:
    first, second = read(PcapSource(write(tmp_path, make(FRAMES, order, nano)), ["10.0.0.2"]))
    assert first.at_ns == (AT_NS if nano else AT_NS // 1000 * 1000)
    assert (first.from_guest, second.from_guest) == (True, False)
    assert (first.data, first.wire_len) == (FRAMES[0], len(FRAMES[0]))


def test_simple_packet_blocks_are_read(tmp_path) -> None:
    assert len(read(PcapSource(write(tmp_path, pcapng(FRAMES, simple=True))))) == 2


SLL = struct.pack(">HHH8sH", 4, 1, 6, b"RT\0\0\0\2\0\0", 0x0800)
SLL2 = struct.pack(">HHIHBB8s", 0x0800, 0, 3, 1, 4, 6, b"RT\0\0\0\2\0\0")


@pytest.mark.parametrize(
    ("link", "head"),
    [(101, b""), (12, b""), (228, b""), (0, b"\2\0\0\0"), (108, b"\0\0\0\2"), (113, SLL), (276, SLL2)],
)
def test_other_link_layers_give_the_same_flow(tmp_path, link: int, head: bytes) -> None:
    path = write(tmp_path, pcap([head + bytes(SYN), head + bytes(ANSWER)], link=link))
    (flow,) = flows(path, ["10.0.0.2"])
    assert str(flow.tuple) == "tcp 10.0.0.2:4000 -- 192.0.2.1:80"
    assert flow.direction is Direction.OUT


def test_the_guests_mac_tells_the_direction_and_foreign_frames_are_counted(tmp_path) -> None:
    source = PcapSource(write(tmp_path, pcap(FRAMES)), [MACS["dst"]])
    assert [frame.from_guest for frame in read(source)] == [False, True]
    stranger = PcapSource(write(tmp_path, pcap(FRAMES)), ["10.9.9.9"])
    assert read(stranger) == []
    assert stranger.skipped == {"not the guest's": 2}


def test_without_addresses_the_private_or_most_talkative_one_is_the_guest(tmp_path) -> None:
    assert guess(write(tmp_path, pcap(FRAMES[::-1]))) == ("10.0.0.2",)
    many = [bytes(Ether(**MACS) / IP(src=f"10.0.1.{n}", dst="8.8.8.8") / TCP(flags="S")) for n in range(9)]
    assert guess(write(tmp_path, pcap(many))) == ("8.8.8.8",)


@pytest.mark.parametrize("make", [pcap, pcapng])
def test_a_cut_file_delivers_what_is_there_and_says_where_it_ended(tmp_path, make) -> None:
    source = PcapSource(write(tmp_path, make(FRAMES)[:-7]), ["10.0.0.2"])
    assert len(read(source)) == 1
    assert "packet 2, at byte" in source.truncation
    assert "there" in source.truncation


def test_an_impossible_length_ends_reading_with_its_place(tmp_path) -> None:
    data = bytearray(pcap(FRAMES))
    offset = 24 + 16 + len(FRAMES[0])
    data[offset + 8 : offset + 12] = b"\xff\xff\xff\x7f"
    source = PcapSource(write(tmp_path, bytes(data)), ["10.0.0.2"])
    assert len(read(source)) == 1
    assert f"packet 2, at byte {offset}: it claims to be 2147483647 bytes long" in source.truncation


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (b"", ConfigError, "no pcap"),
        (b"hello world, no capture", ConfigError, "no pcap"),
        (b"\x1f\x8b\x08\0" + bytes(40), ConfigError, "gunzip"),
        (pcap([b"x" * 40], link=147), ConfigError, "link type 147"),
    ],
    ids=["empty", "text", "gzip", "link type"],
)
def test_what_is_no_capture_is_refused(tmp_path, data: bytes, error, text: str) -> None:
    with pytest.raises(error, match=text):
        PcapSource(write(tmp_path, data))


def test_a_missing_file_or_a_wrong_address_is_the_callers_mistake(tmp_path) -> None:
    with pytest.raises(UsageError, match="no capture file"):
        PcapSource(tmp_path / "nothing.pcap")
    with pytest.raises(UsageError, match="addresses"):
        PcapSource(write(tmp_path, pcap(FRAMES)), ["not an address"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([pcap(FRAMES), pcapng(FRAMES)]), st.integers(0, 200), st.binary(max_size=24), st.booleans())
def test_any_damage_is_read_up_to_there_or_refused(tmp_path, data: bytes, at: int, noise: bytes, cut: bool) -> None:
    path = write(tmp_path, data[:at] + noise + (b"" if cut else data[at + len(noise) :]))
    try:
        flows(path)
    except ConfigError as error:
        assert "test.pcap" in str(error)


# Captures of other people's are not ours to carry: they are compared where a folder of them lies beside the checkout.
@pytest.mark.skipif(not (CAPTURES / "flows.csv").exists(), reason="PARASIGHT_PCAPS names no folder with flows.csv")
def test_every_flow_of_the_real_captures_is_found() -> None:
    wanted = defaultdict(set)
    with (CAPTURES / "flows.csv").open() as file:
        for row in csv.DictReader(file):
            wanted[row["pcap"]].add((row["transport"], frozenset({_end(row["a"]), _end(row["b"])})))
    missing = {}
    for name, expected in wanted.items():
        found = {
            (str(flow.tuple.protocol), frozenset({(end.ip, end.port) for end in (flow.tuple.local, flow.tuple.remote)}))
            for flow in flows(CAPTURES / name)
        }
        if expected - found:
            missing[name] = expected - found
    assert not missing
    assert wanted


def _end(text: str) -> tuple:
    host, _, port = text.rpartition(":")
    return ip_address(host.strip("[]")), int(port)
