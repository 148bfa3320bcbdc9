"""The truth script's document as Python objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Owner:
    """A holder of a socket. `pid` is that of the guest's initial pid namespace."""

    pid: int
    fd: int
    name: str


@dataclass(frozen=True, slots=True)
class Socket:
    """A socket as `ss` prints it. `state` is ss's word. `netns` is the namespace's inode number.

    `local` is '::' where ss prints '*'. `device` is what ss prints after '%', else ''.
    """

    protocol: str
    state: str
    local: str
    lport: int
    remote: str | None
    rport: int | None
    owners: tuple[Owner, ...]
    netns: int
    device: str = ""


@dataclass(frozen=True, slots=True)
class Process:
    """A process as /proc shows it. `pids` is NSpid: from the initial namespace to its own."""

    pid: int
    ppid: int
    name: str
    exe: str | None
    cmdline: tuple[str, ...]
    uid: int
    starttime_ticks: int
    cgroup: str
    nspid: tuple[int, ...]
    netns: int
    threads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Truth:
    """What the guest says about itself. `ram` holds (first, last) of every System RAM range of /proc/iomem."""

    sockets: tuple[Socket, ...]
    processes: tuple[Process, ...]
    raw_ss: dict[int, str]
    packet_ss: dict[int, str]
    symbols: dict[str, int]
    ram: tuple[tuple[int, int], ...]
    boot_id: str
    release: str
    version: str
    init_netns: int
    clock_ticks: int

    @classmethod
    def parse(cls, document: dict[str, Any]) -> Self:
        """From the script's JSON."""
        return cls(
            sockets=tuple(_socket(entry) for entry in document["sockets"]),
            processes=tuple(_process(entry) for entry in document["processes"]),
            raw_ss={int(netns): text for netns, text in document["raw_ss"].items()},
            packet_ss={int(netns): text for netns, text in document["packet_ss"].items()},
            symbols=document["symbols"],
            ram=tuple((first, last) for first, last in document["ram"]),
            boot_id=document["boot_id"],
            release=document["release"],
            version=document["version"],
            init_netns=document["init_netns"],
            clock_ticks=document["clock_ticks"],
        )

    def process(self, pid: int) -> Process | None:
        """The process with this pid."""
        return next((process for process in self.processes if process.pid == pid), None)


def _socket(entry: dict[str, Any]) -> Socket:
    owners = tuple(Owner(**owner) for owner in entry.pop("owners"))
    return Socket(owners=owners, **entry)


def _process(entry: dict[str, Any]) -> Process:
    lists: dict[str, Any] = {key: tuple(entry.pop(key)) for key in ("cmdline", "nspid", "threads")}
    return Process(**lists, **entry)
