"""`parasight watch` on a host with libvirt: it follows the domains, whatever becomes of them, and changes none."""

import os
import re
import signal
import time
from collections.abc import Iterator

import pytest

from appliance.hosts.proc import read_age_s
from appliance.hosts.targets import resolve
from appliance.routes import open_memory
from lab.image import build
from lab.libvirtd import Libvirtd
from lab.network import Network
from lab.world import World
from tests.worlds.command import Watching

pytestmark = pytest.mark.system

MARK = "<p:guest xmlns:p='urn:parasight:domain:1' watch='yes' tags='web'/>"
CALL = "import socket, time; one = socket.create_connection(('10.77.0.1', 7000)); time.sleep(1)"
PANIC = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex("66ba0505 b001 ee c3"))  # mov dx, 0x505; mov al, 1; out dx, al; ret: docs/specs/pvpanic.rst
ctypes.CDLL(None).ioperm(0x505, 1, 1)
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
"""


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[Libvirtd]:
    with Network() as network, World(network), Libvirtd(network) as made:
        yield made


@pytest.fixture
def watching(libvirtd, monkeypatch, tmp_path):
    """`parasight watch` with these words, of no named guest; ended without a traceback."""
    monkeypatch.setenv("PARASIGHT_LIBVIRT_URI", libvirtd.uri)
    begun = []

    def begin(*words):
        begun.append(Watching(*words, home=tmp_path))
        return begun[-1]

    yield begin
    for watch in begun:
        watch.end()


def wait_for(condition, seconds=120):
    """Until it holds; the bound only ends a hang."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def said(watch, *words):
    return [line for line in watch.said if all(word in line for word in words)]


def start(libvirtd, watch, name, *words):
    """Start a domain and wait until it is under watch. Its process, and the seconds since that started."""
    libvirtd.virsh("start", name, *words)
    pid = libvirtd.qemu_pid(name)
    wait_for(lambda: said(watch, f"qemu:{pid}: under watch ({name})"))
    age_s = read_age_s(pid)
    print(f"{name}: under watch {age_s:.1f} s after its QEMU started")
    return pid, age_s


def ended(watch, pid):
    wait_for(lambda: said(watch, f"qemu:{pid}: ", "ended"))


def test_a_domain_is_followed_through_all_its_lives(libvirtd, watching) -> None:
    watch = watching("--opt-in")
    libvirtd.define_tiny("life-1", metadata=MARK)
    libvirtd.define_tiny("life-2")
    libvirtd.virsh("start", "life-2", "--paused")  # says nothing, so it is not watched
    first, _ = start(libvirtd, watch, "life-1", "--paused")
    for act in ("resume", "suspend", "resume", "reset", "reboot"):
        libvirtd.virsh(act, "life-1")
    libvirtd.virsh("destroy", "life-1")
    ended(watch, first)
    libvirtd.virsh("domrename", "life-1", "life-3")
    second, _ = start(libvirtd, watch, "life-3")
    os.kill(second, signal.SIGKILL)
    ended(watch, second)
    wait_for(lambda: "shut off" in libvirtd.virsh("domstate", "life-3"))
    third, _ = start(libvirtd, watch, "life-3", "--paused")
    libvirtd.restart()
    libvirtd.virsh("resume", "life-3")
    fourth = libvirtd.qemu_pid("life-3")
    assert fourth == third
    assert not said(watch, f"qemu:{third}: ", "ended")
    libvirtd.virsh("destroy", "life-3")
    ended(watch, third)
    again, _ = start(libvirtd, watch, "life-3", "--paused")
    assert len({first, second, third, again}) == 4
    assert not said(watch, "life-2")
    libvirtd.virsh("destroy", "life-3")
    libvirtd.virsh("destroy", "life-2")


def test_the_processes_of_a_domain_are_named_before_and_after_pause_reset_and_restart(libvirtd, watching) -> None:
    watch = watching("--opt-in")
    guest = libvirtd.boot(build("debian-12-cloud"), name="life-db", metadata=MARK)
    pid = libvirtd.qemu_pid("life-db")
    before = unchanging(libvirtd, "life-db")

    def call():
        """One connection of the guest, and what is said of it."""
        count = len(watch.verdicts)
        guest.run(["/usr/bin/python3", "-c", CALL])
        calls = lambda: [body for body in watch.verdicts[count:] if body["flow"]["remote"]["port"] == 7000]  # noqa: E731
        return wait_for(calls)[0]

    def kernels():
        return len(said(watch, f"qemu:{pid}: Linux "))

    wait_for(kernels)
    bodies = [call()]
    libvirtd.virsh("suspend", "life-db")
    libvirtd.virsh("resume", "life-db")
    bodies.append(call())
    known = kernels()
    libvirtd.virsh("reset", "life-db")
    wait_for(lambda: kernels() > known)
    wait_for(lambda: guest.agent.hello(0.5))
    bodies.append(call())
    memory = open_memory(resolve(guest.uuid), "libvirt")
    assert len(memory.read(0x1000000, 1 << 20)) == 1 << 20
    memory.close()
    assert unchanging(libvirtd, "life-db") == before
    libvirtd.restart()  # which by itself puts the XML in another order
    bodies.append(call())
    assert [(body["binding"]["match"], body["process"]["name"]) for body in bodies] == [("exact", "python3")] * 4
    guest.spawn(["/usr/bin/python3", "-c", PANIC])
    wait_for(lambda: said(watch, f"qemu:{pid}: its kernel has crashed"))
    libvirtd.virsh("destroy", "life-db")
    ended(watch, pid)


def test_a_domain_that_was_named_is_watched_again_in_its_next_life(libvirtd, watching) -> None:
    uuid = libvirtd.define_tiny("named-1")
    libvirtd.virsh("start", "named-1", "--paused")
    first = libvirtd.qemu_pid("named-1")
    watch = watching(uuid)
    libvirtd.virsh("destroy", "named-1")
    ended(watch, first)
    second, _ = start(libvirtd, watch, "named-1", "--paused")
    assert second != first
    libvirtd.virsh("destroy", "named-1")
    ended(watch, second)


def test_twenty_domains_are_under_watch_at_once(libvirtd, watching) -> None:
    watch = watching()
    names = [f"many-{number}" for number in range(20)]
    for name in names:
        libvirtd.define_tiny(name)
    libvirtd.virsh("; ".join(f"start {name} --paused" for name in names))
    pids = {name: libvirtd.qemu_pid(name) for name in names}
    for name, pid in pids.items():
        wait_for(lambda text=f"qemu:{pid}: under watch ({name})": said(watch, text))
    print(f"twenty domains: all under watch {read_age_s(pids[names[-1]]):.1f} s after the last one's QEMU started")
    libvirtd.virsh("; ".join(f"destroy {name}" for name in names))
    for pid in pids.values():
        ended(watch, pid)


def unchanging(libvirtd, name):
    """What libvirt knows of a domain, with what taints it; without its CPU time and who listens to its agent."""
    info = re.sub(r"CPU time:.*", "", libvirtd.virsh("dominfo", name))
    return info, re.sub(r" state='(dis)?connected'", "", libvirtd.virsh("dumpxml", name))
