"""Real QEMU processes, stopped before their first instruction, in namespaces of their own."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.errors import ConfigError, HostError, UsageError
from appliance.hosts.netns import call_in, read_inode
from appliance.hosts.qemu import find_guest, find_guests
from appliance.hosts.taps import Held, find_taps
from appliance.hosts.targets import resolve
from tests.respond.desks import eventually

pytestmark = pytest.mark.root("network namespaces and taps")
MAC = "52:54:00:77:01:02"
UUID = "3d1f3c6a-5b5e-4c7a-9d53-0f3a5b6c7d8e"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


@pytest.fixture
def spaces() -> Iterator[tuple[str, str]]:
    names = (f"psq-a-{os.getpid()}", f"psq-b-{os.getpid()}")
    for name in names:
        ip("netns", "add", name)
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=10)


def descriptors_of(pid: int) -> list[str]:
    """What each open file of a process is; one that it closes meanwhile is left out."""
    names = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append(str(entry.readlink()))
    return names


@contextlib.contextmanager
def running(netns: str, *words: str, fds: tuple[int, ...] = ()) -> Iterator[int]:
    command = ["qemu-system-x86_64", "-S", "-accel", "tcg", "-m", "48", "-nodefaults", "-display", "none", *words]
    inside = lambda: subprocess.Popen(command, pass_fds=fds, stderr=subprocess.PIPE)  # noqa: E731
    process = call_in(f"/run/netns/{netns}", inside)
    try:
        for _ in range(100):
            if process.poll() is not None:
                pytest.fail(f"QEMU ended: {process.stderr.read().decode()}")
            names = descriptors_of(process.pid)
            if any("eventfd" in name for name in names) and len(names) > 8:
                break
            time.sleep(0.05)
        time.sleep(0.3)
        yield process.pid
    finally:
        process.kill()
        process.communicate(timeout=10)


def tap(name: str) -> tuple[str, ...]:
    device = ("-device", f"virtio-net-pci,netdev=n0,mac={MAC}")
    return ("-netdev", f"tap,id=n0,ifname={name},script=no,downscript=no", *device)


def test_a_tap_in_qemus_own_namespace_is_found_with_its_mac(spaces) -> None:
    here, _ = spaces
    with running(here, "-name", "guest=psq-web", "-uuid", UUID, *tap("psqtap")) as pid:
        guest = find_guest(pid)
        (port,) = guest.ports
        assert (port.ifname, port.mac) == ("psqtap", MAC)
        assert Path(port.netns).stat().st_ino == Path(f"/run/netns/{here}").stat().st_ino
        assert port.ifindex == call_in(f"/run/netns/{here}", lambda: socket.if_nametoindex("psqtap"))
        assert (guest.id.target, guest.id.name, guest.id.uuid) == (f"qemu:{pid}", "psq-web", UUID)
        assert guest.memory_bytes == 48 << 20
        assert guest.id.instance.startswith(f"{pid}-")
        assert guest.id in [other.id for other in find_guests()]
        for word in (f"qemu:{pid}", "psq-web", UUID, UUID.upper()):
            assert resolve(word).id == guest.id
        with pytest.raises(UsageError, match="did you mean psq-web"):
            resolve("psq-wep")


def test_a_tap_moved_to_another_namespace_is_found_there_although_the_name_is_taken_here(spaces) -> None:
    here, there = spaces
    with running(here, *tap("psqtap")) as pid:
        ip("-n", here, "link", "set", "psqtap", "netns", there)
        ip("-n", here, "tuntap", "add", "psqtap", "mode", "tap")
        (port,) = find_guest(pid).ports
        assert Path(port.netns).stat().st_ino == Path(f"/run/netns/{there}").stat().st_ino
        assert port.netns == f"/run/netns/{there}"


def test_a_tap_handed_in_as_a_descriptor_is_matched_to_its_card(spaces) -> None:
    import fcntl
    import struct

    here, there = spaces

    def make() -> int:
        descriptor = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(descriptor, 0x400454CA, struct.pack("16sH22x", b"psqhanded", 0x1002 | 0x4000))
        return descriptor

    descriptor = call_in(f"/run/netns/{there}", make)
    words = ("-netdev", f"tap,id=n0,fd={descriptor}", "-device", f"virtio-net-pci,netdev=n0,mac={MAC}")
    try:
        with running(here, *words, fds=(descriptor,)) as pid:
            (port,) = find_guest(pid).ports
            assert (port.ifname, port.mac, port.netns) == ("psqhanded", MAC, f"/run/netns/{there}")
    finally:
        os.close(descriptor)


def test_user_mode_networks_are_named_as_untappable(spaces) -> None:
    with running(spaces[0], "-netdev", "user,id=u0", "-device", "virtio-net-pci,netdev=u0") as pid:
        guest = find_guest(pid)
        assert guest.ports == ()
        assert any("u0" in note and "slirp" in note for note in guest.notes)


def test_what_is_no_qemu_is_named() -> None:
    with pytest.raises(UsageError, match=r"no QEMU system emulator, it is 'py"):
        find_guest(os.getpid())
    with pytest.raises(UsageError, match="no process"):
        resolve("qemu:4194399")
    with pytest.raises(UsageError, match="process id"):
        resolve("qemu:web")


def test_a_process_that_only_calls_itself_qemu_is_not_believed() -> None:
    code = "import time; time.sleep(30)"
    process = subprocess.Popen(["qemu-system-x86_64", "-c", code], executable=sys.executable)
    try:
        with pytest.raises(UsageError, match="no QEMU"):
            find_guest(process.pid)
    finally:
        process.kill()
        process.wait(timeout=10)


def test_ports_and_files_are_resolved_or_refused_by_name(spaces, tmp_path) -> None:
    here, _ = spaces
    ip("-n", here, "tuntap", "add", "psqport", "mode", "tap")
    guest = resolve(f"port:psqport@{here}")
    assert (guest.ports[0].ifname, guest.ports[0].netns) == ("psqport", f"/run/netns/{here}")
    with pytest.raises(UsageError, match="did you mean psqport"):
        resolve(f"port:psqprot@{here}")
    with pytest.raises(UsageError, match="no network namespace"):
        resolve("port:psqport@nowhere")
    image = tmp_path / "guest.raw"
    image.write_bytes(b"x" * 100)
    assert resolve(f"file:{image}").memory_bytes == 100
    with pytest.raises(UsageError, match=r"did you mean guest\.raw"):
        resolve(f"file:{tmp_path}/guest.rwa")
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="empty"):
        resolve(f"file:{tmp_path}/empty")


def test_an_unknown_name_says_what_can_be_named() -> None:
    with pytest.raises(UsageError, match="qemu:PID"):
        resolve("zzz-nobody-zzz")


def test_what_is_no_network_namespace_is_an_error_with_its_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="file"):
        resolve(f"port:tap0@{tmp_path}/file")


def test_a_macvtap_that_was_handed_in_is_not_any_interface_with_its_number(spaces, tmp_path):
    here, there = spaces
    ip("-n", here, "link", "add", "psqother", "index", "4711", "type", "veth", "peer", "name", "psqpeer")
    ip("-n", there, "link", "add", "psqlower", "type", "veth", "peer", "name", "psqpeer")
    ip("-n", there, "link", "add", "link", "psqlower", "name", "psqmv", "index", "4711", "type", "macvtap")
    show = ["ip", "netns", "exec", there, "sh", "-c", "cat /sys/class/net/psqmv/macvtap/*/dev"]
    numbers = subprocess.run(show, check=True, capture_output=True, text=True, timeout=10).stdout
    node = tmp_path / "tap4711"
    os.mknod(node, 0o600 | 0o020000, os.makedev(*map(int, numbers.split(":"))))
    descriptor = call_in(f"/run/netns/{there}", lambda: os.open(node, os.O_RDWR))
    holder = subprocess.Popen(["ip", "netns", "exec", here, "sleep", "60"], pass_fds=(descriptor,))
    try:
        eventually(lambda: read_inode(f"/proc/{holder.pid}/ns/net") == read_inode(f"/run/netns/{here}"))
        notes = []
        (tap,) = find_taps(holder.pid, [Held(descriptor, device="/dev/tap4711")], notes)
        assert (tap.ifname, tap.netns, notes) == ("psqmv", f"/run/netns/{there}", [])
        ip("-n", there, "link", "del", "psqmv")
        assert find_taps(holder.pid, [Held(descriptor, device="/dev/tap4711")], notes) == []
        assert "is in no network namespace that can be seen" in notes[0]
    finally:
        os.close(descriptor)
        holder.kill()
        holder.wait()
