"""The ladder: each rung tells the same, the best one that works is taken, and why the others were not is said."""

import json
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from socket import AF_INET, AF_INET6

import pytest

from appliance.errors import HostError, UsageError
from appliance.flow.community import community_id
from appliance.flow.table import FlowTable
from appliance.flow.tracking import TrackedTap
from appliance.model import Act, Direction, FlowStarted, GuestId, GuestInfo, GuestPort
from appliance.tap import trial
from appliance.tap.af_packet import PortSource
from appliance.tap.bpf import loader
from appliance.tap.bpf.layout import Transport
from appliance.tap.bpf.loader import OBSERVE
from appliance.tap.ladder import NAMES, RUNGS, VARIABLE, Rung, choose_rungs, open_tap
from appliance.tap.netns import call_in_netns
from appliance.tap.trial import empty_netns, probe_ports, probe_rungs, try_rung
from tests.tap.bpf import both, test_hold, test_hold_frames, test_hold_payload, test_parity
from tests.tap.bpf.both import VM, tcp_talk
from tests.tap.bpf.lan import Lan, make_lan
from tests.tap.bpf.test_attach import seen, tc
from tests.tap.world import GUEST_IP6, GUEST_MAC, HOST_IP, PORT, make_world

pytestmark = pytest.mark.root("network namespaces and bpf(2)")
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PARASIGHT_RUN_DIR", str(tmp_path / "run"))


@pytest.fixture
def world():
    with make_world("kl") as made:
        yield made


def fallback(port: GuestPort) -> TrackedTap:
    macs = [port.mac] if port.mac else []
    return TrackedTap(VM, PortSource(port), FlowTable(VM, macs), time.time_ns)


def open_on(world, **options) -> tuple:
    port = GuestPort(PORT, GUEST_MAC, world.host_path)
    return open_tap(
        VM, [port], time.time_ns, community_id=community_id, fallback=partial(fallback, port), **options
    )  # fmt: skip


def collect_starts(tap, count: int) -> list:
    flows: list = []
    give_up_s = time.monotonic() + PATIENCE_S
    while len(flows) < count and time.monotonic() < give_up_s:
        flows += [event.flow for event in tap.poll(0.05) if isinstance(event, FlowStarted)]
    return flows


# -- all rungs of the kernel tell the same --


@pytest.fixture(params=["tc+perf", "socket"])
def other_rung(request, monkeypatch):
    """The kernel tap of the parity tests is another rung than the first, which they try themselves."""
    options = {"transport": Transport.PERF} if request.param == "tc+perf" else {"programs": OBSERVE}
    monkeypatch.setattr(both, "open_kernel", partial(both.open_kernel, **options))


@pytest.mark.parametrize("from_guest", [True, False], ids=["out", "in"])
@pytest.mark.parametrize("version", [4, 6])
def test_real_connections_and_datagrams(world, other_rung, version, from_guest) -> None:
    ends = {4: ("10.77.0.1", "10.77.0.2"), 6: ("fd77::1", "fd77::2")}[version]
    test_parity.test_real_connections_and_datagrams(world, ends[not from_guest], from_guest)


def test_bulk_with_segmentation_offload(world, other_rung) -> None:
    test_parity.test_bulk_with_segmentation_offload(world, HOST_IP)


def test_fragments(world, other_rung) -> None:
    test_parity.test_fragments(world)


@pytest.mark.parametrize("case", test_parity.CASES)
def test_made_frames(world, other_rung, case) -> None:
    test_parity.test_made_frames(world, case)


def test_the_end_of_the_watch_is_told(world, other_rung) -> None:
    test_parity.test_the_end_of_the_watch_and_of_the_guest_are_told(world)


@pytest.fixture
def perf_lan(monkeypatch):
    opened = Lan.open_tap
    monkeypatch.setattr(Lan, "open_tap", lambda self, **options: opened(self, transport=Transport.PERF, **options))
    with make_lan("kq") as made:
        yield made


@pytest.mark.parametrize(
    "hold",
    [
        lambda lan: test_hold.test_a_released_connection_goes_on_with_the_very_syn_that_was_held(lan, AF_INET, True),
        lambda lan: test_hold.test_a_blocked_guest_is_refused_at_once_and_nothing_leaves(lan, AF_INET6),
        lambda lan: test_hold_frames.test_frames_of_any_length_that_a_page_cannot_hold(lan, 16000),
        lambda lan: test_hold_payload.test_the_first_payload_waits_and_the_handshake_does_not(lan, AF_INET, False),
        test_hold_frames.test_flows_whose_start_was_lost_are_found_and_can_be_released,
    ],
    ids=["release", "block", "long-frame", "payload", "lost-start"],
)
def test_what_waits_comes_whole_by_perf_events(perf_lan, hold) -> None:
    hold(perf_lan)


# -- which rung --


@pytest.mark.parametrize("name", NAMES)
def test_a_rung_that_was_asked_for_is_used(world, monkeypatch, name) -> None:
    before = seen(world)
    monkeypatch.setenv(VARIABLE, name)
    tap, rung = open_on(world)
    assert (rung.name, rung.reasons) == (name, ())
    assert seen(world).count("parasight_tap") == (2 if name.startswith("tc") else 0)
    tcp_talk(world, HOST_IP, from_guest=True)
    tcp_talk(world, GUEST_IP6, from_guest=False)
    assert [flow.direction for flow in collect_starts(tap, 2)] == [Direction.OUT, Direction.IN]
    assert rung.acts == (frozenset(Act) if name.startswith("tc") else frozenset())
    assert tap.stats().flows == 2
    list(tap.close())
    assert seen(world) == before


