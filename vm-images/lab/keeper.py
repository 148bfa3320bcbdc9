"""Keeps a libvirtd apart from the host: the process between the lab and the daemon. A script on its own.

It makes a mount namespace with private /run, /var and /etc/libvirt, and starts the daemon in it whenever it reads a
line; it answers with the daemon's pid. It adopts the QEMUs, which libvirtd leaves to init (somebody must reap them),
and ends all that it started when its standard input ends, that is also when the lab dies, or when it is told to.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # whoever ends the lab may mean all of its processes
CLONE_NEWNS, PR_SET_CHILD_SUBREAPER = 0x20000, 36
MOUNTS = """
mount --make-rprivate /
mount -t tmpfs -o mode=755 lab /run
mkdir -p /run/lab/upper /run/lab/work /run/lock
mount -t overlay -o lowerdir=/var,upperdir=/run/lab/upper,workdir=/run/lab/work lab /var
mkdir -p /var/lib/libvirt /var/log/libvirt /var/cache/libvirt
mount -t tmpfs lab /etc/libvirt
mount -t sysfs sysfs /sys
cp -r "$1"/etc/. /etc/libvirt
if ! grep -q ^libvirt-qemu: /etc/passwd; then  # the daemon wants to know this user, also when its guests are root's
    cp /etc/passwd /etc/group /run/lab
    echo libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin >>/run/lab/passwd
    echo libvirt-qemu:x:64055: >>/run/lab/group
    for file in passwd group; do mount --bind /run/lab/$file /etc/$file; done
fi
"""


def main(folder: str) -> None:
    """Serve until standard input ends; ``folder`` holds the daemon's configuration and gets its log."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) or libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "cannot make a mount namespace")
    subprocess.run(["sh", "-ec", MOUNTS, "sh", folder], check=True)
    wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(woken)
    for number in (signal.SIGCHLD, *ENDS):
        signal.signal(number, lambda *_: None)
    with Path(folder, "libvirtd.log").open("ab") as log:
        while True:
            ready, _, _ = select.select([0, wake], [], [])
            if wake in ready:
                if set(os.read(wake, 4096)) & set(ENDS):
                    break
                reap()
            if 0 in ready:
                if not os.read(0, 1):
                    break
                daemon = subprocess.Popen(["libvirtd"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                print(daemon.pid, flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    end_all()


def reap() -> None:
    """Take leave of every child that has ended, adopted ones too."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def end_all() -> None:
    """Kill our children until there is none: those of a killed one become ours."""
    while pids := children():
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)


def children() -> list[int]:
    """Whose parent we are; proc(5)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid():
                found.append(int(entry.name))
    return found


if __name__ == "__main__":
    main(sys.argv[1])
