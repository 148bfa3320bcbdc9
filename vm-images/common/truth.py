# ruff: noqa: PTH116, PTH123, PTH208, PTH110, PTH115
# (no pathlib: it takes long to import in an emulated guest)
"""Prints as one JSON document what this guest knows about itself: sockets as `ss` shows them, processes as /proc does.

Usage: truth.py [SYMBOL...]   (kernel symbols whose addresses are wanted)
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import compress

USERS = re.compile(r'"(.*?)",pid=(\d+),fd=(\d+)')


def main() -> None:
    spaces = net_namespaces()
    raw, others = {}, {}
    for netns, pid in spaces.items():
        raw[netns], others[netns] = ss(pid)
    document = {
        "sockets": [socket for netns, text in raw.items() for socket in parse(text, netns)],
        "raw_ss": raw,
        "packet_ss": others,
        "processes": list(processes()),
        "symbols": symbols(set(sys.argv[1:])),
        "ram": ram(),
        "boot_id": read("/proc/sys/kernel/random/boot_id").strip(),
        "release": os.uname().release,
        "version": os.uname().version,
        "init_netns": inode("/proc/1/ns/net"),
        "clock_ticks": os.sysconf("SC_CLK_TCK"),
    }
    json.dump(document, sys.stdout)


def read(path: str) -> str:
    with open(path, "rb") as file:
        return file.read().decode(errors="surrogateescape")


def inode(path: str) -> int:
    return os.stat(path).st_ino


def pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def net_namespaces() -> dict[int, int]:
    """Inode number of each network namespace that has a process, with one such process."""
    found: dict[int, int] = {}
    for pid in pids():
        try:
            found.setdefault(inode(f"/proc/{pid}/ns/net"), pid)
        except OSError:
            continue
    return found


def ss(pid: int) -> tuple[str, str]:
    """The lines of `ss -tuanpOH` in the process's network namespace, and those of `ss -w0anpOH`; one walk for both."""
    command = ["/usr/bin/nsenter", f"--net=/proc/{pid}/ns/net", "/usr/bin/ss", "-tuw0anpOH"]
    done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", check=False)
    if done.returncode != 0 and os.path.exists(f"/proc/{pid}"):
        raise OSError(f"ss failed: {done.stderr}")
    lines = done.stdout.splitlines(keepends=True)
    ours = [line.startswith(("tcp", "udp")) for line in lines]
    return "".join(compress(lines, ours)), "".join(compress(lines, (not our for our in ours)))


def parse(text: str, netns: int) -> Iterator[dict[str, object]]:
    for line in text.splitlines():
        protocol, state, _, _, local, remote, *rest = line.split(None, 6)
        address, lport, device = endpoint(local)
        peer, rport, _ = endpoint(remote)
        owners = [{"name": n, "pid": int(p), "fd": int(f)} for n, p, f in USERS.findall(rest[0] if rest else "")]
        yield {
            "protocol": protocol,
            "state": state,
            "local": address,
            "lport": lport,
            "remote": peer if rport else None,
            "rport": rport or None,
            "owners": sorted(owners, key=lambda owner: (owner["pid"], owner["fd"])),
            "netns": netns,
            "device": device,
        }


def endpoint(text: str) -> tuple[str, int, str]:
    """'[::1]%lo:80' and the like; '*' is a wildcard address (both families) or port."""
    address, _, port = text.rpartition(":")
    address, _, device = address.partition("%")
    address = address.strip("[]").split("%")[0]
    return "::" if address == "*" else address, 0 if port == "*" else int(port), device.strip("]")


def processes() -> Iterator[dict[str, object]]:
    for pid in pids():
        try:
            yield process(pid)
        except OSError:
            continue


def process(pid: int) -> dict[str, object]:
    status = dict(line.split(":\t", 1) for line in read(f"/proc/{pid}/status").splitlines() if ":\t" in line)
    stat = read(f"/proc/{pid}/stat")
    try:
        exe: str | None = os.readlink(f"/proc/{pid}/exe")
    except OSError:  # a kernel thread
        exe = None
    return {
        "pid": pid,
        "ppid": int(status["PPid"]),
        "name": stat[stat.index("(") + 1 : stat.rindex(")")],
        "exe": exe,
        "cmdline": read(f"/proc/{pid}/cmdline").split("\0")[:-1],
        "uid": int(status["Uid"].split()[1]),
        "starttime_ticks": int(stat[stat.rindex(")") + 2 :].split()[19]),
        "cgroup": read(f"/proc/{pid}/cgroup").strip().rpartition("::")[2],
        "nspid": [int(number) for number in status["NSpid"].split()],
        "netns": inode(f"/proc/{pid}/ns/net"),
        "threads": sorted(int(name) for name in os.listdir(f"/proc/{pid}/task")),
    }


def symbols(wanted: set[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    if wanted:
        with open("/proc/kallsyms") as table:
            for line in table:
                address, _, name = line.split()[:3]
                if name in wanted:
                    found.setdefault(name, int(address, 16))
    return found


def ram() -> list[list[int]]:
    """First and last address of each System RAM range."""
    lines = [line for line in read("/proc/iomem").splitlines() if line.endswith(" : System RAM")]
    return [[int(number, 16) for number in line.split(" : ")[0].strip().split("-")] for line in lines]


if __name__ == "__main__":
    main()
