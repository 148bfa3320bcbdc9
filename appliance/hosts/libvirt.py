"""One read-only connection to libvirt: the only file of this room that knows its Python binding.

Every call may hang with the daemon: `domains.py` makes them in a thread of their own. Events come through libvirt's own
loop, in another thread.
Sources: libvirt docs/uri.rst, docs/daemons.rst (sockets), docs/kbase/internals/eventloop.rst.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from appliance.errors import HostError
from appliance.hosts.libvirtwords import DETAILS, LIFECYCLE, OTHERS, REASONS, STATES
from appliance.model import GuestChange, GuestState

URI: Final = "qemu:///system"
CHOICE: Final = "PARASIGHT_LIBVIRT_URI"
SOCKETS: Final = tuple(
    Path("/run/libvirt", name) for name in ("libvirt-sock-ro", "libvirt-sock", "virtqemud-sock-ro", "virtqemud-sock")
)
INSTALL: Final = "apt-get install python3-libvirt, or pip install 'parasight[libvirt]'"
KEEPALIVE: Final = (3, 3)  # seconds, times: a connection whose daemon is silent for longer is given up

Tell = Callable[[GuestChange], None]


@dataclass(frozen=True, slots=True)
class Running:
    """A domain that is here. ``life``: libvirt's number of it, another one after each start."""

    uuid: str
    name: str
    life: int
    state: GuestState


class Connection:
    """One connection. Methods raise HostError; what they raise ends its use."""

    def __init__(self, uri: str, tell: Tell | None = None, lost: Callable[[], None] | None = None) -> None:
        """``tell`` gets changes and ``lost`` the end of the connection, both in the thread of libvirt's events."""
        self._libvirt = libvirt = _import()
        self.uri = uri
        self._registered: list[int] = []
        if tell is not None:
            _run_events(libvirt)
        with self._translated():
            self._connection = libvirt.openReadOnly(uri)
            if tell is not None and lost is not None:
                self._register(tell, lost)

    def find_running(self) -> list[Running]:
        """Every active domain."""
        libvirt, found = self._libvirt, []
        with self._translated():
            for domain, state, reason in self._read_states():
                with suppress(libvirt.libvirtError):  # it ended meanwhile
                    state_now = _name_state(libvirt, state, reason)
                    found.append(Running(domain.UUIDString(), domain.name(), domain.ID(), state_now))
        return [one for one in found if one.life >= 0]

    def describe(self, uuid: str) -> str | None:
        """The XML of a domain, None when it is gone."""
        with self._translated(), self._unless_gone():
            return str(self._connection.lookupByUUIDString(uuid).XMLDesc(0))
        return None

    def read_life(self, uuid: str) -> int | None:
        """The number of a domain's present life, None when it does not run."""
        with self._translated(), self._unless_gone():
            life = int(self._connection.lookupByUUIDString(uuid).ID())
            return life if life >= 0 else None
        return None

    def find_off(self) -> list[tuple[str, str]]:
        """Names and UUIDs of the domains that are defined and do not run."""
        with self._translated():
            flags = self._libvirt.VIR_CONNECT_LIST_DOMAINS_INACTIVE
            return [(one.name(), one.UUIDString()) for one in self._connection.listAllDomains(flags)]

    def close(self) -> None:
        """Be told no more, then close. A connection that is broken already is closed, too."""
        with suppress(self._libvirt.libvirtError):
            for number in self._registered:
                self._connection.domainEventDeregisterAny(number)
        with suppress(self._libvirt.libvirtError):
            self._connection.unregisterCloseCallback()
        with suppress(self._libvirt.libvirtError):
            self._connection.close()

    def _read_states(self) -> Iterator[tuple[Any, int, int]]:
        """All of them by one question, where the driver knows it."""
        libvirt, connection = self._libvirt, self._connection
        try:
            flags = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE
            records = connection.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_STATE, flags)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
                raise
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                with suppress(libvirt.libvirtError):
                    yield (domain, *domain.state())
        else:
            for domain, told in records:
                yield domain, told.get("state.state", 0), told.get("state.reason", 0)

    def _register(self, tell: Tell, lost: Callable[[], None]) -> None:
        libvirt, connection = self._libvirt, self._connection
        with suppress(libvirt.libvirtError):  # drivers inside the library have no daemon to lose
            connection.setKeepAlive(*KEEPALIVE)
        with suppress(libvirt.libvirtError):
            connection.registerCloseCallback(lambda *_: lost(), None)
        details = _names(libvirt, "VIR_DOMAIN_EVENT_", LIFECYCLE)

        def lifecycle(_: object, domain: Any, event: int, detail: int, __: object) -> None:  # noqa: ANN401
            kind = details.get(event)
            if kind is not None:
                tell(GuestChange(LIFECYCLE[kind], domain.UUIDString()))
                for name, change in DETAILS.items():
                    same = getattr(libvirt, f"VIR_DOMAIN_EVENT_{name}", None) == detail
                    if same and name.startswith(f"{kind}_"):
                        tell(GuestChange(change, domain.UUIDString()))

        self._listen("LIFECYCLE", lifecycle)
        for name, change in OTHERS.items():
            self._listen(name, lambda _, domain, *rest, what=change: tell(GuestChange(what, domain.UUIDString())))

    def _listen(self, event: str, callback: Callable[..., None]) -> None:
        number = getattr(self._libvirt, f"VIR_DOMAIN_EVENT_ID_{event}", None)
        if number is not None:
            with suppress(self._libvirt.libvirtError):  # this driver never tells of it
                self._registered.append(self._connection.domainEventRegisterAny(None, number, callback, None))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except self._libvirt.libvirtError as error:
            raise HostError(f"libvirt ({self.uri}) cannot be asked: {error}") from None

    @contextmanager
    def _unless_gone(self) -> Iterator[None]:
        try:
            yield
        except self._libvirt.libvirtError as error:
            if error.get_error_code() != self._libvirt.VIR_ERR_NO_DOMAIN:
                raise


