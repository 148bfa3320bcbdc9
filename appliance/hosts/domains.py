"""libvirt's domains: which are here, what they do now, and what their operator says of them (C8).

Events are hints, queued behind one descriptor. They are not replayed when a connection is made again: then everything
may have changed. What a domain is like is believed until an event says otherwise, or for half a minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar
from urllib.parse import urlsplit

from appliance.bounded import Worker
from appliance.errors import HostError
from appliance.hosts.arguments import NetDevice
from appliance.hosts.changes import Changes
from appliance.hosts.domainxml import DomainXml, parse_domain
from appliance.hosts.libvirt import Connection, Running, chosen_uri
from appliance.hosts.netns import find_index
from appliance.hosts.unreadable import explain_unreadable
from appliance.hosts.untappable import explain_untappable
from appliance.model import GuestChange, GuestId, GuestInfo, GuestPort

ANSWER_S: Final = 2.0  # for one question, so that guests of others are not looked for too seldom
PATIENCE_S: Final = 6.0  # a daemon under load, or one that is starting a domain, may be slow
RETRY_S: Final = (0.5, 2.0)  # between tries to connect: the first time, at most
XML_S: Final = 30.0  # how long a description is believed where no event says that it changed

T = TypeVar("T")


class Silent(HostError):
    """A daemon takes calls and does not answer them."""


class LibvirtSource:
    """The active domains of one libvirt: implements `ports.GuestSource`.

    ``troubles``: mistakes in the metadata of single domains, for a person. ``uri`` None: the operator's choice, else
    that of this system; where there is none, there are no domains. ``events``: `fileno` and `changes` tell.
    """

    name = "libvirt"

    def __init__(self, uri: str | None = None, *, events: bool = False) -> None:
        self.troubles: tuple[str, ...] = ()
        self._uri, self._events = uri, events
        self._queue = Changes()
        self._worker = Worker("libvirt")
        self._closed = False
        self._found: list[tuple[GuestInfo, DomainXml]] | None = None  # None: never asked with success
        self._macs: dict[str, dict[str, str]] = {}
        self._silent_s: float | None = None  # since when, monotonic
        # These belong to that thread.
        self._connection: Connection | None = None
        self._retry_at_s, self._retry_s, self._refusal = 0.0, RETRY_S[0], ""
        self._described: dict[tuple[str, int], tuple[float, DomainXml]] = {}

    def find_guests(self) -> list[GuestInfo]:
        """Every active domain, by UUID. Raises HostError.

        Waits two seconds at most, the first time six: for six seconds a silent daemon is believed to be slow, and what
        it said before is told.
        """
        uri = self._uri or chosen_uri()
        if uri is None:
            if self._found is not None:  # it is being restarted, and its guests go on
                raise HostError("libvirt cannot be asked: its socket is gone")
            return []
        found = self._found = self._find_patiently(uri)
        self._macs = {info.id.instance: _read_macs(described) for info, described in found}
        self.troubles = tuple(
            f"domain {info.id.name}: {trouble}" for info, described in found for trouble in described.troubles
        )
        return [info for info, _ in found]

    def macs(self, guest: GuestInfo) -> dict[str, str]:
        """By interface, the MAC addresses of the cards of a domain found last, of those plugged in later too."""
        return self._macs.get(guest.id.instance, {})

    def find_off(self) -> list[str]:
        """Names and UUIDs of the domains that could be started. Raises HostError."""
        uri = self._uri or chosen_uri()
        return [] if uri is None else [text for pair in self._ask(uri, Connection.find_off) for text in pair]

    def is_running(self, guest: GuestInfo) -> bool:
        """Whether the same life of a domain goes on; where libvirt does not tell, it is believed to."""
        uri, uuid = self._uri or chosen_uri(), guest.id.uuid or ""
        if uri is None:
            return True
        try:
            life = self._ask(uri, lambda connection: connection.read_life(uuid))
        except HostError:
            return True
        return life is not None and guest.id.instance == name_life(uuid, life)

    def fileno(self) -> int:
        """Readable when libvirt has told of a change."""
        return self._queue.fd if self._events else -1

    def changes(self) -> tuple[GuestChange, ...]:
        """What libvirt has told since the last call."""
        return self._queue.take()

    def close(self) -> None:
        """Ask no more; may be called twice."""
        if not self._closed:
            self._closed = True
            self._worker.end(self._drop)
            self._queue.close()

    def _find_patiently(self, uri: str) -> list[tuple[GuestInfo, DomainXml]]:
        began_s = time.monotonic()
        try:
            found = self._ask(uri, self._find, PATIENCE_S if self._found is None else ANSWER_S)
        except Silent:
            self._silent_s = began_s if self._silent_s is None else self._silent_s
            if self._found is None or time.monotonic() > self._silent_s + PATIENCE_S:
                raise
            return self._found
        self._silent_s = None
        return found

    def _ask(self, uri: str, work: Callable[[Connection], T], seconds: float = PATIENCE_S) -> T:
        try:
            return self._worker.run(lambda: self._do(uri, work), seconds)
        except TimeoutError:
            raise Silent(f"libvirt ({uri}) does not answer: is its daemon stuck?") from None

    # -- in its own thread --

    def _do(self, uri: str, work: Callable[[Connection], T]) -> T:
        if self._connection is not None and self._queue.lost:
            self._drop()
        if self._connection is None:
            self._connect(uri)
        assert self._connection is not None
        try:
            return work(self._connection)
        except HostError:
            self._drop()
            raise

    def _connect(self, uri: str) -> None:
        if time.monotonic() < self._retry_at_s:
            raise HostError(self._refusal)
        self._described.clear()
        self._queue.lost = False
        try:
            tell = (self._queue.tell, self._queue.lose) if self._events else ()
            self._connection = Connection(uri, *tell)
        except HostError as error:
            self._refusal = str(error)
            self._retry_at_s = time.monotonic() + self._retry_s
            self._retry_s = min(2 * self._retry_s, RETRY_S[1])
            raise
        self._retry_s = RETRY_S[0]

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _find(self, connection: Connection) -> list[tuple[GuestInfo, DomainXml]]:
        running = sorted(connection.find_running(), key=lambda one: one.uuid)
        changed = self._queue.take_changed()
        kept = {key: value for key, value in self._described.items() if key[0] not in changed}
        self._described = {}
        found = []
        for one in running:
            known = kept.get((one.uuid, one.life))
            if known is None or time.monotonic() > known[0] + XML_S:
                text = connection.describe(one.uuid)
                if text is None:
                    continue  # it ended meanwhile
                known = (time.monotonic(), parse_domain(text))
            self._described[one.uuid, one.life] = known
            found.append((_make_info(one, known[1], connection.uri), known[1]))
        return found


def name_life(uuid: str, life: int) -> str:
    """``GuestId.instance`` of a domain that only libvirt sees."""
    return f"libvirt-{uuid}-{life}"


def read_life(guest: GuestInfo) -> int:
    """Which number libvirt gave to the life that a domain of `LibvirtSource` lives."""
    return int(guest.id.instance.rpartition("-")[2])


def _make_info(one: Running, described: DomainXml, uri: str) -> GuestInfo:
    """A domain as libvirt alone sees it: its process may tell more."""
    arguments = described.arguments
    unreadable = list(explain_unreadable(arguments, described.arch))
    notes = [*unreadable, *explain_untappable(arguments)]
    return GuestInfo(
        GuestId(one.uuid, one.uuid, one.name, name_life(one.uuid, one.life)),
        memory_bytes=arguments.memory_bytes,
        ports=tuple(port for net in arguments.nets if (port := _find_port(net, uri, notes)) is not None),
        routes=() if unreadable else ("libvirt",),
        notes=tuple(notes),
        hypervisor="qemu",
        state=one.state,
        tags=described.tags,
        manager="libvirt",
        wanted=described.wanted,
    )


def _read_macs(described: DomainXml) -> dict[str, str]:
    return {net.ifname: net.mac for net in described.arguments.nets if net.ifname and net.mac}


def _find_port(net: NetDevice, uri: str, notes: list[str]) -> GuestPort | None:
    """Its interface on this host, by name: libvirt does not say in which namespace."""
    if net.kind != "tap" or net.ifname is None:
        return None
    if urlsplit(uri).hostname is not None:
        notes.append(f"port {net.ifname} is on another host ({uri}): it cannot be tapped from here")
        return None
    index = find_index(None, net.ifname)
    if index is None:
        notes.append(f"port {net.ifname} is not in our network namespace: it cannot be tapped")
        return None
    return GuestPort(net.ifname, net.mac, None, index)
