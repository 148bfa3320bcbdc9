"""The domains of this Xen host: who they are, what they do, whether their memory has a shape that we read.

xenstore describes them, whatever manages them (xl, libvirt, XAPI); the hypervisor says what they do. A domain's number,
and with it the names of its ports, is another one after each reboot and migration: its identity is its UUID.
Sources: docs/misc/xenstore-paths.pandoc, tools/libs/light/libxl_create.c and libxl_domain.c (what is written where, and
``--incoming``), xen/include/public/sched.h.
"""

from __future__ import annotations

import importlib.util
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from appliance.errors import HostError
from appliance.hosts.xenports import explain_cards, find_ports
from appliance.hosts.xenstore import LOST, SOCKETS, Event, XenStore
from appliance.model import Change, GuestChange, GuestId, GuestInfo, GuestState
from appliance.xenctl import Control, Domain, is_control_domain

_UUID: Final = re.compile(r"/vm/([0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12})")
_CARD_EVENT: Final = re.compile(r"/libxl/(\d+)/device/(?:vif|pci)(?:/.*)?")
_NAME_EVENT: Final = re.compile(r"/local/domain/(\d+)/name")
_INCOMING: Final = "--incoming"  # what libxl appends to the name of a domain while it is being migrated to this host
_CRASH, _WATCHDOG = 3, 4  # SHUTDOWN_*
_PV: Final = "paravirtual (PV): its memory cannot be read by this version; packets only"


@dataclass(frozen=True, slots=True)
class _Fixed:
    """What cannot change while a domain lives."""

    uuid: str
    kind: str | None  # pv, pvh, hvm
    memory_bytes: int | None  # the most it can have


class XenSource:
    """The domains of this host without our own: implements `ports.GuestSource`."""

    name = "xen"

    def __init__(self, path: str | None = None, *, libraries: Path | None = None) -> None:
        """``path``: xenstored's socket, ``libraries``: where Xen's libraries are, instead of the usual places."""
        self._path, self._libraries = path, libraries
        self._store: XenStore | None = None
        self._told: XenStore | None = None  # a connection for watches only: what it says can be waited for
        self._watched: set[int] = set()
        self._control: Control | None = None
        self._fixed: dict[int, _Fixed] = {}

    @staticmethod
    def is_here() -> bool:
        """Whether this host is a Xen host, and we are in the domain that may look at the others."""
        return is_control_domain() or any(Path(path).is_socket() for path in SOCKETS)

    def find_guests(self) -> list[GuestInfo]:
        """Every domain but our own, by number. Raises HostError."""
        store = self._open_store()
        try:
            domids = sorted(int(name) for name in store.names("/local/domain") if name.isdecimal() and int(name))
            found = [info for domid in domids if (info := self._describe(store, domid)) is not None]
        except HostError:
            self._store = None
            store.close()
            raise
        self._fixed = {domid: self._fixed[domid] for domid in domids if domid in self._fixed}
        self._watch_names(set(domids))
        return found

    def fileno(self) -> int:
        """Readable when domains may have changed; -1 while xenstored cannot be asked."""
        if self._told is None or self._told.fileno() < 0:
            self._told = None
            with suppress(HostError):
                self._told = self._open_watches()
        return self._told.fileno() if self._told is not None else -1

    def changes(self) -> tuple[GuestChange, ...]:
        """Take what has been told since the last call; each kind of change of one domain once."""
        if self._told is None:
            return ()
        try:
            events = self._told.events()
        except HostError:
            self._told.close()
            self._told = None  # `fileno` opens it again
            return (GuestChange(Change.DESCRIBED),)
        return tuple(dict.fromkeys(change for event in events if (change := self._read_event(event)) is not None))

    def close(self) -> None:
        """Ask no more; may be called twice."""
        for connection in (self._store, self._told, self._control):
            if connection is not None:
                connection.close()
        self._store = self._told = self._control = None

    def _open_store(self) -> XenStore:
        if self._store is None:
            self._store = XenStore(self._path)
            with suppress(HostError):  # xenstore alone is enough to list them
                self._control = self._control or Control(self._libraries)
        return self._store

    def _open_watches(self) -> XenStore:
        told = XenStore(self._path)
        self._watched = set()
        # What guests can change is not watched: one that toggles its cards would keep us awake. Where another toolstack
        # than libxl plugs cards, they are found when the domains are listed again.
        try:
            for path, word in (("@introduceDomain", "come"), ("@releaseDomain", "gone"), ("/libxl", "cards")):
                told.watch(path, word)
        except HostError:
            told.close()
            raise
        return told

    def _watch_names(self, domids: set[int]) -> None:
        """Renames are told for each domain by itself: the nodes beside the name are the guest's to write."""
        if self._told is None or self._told.fileno() < 0:
            return
        with suppress(HostError):  # the connection is closed then, and opened again by `fileno`
            for domid in self._watched - domids:
                self._told.unwatch(f"/local/domain/{domid}/name", "name")
            for domid in domids - self._watched:
                self._told.watch(f"/local/domain/{domid}/name", "name")
            self._watched = domids

    def _read_event(self, event: Event) -> GuestChange | None:
        path, word = event
        match word:
            case "come":
                return GuestChange(Change.STARTED)
            case "gone":
                return GuestChange(Change.ENDED)
            case "cards" if (found := _CARD_EVENT.fullmatch(path)) is not None:
                return GuestChange(Change.DEVICES, self._uuid_of(int(found[1])))
            case "name" if (found := _NAME_EVENT.fullmatch(path)) is not None:
                return GuestChange(Change.DESCRIBED, self._uuid_of(int(found[1])))
        return GuestChange(Change.DESCRIBED) if event == LOST else None

    def _uuid_of(self, domid: int) -> str | None:
        fixed = self._fixed.get(domid)
        return fixed.uuid if fixed is not None else None

    def _describe(self, store: XenStore, domid: int) -> GuestInfo | None:
        """One domain; None while it is being built, and where only its entries are left."""
        domain = None
        if self._control is not None:
            try:
                domain = self._control.read_domain(domid)
            except HostError:
                self._control.close()
                self._control = None  # this release of Xen, or a policy: not for this source
            else:
                if domain is None or domain.dying:
                    return None
        fixed = self._fixed.get(domid)
        if fixed is None or (domain is not None and fixed.uuid != domain.uuid):
            fixed = _read_fixed(store, domid, domain) if store.is_introduced(domid) else None
        if fixed is None:
            self._fixed.pop(domid, None)
            return None
        self._fixed[domid] = fixed
        name = store.read(f"/local/domain/{domid}/name")
        notes: list[str] = [_PV] if fixed.kind == "pv" else []
        ports = tuple(find_ports(store, domid, notes))
        notes += explain_cards(store, domid)
        incoming = name is not None and name.endswith(_INCOMING)
        return GuestInfo(
            GuestId(f"xen:{domid}", fixed.uuid, name and name.removesuffix(_INCOMING), f"xen-{fixed.uuid}-{domid}"),
            memory_bytes=fixed.memory_bytes,
            ports=ports,
            routes=() if fixed.kind == "pv" else _routes(),
            notes=tuple(notes),
            domid=domid,
            hypervisor="xen",
            manager="xen",
            state=GuestState.INCOMING if incoming else _read_state(domain),
        )


