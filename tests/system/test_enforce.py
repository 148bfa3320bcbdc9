"""A hand on single flows of a real guest: the parasite's packets stay, everything else goes its way (N19, B6)."""

import socket
import subprocess
import threading
import time

import pytest

from appliance.tap.netns import call_in_netns
from lab.network import WORLD_IP4
from lab.world import NAMES, SINK_PORT, Caller
from tests.system.churning import ALL, churn, compare, total
from tests.worlds.command import ROOT, Watching, parasight

pytestmark = pytest.mark.system

SECONDS = 15


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    """The shipped rules for a Debian server, enforced."""
    text = (ROOT / "rules" / "debian-server.yaml").read_text()
    assert text.count("  mode: monitor\n") == 1
    path = tmp_path_factory.mktemp("rules") / "enforced.yaml"
    path.write_text(text.replace("  mode: monitor\n", "  mode: enforce\n"))
    return path


class Ear:
    """Counts the packets that arrive in the world from the guest for one TCP port."""

    def __init__(self, network, port: int) -> None:
        self._port, self.heard, self._stop = port, 0, threading.Event()
        path = str(network.path(world=True))
        self._socket = call_in_netns(path, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))
        self._socket.bind(("eth0", 3))
        self._socket.settimeout(0.2)
        self.others = 0
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while not self._stop.is_set():
            try:
                frame = self._socket.recv(2048)
            except TimeoutError:
                continue
            at = {b"\x08\0": 34, b"\x86\xdd": 54}.get(frame[12:14])
            protocol = frame[23] if at == 34 else frame[20]
            if at is not None and protocol == 6:
                is_ours = int.from_bytes(frame[at + 2 : at + 4], "big") == self._port
                self.heard += is_ours
                self.others += not is_ours

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()


def do(guest, command: str) -> str:
    done = guest.run(command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_not_one_packet_of_the_parasite_leaves_and_honest_connections_all_work(guest, network, rules, tmp_path, capsys):
    do(guest, "/opt/demo/web.sh")
    worker = int(do(guest, "pgrep -P $(cat /run/nginx.pid)").split()[0])
    with (
        Ear(network, SINK_PORT) as ear,
        Watching(f"qemu:{guest.pid}", "--rules", rules, "--enforce", home=tmp_path) as watch,
    ):
        updater = guest.spawn(f"exec /usr/local/bin/updater {next(iter(NAMES))} 80 0.5")
        with Caller(network, [guest.ip4, guest.ip6], tcp=(80,), seconds=8, pause_s=0.2) as caller:
            time.sleep(2)
            do(guest, f"/opt/parasite/infect.sh {worker} {WORLD_IP4} {SINK_PORT} rwx")
            calls = caller.wait()
        updater.kill()
        watch.end()
    assert ear.heard == 0
    assert ear.others > 100, "the ear is deaf"
    assert (calls.done > 20, calls.failed) == (True, 0)
    caught = [body for body in watch.verdicts if body["flow"]["remote"]["port"] == SINK_PORT]
    assert caught
    assert all(body["verdict"] == "deny" and body["parasitic"] for body in caught)
    assert all(body["process"]["pid"] == worker and body["act_done"] for body in caught)
    honest = [body for body in watch.verdicts if body["flow"]["remote"]["port"] != SINK_PORT]
    assert not [body for body in honest if body["verdict"] == "deny"]
    held = sorted(body["held_us"] for body in honest if body["held_us"] is not None)
    with capsys.disabled():
        print(f"\nenforce: {len(honest)} honest flows, {len(held)} held, median {held[len(held) // 2]:.0f} us")
    assert len(held) > 20


def test_every_new_tcp_connection_is_bound_because_its_syn_waits(guest, network, rules, tmp_path, capsys):
    watch, lines, calls = churn(guest, network, tmp_path, "--rules", rules, "--enforce", seconds=SECONDS)
    counts, wrong = compare(watch.verdicts, lines)
    with capsys.disabled():
        print("\nchurn, held:", dict(sorted(counts.items())), "torn", watch.summary["torn"], calls)
    assert not wrong
    tcp = ("tcp-out", "tcp-in")
    assert total(counts, tcp, ("exact", "listener")) > SECONDS * 20
    assert total(counts, tcp, ("none",)) == 0
    assert total(counts, ALL, ("exact", "listener", "unconnected")) >= 0.95 * total(
        counts, ALL, ("exact", "listener", "unconnected", "none")
    )
    assert calls.failed == 0


@pytest.mark.parametrize("fail", ["open", "closed"])
def test_a_killed_appliance_leaves_the_network_as_the_operator_chose(guest, network, rules, tmp_path, fail):
    with Watching(f"qemu:{guest.pid}", "--rules", rules, "--enforce", "--fail", fail, home=tmp_path) as watch:
        assert reaches(guest)
        watch.kill()
        time.sleep(2)
        assert reaches(guest) is (fail == "open")
    clean = parasight("stop", "--clean", home=tmp_path)
    assert not [line for line in clean.out.splitlines() if line.startswith("kept") and str(network.path()) in line]
    assert reaches(guest)
    shown = tc(network, "filter", "show", "dev", guest.port, "ingress")
    assert "parasight" not in shown
    assert "clsact" not in tc(network, "qdisc", "show", "dev", guest.port)


def reaches(guest) -> bool:
    """Whether a new connection of the guest to the world works."""
    script = f'import socket; socket.create_connection(("{WORLD_IP4}", 80), 1.5)'
    return guest.run(["/usr/bin/python3", "-c", script]).returncode == 0


def tc(network, *words: str) -> str:
    return subprocess.run(network.enter("tc", *words), check=True, capture_output=True, text=True, timeout=10).stdout
