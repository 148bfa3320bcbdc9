"""Our filters beside foreign ones: attach, detach, crash."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from appliance.errors import HostError, UsageError
from appliance.model import FlowEnd, FlowEnded, FlowStarted
from appliance.tap.bpf.leftovers import clean, list_ours
from tests.tap.bpf.both import collect, drain, open_kernel, udp_talk
from tests.tap.world import GUEST_IP, HOST_IP, PORT, ip, make_world

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces and bpf(2)")


@pytest.fixture
def world():
    with make_world("ka") as made:
        yield made


def tc(world, *words: str) -> str:
    command = ["ip", "netns", "exec", world.host, "tc", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout


def seen(world) -> str:
    return tc(world, "qdisc", "show", "dev", PORT) + "".join(
        tc(world, "filter", "show", "dev", PORT, hook) for hook in ("ingress", "egress")
    )


def add_foreign(world) -> None:
    tc(world, "qdisc", "add", "dev", PORT, "root", "pfifo")
    tc(world, "qdisc", "add", "dev", PORT, "clsact")
    for hook in ("ingress", "egress"):  # at our favourite place, and behind it
        place = ("filter", "add", "dev", PORT, hook, "protocol", "all", "pref")
        tc(world, *place, "2", "bpf", "bytecode", "1,6 0 0 0,", "flowid", "1:1")
        tc(world, *place, "9", "u32", "match", "u32", "0", "0", "flowid", "1:1")


def test_nothing_is_left_on_a_port_that_had_nothing(world) -> None:
    before = seen(world)
    tap = open_kernel(world)
    assert seen(world).count("parasight_tap") == 2
    assert tap.close() == []
    assert tap.close() == []
    assert seen(world) == before


def test_foreign_qdiscs_and_filters_survive_attach_and_detach(world) -> None:
    add_foreign(world)
    before = seen(world)
    tap = open_kernel(world)
    assert "parasight_tap" in seen(world)
    assert all(line in seen(world).splitlines() for line in before.splitlines())
    tap.close()
    assert seen(world) == before


def test_a_foreign_filter_on_our_own_qdisc_keeps_it(world) -> None:
    tap = open_kernel(world)
    words = ("protocol", "all", "pref", "9", "u32", "match", "u32", "0", "0", "flowid", "1:1")
    tc(world, "filter", "add", "dev", PORT, "ingress", *words)
    udp_talk(world, HOST_IP, from_guest=True)
    assert drain(tap)
    tap.close()
    assert "clsact" in seen(world)
    assert "u32" in seen(world)
    assert "parasight_tap" not in seen(world)


def test_a_foreign_ingress_qdisc_is_respected(world) -> None:
    tc(world, "qdisc", "add", "dev", PORT, "ingress")
    before = seen(world)
    with pytest.raises(HostError, match="foreign ingress qdisc"):
        open_kernel(world)
    assert seen(world) == before


CRASH = """
import sys, time
from appliance.flow.community import community_id
from appliance.model import GuestId, GuestPort
from appliance.tap.bpf.tap import KernelTap
from ipaddress import ip_network
tap = KernelTap(GuestId("port:x"), [GuestPort(sys.argv[1], netns=sys.argv[2])], time.time_ns, community_id=community_id)
tap.ban(ip_network("10.77.0.1/32"))
print("ready", flush=True)
while True:
    tap.poll(0.05)
"""


def test_a_crash_lifts_bans_and_the_next_attach_clears_what_it_left(world) -> None:
    add_foreign(world)
    before = seen(world)
    command = [sys.executable, "-c", CRASH, PORT, world.host_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        with pytest.raises(TimeoutError):
            udp_talk(world, HOST_IP, from_guest=True, timeout_s=0.3)
        child.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert "parasight_tap" in seen(world)
    while time.monotonic() - killed < 2.5:
        time.sleep(0.1)
    udp_talk(world, HOST_IP, from_guest=True, timeout_s=1)
    tap = open_kernel(world)
    assert seen(world).count("parasight_tap") == 2
    udp_talk(world, GUEST_IP, from_guest=False)
    assert any(isinstance(event, FlowStarted) for event in drain(tap))
    tap.close()
    assert seen(world) == before


def test_what_a_crash_left_can_be_cleared_without_a_new_tap(world) -> None:
    before = seen(world)
    command = [sys.executable, "-c", CRASH, PORT, world.host_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        assert clean(world.host_path) == [], "its process lives"
        assert {one.owner.pid for one in list_ours(world.host_path)} == {child.pid}
        child.kill()
    assert [(one.what, one.hook) for one in clean(world.host_path)] == [
        ("filter", "ingress"), ("filter", "egress"), ("qdisc", "")
    ]  # fmt: skip
    assert clean(world.host_path) == list_ours(world.host_path) == []
    assert seen(world) == before


def test_two_taps_on_one_port_do_not_disturb_each_other(world) -> None:
    first, second = open_kernel(world), open_kernel(world)
    first.close()
    udp_talk(world, HOST_IP, from_guest=True)
    assert any(isinstance(event, FlowStarted) for event in drain(second))
    second.close()
    assert "parasight_tap" not in seen(world)


def test_a_port_that_disappears_ends_the_tap(world) -> None:
    tap = open_kernel(world)
    udp_talk(world, HOST_IP, from_guest=True)
    ip("-n", world.host, "link", "del", PORT)
    collect(tap, lambda _: tap.exhausted)
    assert tap.exhausted
    reasons = {event.reason for event in tap.close() if isinstance(event, FlowEnded)}
    assert reasons == {FlowEnd.GUEST_GONE}


def test_a_wrong_port_is_named(world) -> None:
    from tests.tap.bpf import both

    for changes, error, words in (
        ({"host": world.guest}, UsageError, "there is no port"),
        ({"host": "nosuch"}, UsageError, "cannot open network namespace"),
    ):
        with pytest.raises(error, match=words):
            both.open_kernel(replace(world, **changes))
