"""The appliance dies at any point: the guest's network is soon as the operator chose, and the rest can be removed."""

import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from appliance.cli import stop
from appliance.cli.main import app
from appliance.tap.bpf.journal import Journal
from appliance.tap.netns import call_in_netns
from tests.tap.world import HOST_IP, PORT, make_world

pytestmark = pytest.mark.root("network namespaces and bpf(2)")

ROOT = Path(__file__).resolve().parents[3]
SERVICE = 8080
SETTLED_S = 2.0  # so long after its death nothing may depend on the appliance any more
KILLS = 8  # in each world

# argv: port, netns, fail-closed (0 or 1), the step after which to die (-1: none), hold or ban
CHILD = """
import os, signal, sys, time
from ipaddress import ip_network
from appliance.flow.community import community_id
from appliance.model import Decision, GuestId, GuestPort, HoldPolicy
from appliance.tap.bpf import attach
from appliance.tap.bpf.tap import KernelTap

stopped, step = [], int(sys.argv[4])
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))

def dying(work):
    def run(*args, **options):
        global step
        result = work(*args, **options)
        step -= 1
        if step == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return run

if step >= 0:
    for name in ("make_qdisc", "add_filter", "delete", "remove_qdisc"):
        setattr(attach, name, dying(getattr(attach, name)))
    attach.Journal.write = dying(attach.Journal.write)
print("attaching", flush=True)
ports = [GuestPort(sys.argv[1], netns=sys.argv[2])]
tap = KernelTap(GuestId("port:x"), ports, time.time_ns, community_id=community_id, fail_closed=sys.argv[3] == "1")
if sys.argv[5] == "ban":
    tap.ban(ip_network("10.77.0.1/32"))
else:  # and nobody ever decides
    tap.hold_new(HoldPolicy(deadline_s=3, default=Decision.DENY))
print("holding", flush=True)
while not stopped and step < 0:
    tap.poll(0.02)
print("detaching", flush=True)
tap.close()
"""


@pytest.fixture(params=["bare", "foreign"])
def world(request, monkeypatch):
    with make_world("kc") as made:
        monkeypatch.setattr(stop, "iter_namespaces", lambda _: iter([made.host_path, made.guest_path]))
        tc(made, "qdisc", "add", "dev", PORT, "root", "handle", "1:", "htb", "default", "1")
        if request.param == "foreign":
            tc(made, "qdisc", "add", "dev", PORT, "clsact")
            for hook in ("ingress", "egress"):  # one before ours that lets all pass on, one behind that accepts all
                words = ("filter", "add", "dev", PORT, hook, "protocol", "all", "pref")
                tc(made, *words, "1", "bpf", "bytecode", "1,6 0 0 0,", "flowid", "1:1")
                tc(made, *words, "9", "u32", "match", "u32", "0", "0", "flowid", "1:1")
        yield made


