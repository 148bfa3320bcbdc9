"""From the word at the command line to a guest."""

from __future__ import annotations

import difflib
import socket
from pathlib import Path
from typing import Final

from appliance.errors import ConfigError, UsageError
from appliance.hosts.libvirt import list_domains
from appliance.hosts.netns import OURS, call_in, find_index, read_inode
from appliance.hosts.qemu import find_guest, find_guests
from appliance.model import GuestId, GuestInfo, GuestPort

FORMS: Final = "qemu:PID, file:PATH, port:IFNAME[@NETNS], or the name or UUID of a running guest"


def resolve(target: str) -> GuestInfo:
    """Find what a person named. Raises UsageError (with near names), ConfigError, HostError."""
    kind, colon, rest = target.partition(":")
    match kind if colon else "":
        case "qemu":
            if not rest.isdecimal():
                raise UsageError(f"{target!r}: the process id of a QEMU is wanted, as in qemu:1234")
            return find_guest(int(rest))
        case "port":
            return _find_port(rest)
        case "file":
            return _find_file(rest)
    return _find_named(target)


def _find_port(text: str) -> GuestInfo:
    ifname, at, place = text.partition("@")
    netns = (place if "/" in place else f"/run/netns/{place}") if at else None
    if netns is not None and read_inode(netns) is None:
        raise UsageError(f"port:{text}: there is no network namespace {netns}")
    index = find_index(netns, ifname)
    if index is None:
        names = call_in(netns, _interface_names)
        raise UsageError(f"port:{text}: there is no interface {ifname!r}" + _near(ifname, names))
    instance = f"{read_inode(netns or OURS)}-{index}"
    return GuestInfo(
        GuestId(f"port:{text}", instance=instance),
        ports=(GuestPort(ifname, None, netns, index),),
        notes=("only its packets are watched: no memory route",),
    )


def _find_file(text: str) -> GuestInfo:
    path = Path(text)
    try:
        status = path.stat()
        with path.open("rb"):
            pass
    except FileNotFoundError as error:
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UsageError(f"file:{text}: there is no such file" + _near(path.name, siblings)) from error
    except OSError as error:
        raise ConfigError(f"file:{text}: {error.strerror}") from error
    if not status.st_size:
        raise ConfigError(f"file:{text}: it is empty")
    guest = GuestId(f"file:{text}", instance=f"{status.st_dev}-{status.st_ino}-{status.st_mtime_ns}")
    return GuestInfo(guest, memory_bytes=status.st_size, routes=("file",))


def _find_named(word: str) -> GuestInfo:
    """A running QEMU by -name or -uuid: libvirt's domains carry both, so its daemon is asked only for what is off."""
    guests = find_guests()
    found = [guest for guest in guests if word in {guest.id.name, guest.id.uuid} or word.lower() == guest.id.uuid]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"several guests are called {word!r}: " + ", ".join(guest.id.target for guest in found))
    names = [text for guest in guests for text in (guest.id.name, guest.id.target) if text]
    try:
        domains = list_domains()
    except (ImportError, OSError) as error:
        where = f"libvirt could not be asked ({error})"
    else:
        if word in domains:
            raise UsageError(f"the libvirt domain {word!r} does not run")
        where, names = "libvirt knows no such domain", names + domains
    raise UsageError(f"there is no running guest {word!r}; {where}" + (_near(word, names) or f"; use {FORMS}"))


def _interface_names() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _near(word: str, names: list[str]) -> str:
    found = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return "; did you mean " + " or ".join(found) + "?" if found else ""
