"""Which clsact qdiscs are ours: noted before they are made, so that they can be removed also after a crash.

A qdisc carries no mark of its maker; a file does, one for each port: ``ports/<netns inode>-<ifindex>`` in the run
folder. Inode numbers of namespaces are reused, so a note also holds the namespace's cookie (SO_NETNS_COOKIE, Linux
5.14: never reused before the next boot) and the boot's id. A note that does not fit exactly is no proof of anything.
Where the folder cannot be written, that is said once; a qdisc of ours is then removed only by who made it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Final

from appliance.tap.bpf.owner import Owner

RUN_DIR: Final = "/run/parasight"
VARIABLE: Final = "PARASIGHT_RUN_DIR"
SO_NETNS_COOKIE: Final = 71  # include/uapi/asm-generic/socket.h
LOCK: Final = ".lock"
LOCK_S: Final = 2.0  # others hold it for some milliseconds; a stopped one must not stop us
LOCK_POLL_S: Final = 0.005
MAX_NOTE: Final = 4096
MAX_NOTES: Final = 65536

_log: Final = logging.getLogger("parasight.tap")


@dataclass(frozen=True, slots=True)
class Place:
    """An interface of a network namespace: inode and cookie of the namespace (0: this kernel tells none), ifindex."""

    netns: int
    cookie: int
    ifindex: int


@dataclass(frozen=True, slots=True)
class Note:
    """One clsact qdisc of ours: where it hangs, and who made it."""

    place: Place
    ifname: str
    owner: Owner


def run_dir() -> Path:
    """The run folder: what only matters until the next boot."""
    return Path(os.environ.get(VARIABLE) or RUN_DIR)


def here(ifindex: int) -> Place:
    """The place of an interface in the calling thread's network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            cookie = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")
        except OSError:
            cookie = 0
    return Place(Path("/proc/thread-self/ns/net").stat().st_ino, cookie, ifindex)


class Journal:
    """The notes in the run folder; every process of ours uses the same."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or run_dir()) / "ports"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Only one process or thread of ours at a time attaches, detaches or cleans; the lock dies with its holder."""
        descriptor = self._open_lock()
        try:
            if descriptor is not None:
                _wait_for(descriptor)
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def write(self, note: Note) -> bool:
        """Note a qdisc before it is made, in place of an older note; whether that was possible."""
        body = {
            "ifname": note.ifname, "pid": note.owner.pid, "started": note.owner.started, "pid_ns": note.owner.pid_ns,
            "cookie": note.place.cookie, "boot": _boot_id(),
        }  # fmt: skip
        path = self._path(note.place)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            draft.unlink(missing_ok=True)
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(body, file)
            draft.replace(path)
        except OSError as error:
            _say_once(str(self.folder), error.strerror or str(error))
            return False
        return True

    def read(self, place: Place) -> Note | None:
        """The note on a place, None when there is none of this boot and this very namespace."""
        note = _parse(self._path(place))
        return note if note is not None and note.place == place else None

    def remove(self, place: Place) -> None:
        """Forget a place."""
        with suppress(OSError):
            self._path(place).unlink()

    def notes(self) -> list[Note]:
        """All notes of this boot; files that are none are left alone."""
        found = (_parse(self.folder / name) for name in self._list_names() if not name.startswith("."))
        return [note for note in found if note is not None]

    def tidy(self, namespace: Place, ports: Collection[int]) -> None:
        """Under the lock: forget drafts, and what the notes say of this namespace beside these ifindexes."""
        for name in self._list_names():
            if name.startswith(".") and name != LOCK:
                with suppress(OSError):
                    (self.folder / name).unlink()
        for note in self.notes():
            place = note.place
            if place.netns == namespace.netns and (place.cookie != namespace.cookie or place.ifindex not in ports):
                self.remove(place)

    def _list_names(self) -> list[str]:
        try:
            with os.scandir(self.folder) as entries:
                return sorted(entry.name for entry in islice(entries, MAX_NOTES))
        except OSError:
            return []

    def _path(self, place: Place) -> Path:
        return self.folder / f"{place.netns}-{place.ifindex}"

    def _open_lock(self) -> int | None:
        try:
            self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            return os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            _say_once(str(self.folder), error.strerror or str(error))
            return None


def _wait_for(descriptor: int) -> None:
    deadline = time.monotonic() + LOCK_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_POLL_S)
        else:
            return
    _log.warning("another process holds the lock on the notes of ports for long; going on without it")


def _parse(path: Path) -> Note | None:
    try:
        netns, _, ifindex = path.name.partition("-")
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            body = json.loads(file.read(MAX_NOTE))
        if body["boot"] != _boot_id():
            return None
        owner = Owner(int(body["pid"]), int(body["started"]), int(body["pid_ns"]))
        return Note(Place(int(netns), int(body["cookie"]), int(ifindex)), str(body["ifname"])[:15], owner)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


@lru_cache(1)
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


@lru_cache(64)
def _say_once(folder: str, why: str) -> None:
    _log.warning("%s cannot be written (%s): a clsact qdisc of ours would survive a crash", folder, why)