def is_running(guest: GuestInfo, path: str | None = None, libraries: Path | None = None) -> bool:
    """Whether the domain with this number is still the same one, and not dying. Raises HostError."""
    if guest.domid is None:
        return False
    try:
        with Control(libraries) as control:
            domain = control.read_domain(guest.domid)
    except HostError:
        with XenStore(path) as store:
            return _read_uuid(store, guest.domid) == guest.id.uuid
    return domain is not None and not domain.dying and domain.uuid == guest.id.uuid


def _read_fixed(store: XenStore, domid: int, domain: Domain | None) -> _Fixed | None:
    uuid = domain.uuid if domain is not None else _read_uuid(store, domid)
    if uuid is None:
        return None
    kind = store.read(f"/libxl/{domid}/type")
    if domain is not None and kind not in {"pv", "pvh", "hvm"}:  # another toolstack
        kind = None if domain.hvm else "pv"
    most_kib = store.read_number(f"/local/domain/{domid}/memory/static-max")
    video_kib = store.read_number(f"/local/domain/{domid}/memory/videoram") or 0
    memory_bytes = (most_kib - video_kib) << 10 if most_kib is not None and most_kib > video_kib else None
    return _Fixed(uuid, kind, memory_bytes)


def _read_uuid(store: XenStore, domid: int) -> str | None:
    found = _UUID.match(store.read(f"/local/domain/{domid}/vm") or "")
    return str(UUID(found[1])) if found else None


def _read_state(domain: Domain | None) -> GuestState:
    if domain is None:
        return GuestState.RUNNING
    if domain.shutdown in {_CRASH, _WATCHDOG}:
        return GuestState.CRASHED
    return GuestState.PAUSED if domain.paused or domain.shutdown is not None else GuestState.RUNNING


def _routes() -> tuple[str, ...]:
    return ("xen", "libvmi") if importlib.util.find_spec("libvmi") is not None else ("xen",)
