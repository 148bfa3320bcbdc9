"""The command `parasight doctor`, and how it asks and measures: real QEMU processes, stopped before they begin."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from appliance.cli.reach import MAX_GUESTS, find_guests, probe_routes
from appliance.hosts.probe import probe_host
from appliance.hosts.qemu import find_guest
from appliance.model import GuestId, GuestInfo
from lab.libvirtd import Libvirtd
from lab.network import Network
from tests.worlds.command import parasight

WITHOUT_PTRACE = ("setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace")


@pytest.fixture(scope="module")
def qemu(tmp_path_factory):
    """A QEMU with a monitor of its own that nobody uses."""
    with _started(tmp_path_factory.mktemp("qemu") / "qmp.sock") as pid:
        yield pid


@contextlib.contextmanager
def _started(monitor):
    command = ["qemu-system-x86_64", "-S", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none"]
    command += ["-name", "doctored", "-qmp", f"unix:{monitor},server=on,wait=off"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while not _listens(monitor):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        yield process.pid
        process.kill()


def _listens(path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


@pytest.fixture
def stuck(tmp_path):
    """A QEMU whose monitor takes calls and never says a word: it is stopped."""
    with _started(tmp_path / "qmp.sock") as pid:
        os.kill(pid, signal.SIGSTOP)
        yield pid


def by_name(lines):
    return {line["name"]: line for line in lines}


@pytest.mark.root("network namespaces, another process's memory")
def test_each_route_to_each_guest_is_measured(qemu, tmp_path) -> None:
    done = parasight("doctor", "--output", "jsonl", home=tmp_path)
    lines = by_name(done.objects)
    assert done.code == int(any(not line["ok"] and line["required"] for line in done.objects))
    assert all(line.keys() == {"name", "ok", "required", "reason", "remedy"} for line in done.objects)
    direct, monitor = lines[f"route qemu:{qemu} qemu"], lines[f"route qemu:{qemu} qmp"]
    assert direct["ok"]
    assert monitor["ok"]
    assert direct["reason"].startswith("doctored: 32 MiB, ")
    assert "only by name" not in direct["reason"]
    assert "only by name" in monitor["reason"]
    assert pages_per_s(direct) > pages_per_s(monitor) > 0


def pages_per_s(line) -> int:
    return int(line["reason"].split(" pages/s")[0].split()[-1].replace(",", ""))


@pytest.mark.root("network namespaces, another process's memory")
def test_a_host_that_forbids_to_look_fails_with_the_reason_and_the_remedy(qemu, tmp_path) -> None:
    done = parasight("doctor", "--output", "jsonl", home=tmp_path, prefix=WITHOUT_PTRACE)
    line = by_name(done.objects)[f"route qemu:{qemu} qemu"]
    assert done.code == 1
    assert (line["ok"], line["reason"]) == (False, "CAP_SYS_PTRACE is missing")
    assert "AmbientCapabilities=CAP_SYS_PTRACE" in line["remedy"]
    assert not by_name(done.objects)["reading guests' memory"]["ok"]


@pytest.mark.root("network namespaces, another process's memory")
def test_its_table_is_readable_at_a_hundred_columns(qemu, tmp_path) -> None:
    command = f"stty cols 100; {sys.executable} -m appliance.cli doctor"
    done = parasight_on_a_terminal(command, tmp_path)
    assert max(map(len, done)) <= 100
    (line,) = [one for one in done if f"route qemu:{qemu} qemu" in one]
    assert line.startswith("PASS")
    remedies = [one for one in done if "\u2192" in one]
    assert remedies == [one for one in remedies if one.startswith(" " * 20)]


def parasight_on_a_terminal(command, home):
    env = os.environ | {"PARASIGHT_STATE": str(home), "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "100"}
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    return [line.rstrip() for line in done.stdout.splitlines()]


def test_a_route_that_never_answers_is_given_up(stuck) -> None:
    info = GuestInfo(GuestId(f"qemu:{stuck}", instance=find_guest(stuck).id.instance), stuck, routes=("qmp",))
    (line,) = probe_routes([info], seconds=0.2)
    assert (line.name, line.ok, line.required) == (f"route qemu:{stuck} qmp", False, False)
    assert line.reason == "no answer within 0.2 s"
    assert line.remedy


def test_a_guest_that_has_ended_is_not_told() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    gone = GuestInfo(GuestId(f"qemu:{process.pid}", instance="1-1"), process.pid, routes=("qemu",), hypervisor="qemu")
    assert list(probe_routes([gone])) == []


def test_a_guest_of_which_its_hypervisor_does_not_say_whether_it_runs_is_told_with_the_reason() -> None:
    """No Xen is here to be asked."""
    (line,) = probe_routes([GuestInfo(GuestId("xen:7", "u"), domid=7, hypervisor="xen", routes=("qemu",))])
    assert (line.name, line.ok) == ("route xen:7 qemu", False)


def test_a_guest_without_a_route_is_left_to_its_notes() -> None:
    assert list(probe_routes([GuestInfo(GuestId("qemu:1"), 1, hypervisor="qemu")])) == []


def test_libvmi_is_never_opened_on_xen_and_said_to_be_the_only_way_where_it_is() -> None:
    domain = GuestInfo(GuestId("xen:7", "u", "web"), domid=7, routes=("xen", "libvmi"), hypervisor="xen")
    own, libvmi = probe_routes([domain])  # no Xen here: the own route fails
    assert not own.ok
    assert (libvmi.name, libvmi.ok, libvmi.required) == ("route xen:7 libvmi", False, False)
    assert "the only way" in libvmi.reason
    assert "changes the domain's memory limit" in libvmi.reason
    assert "--route libvmi --libvmi-allow-domain-changes" in libvmi.remedy


def test_a_host_with_many_guests_is_asked_of_the_first_ones(stuck) -> None:
    one = GuestInfo(GuestId(f"qemu:{stuck}"), stuck, routes=("nonsense",))
    *measured, last = probe_routes([one] * (MAX_GUESTS + 5))
    assert len(measured) <= MAX_GUESTS
    assert (last.name, last.reason) == ("routes", "5 more guests were not measured")
    (line,) = probe_routes([one], all_s=0)  # no time left
    assert line.reason == "1 more guest was not measured"


@pytest.mark.system
def test_a_domain_is_measured_by_both_routes_and_a_stuck_libvirtd_does_not_hang_it(monkeypatch) -> None:
    with Network() as network, Libvirtd(network) as libvirtd:
        monkeypatch.setenv("PARASIGHT_LIBVIRT_URI", libvirtd.uri)
        libvirtd.define_tiny("doctored-1")
        libvirtd.virsh("start", "doctored-1")
        before = libvirtd.virsh("dumpxml", "doctored-1")
        target = f"qemu:{libvirtd.qemu_pid('doctored-1')}"
        lines, routes = look_at(target)
        assert lines["libvirt"].ok
        assert [(one.name, one.ok) for one in routes] == [
            (f"route {target} qemu", True),
            (f"route {target} libvirt", True),
        ]
        assert libvirtd.virsh("dumpxml", "doctored-1") == before
        with libvirtd.stuck():
            lines, routes = look_at(target)
        assert not lines["libvirt"].ok
        assert "does not answer" in lines["libvirt"].reason
        assert "restart libvirtd" in lines["libvirt"].remedy
        assert (routes[0].name, routes[0].ok) == (f"route {target} qemu", True)


def look_at(target):
    """What `doctor` finds of this host, and of one guest."""
    guests, troubles = find_guests()
    lines = {one.name: one for one in probe_host(guests, troubles)}
    return lines, list(probe_routes([info for info in guests if info.id.target == target]))
