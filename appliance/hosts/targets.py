"""From the word at the command line to a guest."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import socket
from pathlib import Path
from typing import Final

from appliance.errors import ConfigError, HostError, PermissionRefused, UsageError
from appliance.hosts.inventory import Inventory
from appliance.hosts.netns import OURS, call_in, find_index, read_inode
from appliance.hosts.qemu import find_guest, is_libvirts
from appliance.model import GuestId, GuestInfo, GuestPort

FORMS: Final = "qemu:PID, xen:DOMID, file:PATH, port:IFNAME[@NETNS], or the name or UUID of a running guest"


def resolve(target: str, inventory: Inventory | None = None) -> GuestInfo:
    """Find what a person named; ``inventory``: where to look, None for this host's.

    Raises UsageError (with near names), ConfigError, HostError.
    """
    kind, colon, rest = target.partition(":")
    if colon and kind == "port":
        return _find_port(rest)
    if colon and kind == "file":
        return _find_file(rest)
    process = _find_process(rest) if colon and kind == "qemu" else None
    if process is not None and not is_libvirts(process):
        return process  # nobody else knows more of it
    with contextlib.nullcontext(inventory) if inventory else Inventory.of_this_host() as found:
        if process is None:
            return _find_named(target, found)
        return next((one for one in found.find_guests() if one.id.instance == process.id.instance), process)


def _find_port(text: str) -> GuestInfo:
    ifname, at, place = text.partition("@")
    netns = (place if "/" in place else f"/run/netns/{place}") if at else None
    if netns is not None and read_inode(netns) is None:
        raise UsageError(f"port:{text}: there is no network namespace {netns}")
    index = find_index(netns, ifname)
    if index is None:
        try:
            names = call_in(netns, _interface_names)
        except PermissionError as error:
            raise PermissionRefused(f"port:{text}: {netns} may not be entered; run as root") from error
        except OSError as error:
            raise HostError(f"port:{text}: {netns} cannot be entered: {error.strerror}") from error
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
    routes = ("file", "libvmi") if importlib.util.find_spec("libvmi") else ("file",)  # LibVMI: raw images only
    return GuestInfo(guest, memory_bytes=status.st_size, routes=routes)


def _find_process(text: str) -> GuestInfo:
    if not text.isdecimal():
        raise UsageError(f"'qemu:{text}': the process id of a QEMU is wanted, as in qemu:1234")
    return find_guest(int(text))


def _find_named(word: str, inventory: Inventory) -> GuestInfo:
    """A guest that is here by its target, name or UUID; behind ``xen:`` one of Xen's, and digits are a domid."""
    only_xen = word.startswith("xen:")
    bare = word.removeprefix("xen:")
    guests = [guest for guest in inventory.find_guests() if not only_xen or guest.hypervisor == "xen"]
    if only_xen and bare.isdecimal():  # a target that was noted must never mean another guest of that name
        found = [one for one in guests if one.id.target == word]
    else:
        found = [one for one in guests if word == one.id.target or bare in _names(one) or bare.lower() == one.id.uuid]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"several guests are called {word!r}; say " + " or ".join(guest.id.target for guest in found))
    troubles = list(inventory.troubles)
    off: list[str] = []
    try:
        off = inventory.find_off()
    except HostError as error:
        troubles.append(str(error))
    if word in off or word.lower() in off:
        raise UsageError(f"the libvirt domain {word!r} does not run; it is started by: virsh start {word}")
    said = "".join(f"; {trouble}" for trouble in dict.fromkeys(troubles))
    near = _near(word, [name for guest in guests for name in (*_names(guest), guest.id.target)] + off)
    raise UsageError(f"there is no running guest {word!r}{said}{near or f'; use {FORMS}'}")


def _names(guest: GuestInfo) -> tuple[str, ...]:
    return tuple(text for text in (guest.id.name, guest.id.uuid) if text)


def _interface_names() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _near(word: str, names: list[str]) -> str:
    found = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return "; did you mean " + " or ".join(found) + "?" if found else ""
