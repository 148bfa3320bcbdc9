"""A real libvirtd of the lab's own: its files, sockets and domains are seen by nobody else.

    with Network() as network, Libvirtd(network) as libvirtd:
        uuid = libvirtd.define_tiny("web-1")        # a machine without disks and kernel
        libvirtd.virsh("start", "web-1", "--paused")
        connection = libvirt.open(libvirtd.uri)     # from any process; PARASIGHT_LIBVIRT_URI for the appliance
        guest = libvirtd.boot(build("debian-12-cloud"), name="db-1")
        guest.run("ss -tn")

It runs in the lab's network, so libvirt makes its taps on the lab's bridge. `lab.keeper` stands between us and it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid as uuids
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from lab.domain import Domain, boot_parts, card_xml, make_xml
from lab.image import Image
from lab.network import Network
from lab.packages import LabError

START_S = 120.0  # the first daemon asks every QEMU binary what it can do
KEEPER = Path(__file__).with_name("keeper.py")
QEMU_CONF = """\
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
remember_owner = 0
stdio_handler = "file"
namespaces = []
"""
LIBVIRTD_CONF = """\
unix_sock_dir = "{folder}"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "3:stderr"
"""


class Libvirtd:
    """One daemon. `uri` and `socket` stay the same while it is restarted; `pid` does not."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.folder = Path(tempfile.mkdtemp(prefix="lab-libvirt-"))
        self.socket = self.folder / "libvirt-sock"
        self.uri = f"qemu+unix:///system?socket={self.socket}"
        self.pid = 0
        self._keeper: subprocess.Popen[str] | None = None
        self._domains: list[Domain] = []

    def __enter__(self) -> Self:
        if shutil.which("libvirtd") is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise LabError("libvirtd is missing; remedy: apt-get install libvirt-daemon libvirt-daemon-driver-qemu")
        atexit.register(self.close)
        etc = self.folder / "etc"
        etc.mkdir()
        (etc / "qemu.conf").write_text(QEMU_CONF)
        (etc / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(folder=self.folder))
        try:
            self._keeper = subprocess.Popen(
                self.network.enter(sys.executable, "-I", str(KEEPER), str(self.folder)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the daemon and wait until it answers."""
        assert self._keeper is not None
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._keeper.stdin.write("\n")
        self._keeper.stdin.flush()
        self.pid = int(self._keeper.stdout.readline() or 0)
        end = time.monotonic() + START_S
        while not self.pid or self._virsh("uri").returncode:
            if not self.pid or time.monotonic() > end or not Path(f"/proc/{self.pid}").exists():
                raise LabError(f"libvirtd did not start; remedy: run as root\n{self.log()}")
            time.sleep(0.1)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End the daemon and wait until it is gone; its domains run on."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
        while Path(f"/proc/{self.pid}").exists():
            time.sleep(0.02)

    def restart(self) -> None:
        """Another daemon over the same domains."""
        self.stop()
        self.start()

    @contextmanager
    def stuck(self) -> Iterator[None]:
        """While this lasts, the daemon takes connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def virsh(self, *words: str) -> str:
        """What virsh prints. LabError with its complaint."""
        done = self._virsh(*words)
        if done.returncode:
            raise LabError(f"`virsh {' '.join(words)}` failed: {done.stderr.strip()}")
        return done.stdout.strip()

    def define(self, xml: str) -> None:
        """Define a domain from its XML."""
        path = self.folder / "define.xml"
        path.write_text(xml)
        self.virsh("define", str(path))

    def define_tiny(
        self, name: str, *, uuid: str | None = None, ports: int = 1, devices: str = "", metadata: str = ""
    ) -> str:
        """Define a machine of 16 MiB without disks and kernel; its UUID. Started ``--paused`` it costs nothing."""
        identity = uuid or str(uuids.uuid4())
        cards = "".join(card_xml(self.network.next_place()) for _ in range(ports))
        self.define(make_xml(name, identity, 16, devices=cards + devices, metadata=metadata))
        return identity

    def boot(
        self, image: Image, *, name: str, memory_mb: int = 1024, append: str = "", devices: str = "", metadata: str = ""
    ) -> Domain:
        """Define a lab image, start it, and return when its agent answers."""
        port = self.network.next_place()
        kernel, more = boot_parts(image, port, name, self.folder, append)
        domain = Domain(name, str(uuids.uuid4()), port, self.folder)
        self.define(make_xml(name, domain.uuid, memory_mb, kernel=kernel, devices=more + devices, metadata=metadata))
        self._domains.append(domain)
        self.virsh("start", name)
        domain.connect()
        return domain

    def qemu_pid(self, name: str) -> int:
        """The process of a domain that is here, from libvirt's own file."""
        assert self._keeper is not None
        return int(Path("/proc", str(self._keeper.pid), "root", "run/libvirt/qemu", f"{name}.pid").read_text())

    def log(self) -> str:
        """What the daemon complained about."""
        path = self.folder / "libvirtd.log"
        return path.read_text(errors="replace")[-2000:] if path.exists() else ""

    def close(self) -> None:
        """End the daemon and every domain, remove its files; may be called twice."""
        atexit.unregister(self.close)
        for domain in self._domains:
            domain.disconnect()
        if self._keeper is not None:
            with suppress(OSError):
                os.kill(self.pid, signal.SIGCONT)
            self._keeper.communicate()
            self._keeper = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _virsh(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = ["virsh", "-q", "-c", self.uri, *words]
        try:
            return subprocess.run(command, check=False, capture_output=True, text=True, timeout=START_S)
        except FileNotFoundError:
            raise LabError("virsh is missing; remedy: apt-get install libvirt-clients") from None