def tc(world, *words: str) -> str:
    command = ["ip", "netns", "exec", world.host, "tc", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def seen(world) -> str:
    shown = tc(world, "-j", "qdisc", "show") + "".join(
        tc(world, "-j", "filter", "show", "dev", PORT, hook) for hook in ("ingress", "egress")
    )
    return re.sub(r'"direct_packets_stat":\d+', "", shown)  # htb counts


def foreign_of(world) -> list[dict]:
    filters = [
        one
        for hook in ("ingress", "egress")
        for one in json.loads(tc(world, "-j", "filter", "show", "dev", PORT, hook))
        if "parasight_tap" not in str(one) and "options" in one
    ]
    return filters + re.findall("(htb .*) direct_packets", tc(world, "qdisc", "show", "dev", PORT))


def clean() -> None:
    result = CliRunner().invoke(app, ["stop", "--clean"])
    assert result.exit_code == 0, result.output


@contextlib.contextmanager
def child(world, act: str, *, fail_closed: bool = False, step: int = -1) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", CHILD, PORT, world.host_path, str(int(fail_closed)), str(step), act]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen, line: str) -> None:
    for said in process.stdout:
        if said.strip() == line:
            return
    raise AssertionError(f"the child ended before it said {line!r}")


@contextlib.contextmanager
def service(world) -> Iterator[None]:
    """A TCP server of the outer world, and a guest that never stops to connect to it."""
    server = call_in_netns(world.host_path, lambda: socket.create_server((HOST_IP, SERVICE), backlog=64))
    server.settimeout(0.2)
    over = threading.Event()

    def accept() -> None:
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                server.accept()[0].close()

    def connect() -> None:
        while not over.is_set():
            connects(world, 0.2)

    threads = [threading.Thread(target=work) for work in (accept, connect)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
        server.close()


def connects(world, timeout_s: float) -> bool:
    """Whether a new connection of the guest works."""
    with contextlib.suppress(OSError):
        call_in_netns(world.guest_path, lambda: socket.create_connection((HOST_IP, SERVICE), timeout=timeout_s)).close()
        return True
    return False


def wait_until_held(world) -> None:
    """On a machine too busy for its heartbeats an appliance counts as dead for a while."""
    deadline = time.monotonic() + 60
    while connects(world, 0.3):
        assert time.monotonic() < deadline


def one_datagram_passes(world, timeout_s: float) -> bool:
    """Whether the very first packet of a new flow arrives: nothing is sent again, as TCP would."""
    with (
        call_in_netns(world.host_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as server,
        call_in_netns(world.guest_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as client,
    ):
        server.bind((HOST_IP, 0))
        server.settimeout(timeout_s)
        client.sendto(b"x", server.getsockname())
        with contextlib.suppress(TimeoutError):
            return server.recv(10) == b"x"
        return False


def test_whatever_step_it_dies_after_can_be_cleaned_and_attached_over(world) -> None:
    before, foreign = seen(world), foreign_of(world)
    died = 0
    for step in range(20):
        with child(world, "hold", step=step) as process:
            code = process.wait(60)
        assert foreign_of(world) == foreign
        if code == 0:
            break
        assert code == -signal.SIGKILL
        died += 1
        if step % 2:  # every other time the next one has to cope with what is there
            clean()
            assert seen(world) == before
    assert died >= 4
    assert seen(world) == before, "the one that lived has taken everything along"
    assert Journal().notes() == []


def test_killed_anywhere_a_guest_that_fails_open_is_connected_within_2_s(world) -> None:
    before, foreign = seen(world), foreign_of(world)
    chance = random.Random()
    with service(world):
        for number in range(KILLS):
            with child(world, chance.choice(("hold", "ban"))) as process:
                stage = ("attaching", "holding", "holding", "detaching")[number % 4]
                if stage == "detaching":
                    wait_for(process, "holding")
                    process.terminate()
                wait_for(process, stage)
                if stage == "holding":
                    wait_until_held(world)
                time.sleep(chance.uniform(0, {"attaching": 0.05, "holding": 0.3, "detaching": 0.02}[stage]))
                process.kill()
                process.wait(60)
            time.sleep(SETTLED_S)
            assert one_datagram_passes(world, 30), stage
            assert connects(world, 30), stage
            assert foreign_of(world) == foreign
            if number % 2:
                clean()
                assert seen(world) == before, stage
    assert seen(world) == before


def test_killed_while_it_holds_a_guest_that_fails_closed_stays_so_until_it_is_cleaned(world) -> None:
    before = seen(world)
    with service(world):
        for act in ("hold", "ban"):
            with child(world, act, fail_closed=True) as process:
                wait_for(process, "holding")
                wait_until_held(world)
                process.kill()
                process.wait(60)
            time.sleep(SETTLED_S)
            assert not one_datagram_passes(world, 0.5)
            assert not connects(world, 1.5)
            clean()
            assert connects(world, 30)
            assert seen(world) == before