def test_the_best_rung_is_used_where_nothing_is_in_its_way(world) -> None:
    tap, rung = open_on(world)
    assert (rung.name, rung.reasons) == ("tc+ring", ())
    tap.close()


def test_a_foreign_ingress_qdisc_leaves_the_socket_and_is_named(world) -> None:
    tc(world, "qdisc", "add", "dev", PORT, "ingress")
    before = seen(world)
    tap, rung = open_on(world)
    assert rung.name == "socket"
    assert [reason.partition(":")[0] for reason in rung.reasons] == ["tc+ring", "tc+perf"]
    assert all("foreign ingress qdisc" in reason and "\n" not in reason for reason in rung.reasons)
    assert not rung.acts
    for act in ("hold_new", "block", "release", "ban", "redirect"):
        assert not hasattr(tap, act), "what only observes has no hand"
    assert seen(world) == before
    tap.close()


def test_without_ring_buffers_perf_events_are_used(world, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(loader.OBJECTS, Transport.RING, tmp_path / "nothing.o")
    tap, rung = open_on(world)
    assert rung.name == "tc+perf"
    assert len(rung.reasons) == 1
    tap.close()
    tc(world, "qdisc", "add", "dev", PORT, "ingress")
    tap, rung = open_on(world)
    assert rung.name == "socket", "its events come as perf events then"
    tcp_talk(world, HOST_IP, from_guest=True)
    assert collect_starts(tap, 1)
    tap.close()


def test_where_no_program_can_be_loaded_packets_are_read(world, monkeypatch, tmp_path) -> None:
    for transport in Transport:
        monkeypatch.setitem(loader.OBJECTS, transport, tmp_path / "nothing.o")
    tap, rung = open_on(world)
    assert rung.name == "packets"
    assert [reason.partition(":")[0] for reason in rung.reasons] == list(NAMES[:3])
    tap.close()


def test_a_rung_that_was_asked_for_is_not_replaced(world) -> None:
    tc(world, "qdisc", "add", "dev", PORT, "ingress")
    with pytest.raises(HostError, match="foreign ingress qdisc"):
        open_on(world, rung="tc+ring")
    with pytest.raises(UsageError, match="one of tc\\+ring, tc\\+perf, socket, packets"):
        open_on(world, rung="xdp")


def test_a_port_that_is_not_there_is_told_by_the_last_rung(world) -> None:
    port = GuestPort("nosuch0", netns=world.host_path)
    with pytest.raises(UsageError, match="there is no port nosuch0"):
        open_tap(VM, [port], time.time_ns, community_id=community_id, fallback=partial(fallback, port))


def test_rungs_are_described_on_one_line() -> None:
    assert choose_rungs(None) == RUNGS
    for rung in RUNGS:
        assert isinstance(rung, Rung)
        assert "\n" not in str(rung)
        assert "us" in rung.cost, "a cost has a figure"


# -- what a host carries --


def probe():
    return probe_rungs(time.time_ns, community_id, fallback)


@pytest.mark.parametrize("rung", RUNGS, ids=NAMES)
def test_each_rung_can_be_tried_on_this_host_without_a_trace(rung) -> None:
    try_rung(rung, time.time_ns, community_id, fallback)
    assert not [thread for thread in threading.enumerate() if thread.name == "trial"]


def test_the_trial_says_which_rung_is_in_use(monkeypatch, tmp_path) -> None:
    (line,) = probe()
    assert line.ok
    assert line.required
    assert line.reason.startswith("tc+ring: ")
    monkeypatch.setitem(loader.OBJECTS, Transport.RING, tmp_path / "nothing.o")
    line, failed = probe()
    assert line.ok
    assert line.reason.startswith("tc+perf: ")
    assert (failed.name, failed.ok, failed.required) == ("tap tc+ring", False, False)
    assert failed.remedy
    monkeypatch.setenv(VARIABLE, "tc+ring")
    line, failed = probe()
    assert not line.ok
    assert VARIABLE in line.reason


def test_ports_of_guests_with_a_foreign_ingress_qdisc_are_named(world) -> None:
    ports = (GuestPort(PORT, netns=world.host_path), GuestPort("nosuch0", netns=world.host_path))
    guests = [GuestInfo(GuestId("qemu:4711"), ports=ports)]
    assert probe_ports(guests) == ()
    tc(world, "qdisc", "add", "dev", PORT, "ingress")
    before = seen(world)
    (line,) = probe_ports(guests)
    assert (line.name, line.ok, line.required) == ("tap of qemu:4711", False, False)
    assert PORT in line.reason
    assert PORT in line.remedy
    assert seen(world) == before


def test_a_rung_that_opens_and_is_deaf_fails_the_trial(monkeypatch) -> None:
    monkeypatch.setattr(trial, "PATIENCE_S", 0.2)
    with empty_netns() as path, empty_netns() as elsewhere:
        assert call_in_netns(path, lambda: Path("/proc/thread-self/net/dev").read_text("ascii").count(":")) == 1
        deaf = partial(fallback, GuestPort("lo", netns=elsewhere))
        with pytest.raises(HostError, match="tells nothing"):
            try_rung(RUNGS[3], time.time_ns, community_id, lambda _: deaf())


AS_NOBODY = """
import os, json, sys, time
from tests.tap.test_ladder import probe
os.setgid(65534); os.setuid(65534)
print(json.dumps([[one.name, one.ok, one.reason, one.remedy] for one in probe()]))
"""


def test_without_rights_every_rung_says_what_it_needs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    first, *failed = json.loads(done.stdout)
    assert first[:2] == ["tap", False]
    assert [line[0] for line in failed] == [f"tap {name}" for name in NAMES]
    assert all("CAP_" in line[2] and "run as root" in line[3] for line in failed)
