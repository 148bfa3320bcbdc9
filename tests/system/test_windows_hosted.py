"""A Windows machine made of bytes on a real hypervisor: a QEMU's RAM, a port, the whole appliance before it."""

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from appliance.memory.qemu import open_qemu
from lab.network import Network
from tests.worlds.command import ROOT, Watching, parasight
from tests.worlds.hosted import ACK, FIN, RST, SYN, Hosted
from tests.worlds.windows.machine import Machine

pytestmark = pytest.mark.system

RATE, SECONDS = 500, 10  # new connections a second, and for how long
ALIVE = 200  # connections that are open at a time
C2 = ("203.0.113.66", 4444)
SERVICES = ("MsMpEng.exe", "chrome.exe", "Teams.exe", "OneDrive.exe", "backup.exe")


@pytest.fixture
def ram(tmp_path):
    """RAM in memory, as QEMU's shared backends have it."""
    path = Path("/dev/shm", f"parasight-{tmp_path.name}-{time.monotonic_ns()}.raw")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def bridge():
    with Network() as made:
        yield made


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])
def test_the_ram_of_a_windows_guest_is_found_and_read(bridge, ram, tmp_path, shared):
    with Machine("20348", path=ram) as machine:
        machine.write_symbols(tmp_path)
        notepad = machine.process("notepad.exe", parent=machine["explorer.exe"])
        machine.tcp(notepad, ("10.77.0.11", 49800), C2)
        with Hosted(bridge, ram, shared=shared) as host:
            _wait_for_ram(host.pid)
            if not shared:
                memory = open_qemu(host.pid)
                assert memory.proof == "proven by the page tables of its Windows kernel"
                memory.close()
            done = parasight("connections", f"qemu:{host.pid}", "--symbols", tmp_path, "-o", "jsonl", home=tmp_path)
    assert done.code == 0, done.err
    (row,) = [row for row in done.objects if row["remote"] and row["remote"]["ip"] == C2[0]]
    assert (row["state"], row["remote"]["port"], row["flags"]) == ("ESTABLISHED", C2[1], [])
    assert [(owner["pid"], owner["name"]) for owner in row["owners"]] == [(notepad.pid, "notepad.exe")]


def _wait_for_ram(pid: int) -> None:
    """Until QEMU has made its machine."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            open_qemu(pid).close()
        except Exception:
            time.sleep(0.05)
            continue
        return
    open_qemu(pid).close()


class Traffic:
    """Processes that open and close connections; the machine's tables and the wire say the same."""

    def __init__(self, machine: Machine, host: Hosted) -> None:
        self.machine, self.host = machine, host
        self.chance = random.Random(7)
        self.owners = {}  # local port and remote end -> pid
        self.open = []
        self.port = 20_000
        self.programs = [machine.process(name, parent=machine["explorer.exe"]) for name in SERVICES]
        for program in self.programs:
            machine.thread(program, program.modules[0].base + 0x1000)

    def connect(self, process, remote) -> None:
        """As connect(2) does: the endpoint first, the SYN then."""
        self.port = self.port + 1 if self.port < 64_000 else 20_001
        local = ("10.77.0.11", self.port)
        endpoint = self.machine.tcp(process, local, remote, "SYN_SENT")
        self.owners[self.port, *remote] = process.pid
        self.host.tcp(local, remote, SYN)
        self.open.append((endpoint, local, remote))

    def go_on(self) -> None:
        """The oldest connection speaks, and closes; its block is poisoned, or used again by the next one."""
        endpoint, local, remote = self.open.pop(0)
        self.machine.tcp_state(endpoint, "ESTABLISHED")
        self.host.tcp(local, remote, ACK, 2, b"GET / HTTP/1.0\r\n\r\n")
        self.host.tcp(local, remote, self.chance.choice((FIN | ACK, RST)), 20)
        self.machine.tcp_close(endpoint, poison=self.chance.random() < 0.5)

    def run(self, seconds: float, rate: int) -> int:
        """Open so many connections a second; returns how many it were."""
        start, opened = time.monotonic(), 0
        while (now := time.monotonic() - start) < seconds:
            while opened < now * rate:
                address = f"198.51.100.{self.chance.randrange(1, 255)}"
                self.connect(self.chance.choice(self.programs), (address, self.chance.choice((80, 443))))
                opened += 1
                if len(self.open) > ALIVE:
                    self.go_on()
                if opened % 50 == 0:
                    self.machine.tick(0.1)
            time.sleep(0.001)
        return opened


def test_a_busy_windows_guest_has_every_owner_right_and_its_parasite_is_named(bridge, ram, tmp_path, capsys):
    with Machine("20348", path=ram) as machine:
        machine.write_symbols(tmp_path)
        notepad = machine.process("notepad.exe", parent=machine["explorer.exe"])
        region = machine.inject(notepad)
        with Hosted(bridge, ram) as host:
            traffic = Traffic(machine, host)
            _wait_for_ram(host.pid)
            words = (f"qemu:{host.pid}", "--symbols", tmp_path, "--rules", ROOT / "rules", "--no-second-opinion")
            with Watching(*words, home=tmp_path) as watch:
                traffic.run(1, 50)
                half = traffic.run(SECONDS / 2, RATE)
                traffic.connect(notepad, C2)
                opened = half + traffic.run(SECONDS / 2, RATE)
                time.sleep(1)
                assert watch.end() == 1, watch.said
    told = {(one["flow"]["local"]["port"], *one["flow"]["remote"].values()): one for one in watch.verdicts}
    matches = Counter(one["binding"]["match"] for one in told.values())
    wrong = [
        (key, one["process"]["pid"], traffic.owners[key])
        for key, one in told.items()
        if one["process"] is not None and one["process"]["pid"] != traffic.owners[key]
    ]
    with capsys.disabled():
        print(
            f"\n{opened} connections, {len(told)} verdicts: {dict(matches)}, torn {watch.summary['torn']}, "
            f"guest errors {watch.summary['guest_errors']}, lost {watch.summary['lost']}"
        )
    assert wrong == []
    assert watch.summary["lost"] == 0
    assert matches["exact"] >= 0.95 * len(told), matches
    assert len(told) >= 0.99 * opened
    parasite = told[next(port for port, *remote in traffic.owners if tuple(remote) == C2), *C2]
    assert parasite["process"]["name"] == "notepad.exe"
    assert (parasite["verdict"], parasite["parasitic"]) == ("deny", True)
    places = {item["kind"]: (int(item["address"], 16), item["size"]) for item in parasite["evidence"]}
    assert places["injected-pe"][0] == region.start, parasite["evidence"]
    assert "foreign-thread" in places
    honest = [(key, one["binding"], one["because"]) for key, one in told.items() if _is_flagged(one) and key[1:] != C2]
    assert honest == []


def _is_flagged(one: dict) -> bool:
    return one["alert"] or one["verdict"] == "deny"
