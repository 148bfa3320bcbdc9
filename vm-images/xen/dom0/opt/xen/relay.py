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
import termios
import time
import tty

sys.path.insert(0, "/opt/lab")
from agent import port_path

SEPARATOR = b"\x1e"


def ask(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return done.stdout.strip()


def console() -> tuple[int, int]:
    """The number of the newest domain and a descriptor of its console; waits until there is one."""
    while True:
        domains = [int(name) for name in ask("/usr/bin/xenstore-list", "/local/domain").split()]
        newest = max(domains, default=0)
        path = ask("/usr/bin/xenstore-read", f"/local/domain/{newest}/console/tty") if newest else ""
        with contextlib.suppress(OSError):  # it may be the console of a domain that is being destroyed
            if path.startswith("/dev/"):
                descriptor = os.open(path, os.O_RDWR | os.O_NOCTTY)
                tty.setraw(descriptor, termios.TCSANOW)  # what has been said already is kept
                return newest, descriptor
        time.sleep(0.3)


def join(port: int, line: int, *, spoken: bool) -> bool:
    """Carry both ways until the console is hung up, as xenconsoled also does once when a domain is made.

    Whether the domain's agent has spoken. The virtio port is never at its end while the lab lives.
    """
    rest = b""
    while True:
        ready = select.select([port, line], [], [])[0]
        if port in ready and (orders := os.read(port, 65536)) and spoken:
            with contextlib.suppress(OSError):  # hung up: the next read says so
                write(line, orders)
        if line not in ready:
            continue
        try:
            said = os.read(line, 65536)
        except OSError:
            return spoken
        if not said:
            return spoken
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
    before, spoken = 0, False
    while True:
        domain, line = console()
        spoken = join(port, line, spoken=spoken and domain == before)
        before = domain
        os.close(line)


if __name__ == "__main__":
    main()
