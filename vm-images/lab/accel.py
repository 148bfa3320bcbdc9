"""KVM or TCG, decided by trying: /dev/kvm may be there, and a guest on it may still never run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import time
from pathlib import Path

from lab.image import build
from lab.packages import LabError, cache_dir, locked

QEMU = "qemu-system-x86_64"
TRIAL_S = 10.0  # under a working KVM the kernel needs about one second, under TCG about five


def accelerator() -> str:
    """'kvm' where a trial boot proved it on this boot of this host with this QEMU, else 'tcg'."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    memory = cache_dir() / f"accelerator-{_host_key()}"
    if not memory.exists():
        kernel = build("debian-12-cloud").kernel
        with locked("accelerator"):
            if not memory.exists():
                memory.write_text("kvm" if boots("kvm", kernel) else "tcg")
    return memory.read_text()


def boots(accel: str, kernel: Path, timeout_s: float = TRIAL_S) -> bool:
    """Whether a kernel started without a root file system comes as far as to say so, in time."""
    with tempfile.TemporaryDirectory(prefix="parasight-trial-") as work:
        console = Path(work, "console.log")
        command = [QEMU, "-accel", accel, "-cpu", "max", "-m", "256", "-display", "none", "-nodefaults", "-net", "none"]
        command += ["-no-reboot", "-serial", f"file:{console}", "-kernel", str(kernel)]
        command += ["-append", "console=ttyS0 panic=0"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                deadline = time.monotonic() + timeout_s
                while time.monotonic() < deadline and process.poll() is None:
                    if console.exists() and b"Unable to mount root fs" in console.read_bytes():
                        return True
                    time.sleep(0.05)
                return False
            finally:
                process.kill()


def _host_key() -> str:
    try:
        version = subprocess.check_output([QEMU, "--version"], text=True)
    except FileNotFoundError:
        raise LabError(f"{QEMU} is missing; remedy: apt-get install qemu-system-x86") from None
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
    return hashlib.sha256(f"{os.uname().release}|{boot_id}|{version}".encode()).hexdigest()[:16]
