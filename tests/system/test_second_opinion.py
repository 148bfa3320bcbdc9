"""Volatility looks at a denied process of a running guest, and stock `vol` at the guest itself and at its dump."""

import subprocess
import sys
import time

import pytest

from appliance.guest.attach import attach
from appliance.guest.linux.eye import LinuxEye
from appliance.memory.file import open_file
from appliance.memory.qemu import open_qemu
from lab.world import SINK_PORT
from tests.against.stock import vol
from tests.worlds.command import ROOT, Watching

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]


def infect(guest) -> int:
    """Start the web server, inject the parasite into one of its workers, and say into which."""
    assert guest.run("/opt/demo/web.sh").returncode == 0
    master = int(guest.get("/run/nginx.pid"))
    worker = guest.get(f"/proc/{master}/task/{master}/children").split()[0].decode()
    assert guest.run(f"/opt/parasite/infect.sh {worker} 10.77.0.1 {SINK_PORT} rwx").returncode == 0
    return int(worker)


@pytest.fixture(scope="module")
def told(guest, tmp_path_factory):
    """What a watch tells of a web server into which the parasite was injected; until Volatility was heard."""
    home = tmp_path_factory.mktemp("home")
    with Watching(f"qemu:{guest.pid}", "--second-opinion", home=home) as watch:
        worker = infect(guest)
        deadline_s = time.monotonic() + 200
        while not any(theirs(one) for one in watch.verdicts):
            assert time.monotonic() < deadline_s, (watch.verdicts, watch.said)
            time.sleep(0.2)
        assert watch.end() == 1
    return worker, watch


def theirs(verdict: dict) -> list[dict]:
    return [one for one in verdict["evidence"] if one["kind"].startswith("volatility:")]


def test_the_alert_comes_at_once_and_again_with_what_volatility_says(told):
    worker, watch = told
    second = next(one for one in watch.verdicts if theirs(one))
    first = next(one for one in watch.verdicts if one["id"] == second["id"])
    assert not theirs(first)
    assert (first["verdict"], first["process"]["pid"], first["parasitic"]) == ("deny", worker, True)
    assert {**second, "evidence": first["evidence"]} == first
    (malfind,) = [one for one in theirs(second) if one["kind"] == "volatility:malfind"]
    (ours,) = [one for one in first["evidence"] if one["kind"] == "anon-exec"]
    assert (malfind["address"], malfind["size"]) == (ours["address"], ours["size"])
    assert watch.summary["verdicts"]["deny"] == len({one["id"] for one in watch.verdicts if one["verdict"] == "deny"})


def test_the_worker_ends_with_the_watch(guest, told):
    mine, deadline_s = f"plugins.parasight.worker qemu:{guest.pid} ", time.monotonic() + 10
    while mine in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


# -- stock Volatility --


@pytest.fixture(scope="module")
def symbols(guest, tmp_path_factory):
    """Made from the guest's own memory, as docs/how-to/volatility.md says."""
    folder = tmp_path_factory.mktemp("symbols")
    command = [sys.executable, "-m", "plugins.parasight.make_symbols", f"qemu:{guest.pid}", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def listed(memory) -> dict[int, str]:
    try:
        return {one.pid: one.name for one in LinuxEye(attach(memory, cache=False)).read_snapshot().processes}
    finally:
        memory.close()


def test_stock_volatility_reads_the_running_guest_through_our_layer(guest, symbols, told):
    """The guest pages with five levels, which stock Volatility cannot do."""
    before = listed(open_qemu(guest.pid))
    seen = {row["PID"]: row["COMM"] for row in vol(f"parasight:qemu:{guest.pid}", symbols, "linux.pslist")}
    after = listed(open_qemu(guest.pid))
    stable = before.items() & after.items()
    assert len(stable) > 20
    assert stable <= seen.items() <= before.items() | after.items()


def test_and_its_dump(guest, symbols, told, tmp_path):
    worker, _ = told
    dump = tmp_path / "guest.elf"
    guest.qmp("dump-guest-memory", paging=False, protocol=f"file:{dump}")
    location = f"parasight:file:{dump}"
    assert {row["PID"]: row["COMM"] for row in vol(location, symbols, "linux.pslist")} == listed(open_file(dump))
    (found,) = [row for row in vol(location, symbols, "linux.malware.malfind") if row["PID"] == worker]
    assert found["Protection"] == "rwx"
