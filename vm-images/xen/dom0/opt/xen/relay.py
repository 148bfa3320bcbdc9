"""Joins the lab's second line to the console of the newest domain, on which that domain's agent speaks.

The domain's kernel and shell write to its console, too: what the agent says lies between a record separator and a line
feed (RFC 7464); the rest stays in xenconsoled's log. Before a domain's agent has spoken, what the lab says is dropped:
a console that nobody reads in raw mode would echo it.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import tty

sys.path.insert(0, "/opt/lab")
from agent import port_path

SEPARATOR = b"\x1e"


def ask(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return done.stdout.strip()


def console(after: int) -> tuple[int, int]:
    """The number of the newest domain that is newer than this, and a descriptor of its console."""
    while True:
        domains = [int(name) for name in ask("/usr/bin/xenstore-list", "/local/domain").split()]
        newest = max(domains, default=0)
        path = ask("/usr/bin/xenstore-read", f"/local/domain/{newest}/console/tty") if newest > after else ""
        if path.startswith("/dev/"):
            descriptor = os.open(path, os.O_RDWR | os.O_NOCTTY)
            tty.setraw(descriptor)
            return newest, descriptor
        time.sleep(0.3)


def join(port: int, line: int) -> None:
    """Carry both ways until the console is hung up. The virtio port is never at its end while the lab lives."""
    rest, spoken = b"", False
    while True:
        ready = select.select([port, line], [], [])[0]
        if port in ready and (orders := os.read(port, 65536)) and spoken:
            write(line, orders)
        if line not in ready:
            continue
        try:
            said = os.read(line, 65536)
        except OSError:
            return
        if not said:
            return
        *lines, rest = (rest + said).split(b"\n")
        for text in lines:
            _, separator, message = text.rpartition(SEPARATOR)
            if separator:
                spoken = True
                write(port, message + b"\n")


def write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def main() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    port = os.open(port_path("lab.guest"), os.O_RDWR)
    domain = 0
    while True:
        domain, line = console(domain)
        with contextlib.suppress(OSError):  # the domain has ended while it was spoken to
            join(port, line)
        os.close(line)


if __name__ == "__main__":
    main()
