"""KVM or TCG, decided by trying: /dev/kvm may be there, and a guest on it may still never run.

The trial boots the host's QEMU with its own firmware only; a working machine prints SeaBIOS's first line within a second.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import time
from pathlib import Path

from lab.packages import LabError, cache_dir, locked

QEMU = "qemu-system-x86_64"
TRIAL_S = 8.0


def accelerator() -> str:
    """'kvm' where a trial boot proved it on this boot of this host with this QEMU, else 'tcg'."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    memory = cache_dir() / f"accelerator-{_host_key()}"
    with locked("accelerator"):
        if not memory.exists():
            memory.write_text("kvm" if _trial_boot("kvm") else "tcg")
        return memory.read_text()


def _host_key() -> str:
    try:
        version = subprocess.check_output([QEMU, "--version"], text=True)
    except FileNotFoundError:
        raise LabError(f"{QEMU} is missing; remedy: apt-get install qemu-system-x86") from None
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
    return hashlib.sha256(f"{os.uname().release}|{boot_id}|{version}".encode()).hexdigest()[:16]


def _trial_boot(accel: str, timeout_s: float = TRIAL_S) -> bool:
    """Whether code runs: the firmware writes to its debug port (I/O port 0x402) as soon as the first vCPU does."""
    with tempfile.TemporaryDirectory(prefix="parasight-trial-") as work:
        log = Path(work, "firmware.log")
        command = [QEMU, "-accel", accel, "-cpu", "max", "-m", "64", "-display", "none", "-nodefaults", "-net", "none"]
        command += ["-no-reboot", "-chardev", f"file,id=log,path={log}", "-device", "isa-debugcon,iobase=0x402,chardev=log"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + timeout_s
            while time.monotonic() < deadline and process.poll() is None:
                if log.exists() and b"No bootable device" in log.read_bytes():
                    return True
                time.sleep(0.05)
            return False
        finally:
            process.kill()
            process.wait()