def chosen_uri() -> str | None:
    """Which libvirt to ask: the operator's choice, else the system's where it is; None where there is none."""
    chosen = os.environ.get(CHOICE)
    return chosen or (URI if any(path.exists() for path in SOCKETS) else None)


def is_installed() -> bool:
    """Whether the binding is there."""
    return importlib.util.find_spec("libvirt") is not None


def _import() -> Any:  # noqa: ANN401  the binding has no types
    try:
        libvirt = importlib.import_module("libvirt")
    except ImportError:
        raise HostError(f"libvirt's Python binding is not installed: {INSTALL}") from None
    libvirt.registerErrorHandler(lambda *_: None, None)  # else it prints what it raises as well
    return libvirt


def _name_state(libvirt: Any, state: int, reason: int) -> GuestState:  # noqa: ANN401
    found = _names(libvirt, "VIR_DOMAIN_", STATES).get(state, "RUNNING")
    for name, meaning in REASONS.items():
        if name.startswith(f"{found}_") and getattr(libvirt, f"VIR_DOMAIN_{name}", None) == reason:
            return meaning
    return STATES[found]


def _names(libvirt: Any, prefix: str, table: dict[str, Any]) -> dict[int, str]:  # noqa: ANN401
    """Numbers to names, for those that this binding knows."""
    return {getattr(libvirt, prefix + name): name for name in table if hasattr(libvirt, prefix + name)}


_loop_lock = threading.Lock()
_loop: list[threading.Thread] = []


def _run_events(libvirt: Any) -> None:  # noqa: ANN401
    """Run libvirt's event loop from now on: it can be registered once, before connections that use it, for ever."""

    def run() -> None:
        while True:
            try:
                libvirt.virEventRunDefaultImpl()
            except libvirt.libvirtError:
                time.sleep(0.1)

    with _loop_lock:
        if not _loop:
            libvirt.virEventRegisterDefaultImpl()
            _loop.append(threading.Thread(target=run, name="libvirt events", daemon=True))
            _loop[0].start()
