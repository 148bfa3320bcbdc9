"""A client of xenstore, the small database in which a Xen host describes its domains: reads, lists and watches only.

Speaks the wire protocol itself, over xenstored's socket or the kernel's device, so no library of Xen is needed. What a
domain may write there (its own device and data nodes) is attacker input.
Sources: docs/misc/xenstore.txt, xen/include/public/io/xs_wire.h (struct xsd_sockmsg, byte order of the host),
tools/libs/store/xs.c (where the daemon is found), drivers/xen/xenbus/xenbus_dev_frontend.c in Linux.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from appliance.errors import HostError, PermissionRefused

TIMEOUT_S: Final = 5.0  # for one answer
MAX_PAYLOAD: Final = 4096  # XENSTORE_PAYLOAD_MAX
MAX_EVENTS: Final = 4096  # that are kept unread; more are told as "anything may have changed"
MAX_READS: Final = 256  # for events at once, of some kilobytes each
SOCKETS: Final = ("/run/xenstored/socket", "/var/run/xenstored/socket")
DEVICES: Final = ("/dev/xen/xenbus", "/proc/xen/xenbus")
_HEADER: Final = struct.Struct("=IIII")  # type, request, transaction, length of what follows
_DIRECTORY, _READ, _WATCH, _UNWATCH, _WATCH_EVENT, _ERROR, _DIRECTORY_PART = 1, 2, 4, 5, 15, 16, 21
_IS_DOMAIN_INTRODUCED: Final = 17

Event = tuple[str, str]  # the path that changed, and the word that was given to `XenStore.watch`
LOST: Final[Event] = ("", "")  # events were dropped: anything may have changed


class XenStore:
    """One connection. After an error that is not about a single path it must be closed and opened anew."""

    def __init__(self, path: str | None = None, *, timeout_s: float = TIMEOUT_S) -> None:
        """``path``: a socket or a device, instead of the usual places. Raises HostError, PermissionRefused."""
        self._timeout_s = timeout_s
        self._fd = _connect(path)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        self._request = 0
        self._received = b""
        self._pending = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # events came with an answer: taken, not told
        self._waiting = select.epoll()
        self._waiting.register(self._fd, select.EPOLLIN)
        self._waiting.register(self._pending, select.EPOLLIN)
        self._events: dict[Event, None] = {}

    def read(self, path: str) -> str | None:
        """The value of a node, None where there is no such node. Raises HostError."""
        answer = self._ask(_READ, path)
        return None if answer is None else answer.decode("utf-8", "replace")

    def read_number(self, path: str) -> int | None:
        """A value that is a decimal number; None where there is none, or another value."""
        value = self.read(path)
        return int(value) if value is not None and value.isascii() and value.isdecimal() and len(value) < 20 else None

    def names(self, path: str) -> list[str]:
        """The names of a node's children; none where there is no such node. Raises HostError."""
        try:
            answer = self._ask(_DIRECTORY, path)
        except _TooLargeError:
            answer = self._read_parts(path)
        return [name.decode("utf-8", "replace") for name in (answer or b"").split(b"\0") if name]

    def is_introduced(self, domid: int) -> bool:
        """Whether a domain has been told of: its builder does so when all of it is there. Raises HostError."""
        return self._ask(_IS_DOMAIN_INTRODUCED, str(domid)) == b"T\0"

    def watch(self, path: str, word: str) -> None:
        """Be told of changes of this node and below, by ``word``; the first event comes at once. Raises HostError."""
        self._ask(_WATCH, path, word)

    def unwatch(self, path: str, word: str) -> None:
        """Be told no more. Raises HostError."""
        self._ask(_UNWATCH, path, word)

    def events(self) -> list[Event]:
        """Take what has been told, without waiting. Raises HostError when the daemon is gone."""
        if self._fd < 0:
            raise HostError("the connection to xenstored is closed")
        for _ in range(MAX_READS):
            if not self._poll.poll(0):
                break
            self._receive()
            self._take_events()
        self._take_events()
        with suppress(BlockingIOError):
            os.eventfd_read(self._pending)
        told = list(self._events)
        self._events.clear()
        return told

    def fileno(self) -> int:
        """Readable when there may be events; -1: closed."""
        return self._waiting.fileno() if self._fd >= 0 else -1

    def close(self) -> None:
        """Hang up; may be called twice."""
        if self._fd >= 0:
            self._waiting.close()
            os.close(self._pending)
            os.close(self._fd)
            self._fd = -1

    def _ask(self, kind: int, *words: str) -> bytes | None:
        """One request and its answer; None: there is no such node."""
        payload = b"".join(word.encode() + b"\0" for word in words)
        if len(payload) > MAX_PAYLOAD:
            raise HostError("a question to xenstore is too long")
        self._request = self._request % 0xFFFF_FFFF + 1
        self._send(_HEADER.pack(kind, self._request, 0, len(payload)) + payload)
        end_s = time.monotonic() + self._timeout_s
        while (answer := self._take(self._request)) is None:
            if not self._poll.poll(max(0, end_s - time.monotonic()) * 1000):
                self.close()
                raise HostError(
                    f"xenstored does not answer for {self._timeout_s:.0f} s; see: systemctl status xenstored"
                )
            self._receive()
        answered, data = answer
        if answered == _ERROR:
            _refuse(data.rstrip(b"\0").decode("ascii", "replace"), words)
            return None
        if answered != kind:
            self.close()
            raise HostError(f"xenstored answers a question of type {kind} by one of type {answered}")
        return data

    def _read_parts(self, path: str) -> bytes:
        """A directory too large for one answer; begins anew when it changes meanwhile (XS_DIRECTORY_PART)."""
        parts, generation = b"", b""
        for _ in range(MAX_PAYLOAD):
            answer = self._ask(_DIRECTORY_PART, path, str(len(parts))) or b""
            now, _, part = answer.partition(b"\0")
            if parts and now != generation:
                parts = b""
                continue
            generation, parts = now, parts + part
            if not part or part.endswith(b"\0\0") or part == b"\0":
                break
        return parts

    def _send(self, message: bytes) -> None:
        if self._fd < 0:
            raise HostError("the connection to xenstored is closed")
        try:
            os.write(self._fd, message)
        except OSError as error:
            self.close()
            raise HostError(f"xenstored is gone: {error.strerror}; see: systemctl status xenstored") from None

    def _receive(self) -> None:
        """Take what is there; at least one byte is."""
        try:
            data = os.read(self._fd, _HEADER.size + MAX_PAYLOAD) if self._fd >= 0 else b""
        except BlockingIOError:
            return
        except OSError as error:
            data, why = b"", str(error.strerror)
        else:
            why = "it hung up"
        if not data:
            self.close()
            raise HostError(f"xenstored is gone: {why}; see: systemctl status xenstored")
        self._received += data

    def _take(self, request: int) -> tuple[int, bytes] | None:
        """The answer to a request, once it is whole; events before it are put aside, older answers dropped."""
        while (message := self._cut()) is not None:
            kind, number, data = message
            if kind != _WATCH_EVENT and number == request:
                return kind, data
            self._put_aside(kind, data)
        return None

    def _take_events(self) -> None:
        while (message := self._cut()) is not None:
            self._put_aside(message[0], message[2])

    def _put_aside(self, kind: int, data: bytes) -> None:
        path, _, rest = data.partition(b"\0")
        if kind != _WATCH_EVENT:
            return
        event = (path.decode("utf-8", "replace"), rest.partition(b"\0")[0].decode("utf-8", "replace"))
        self._events[event if len(self._events) < MAX_EVENTS else LOST] = None
        os.eventfd_write(self._pending, 1)

    def _cut(self) -> tuple[int, int, bytes] | None:
        """The next whole message: type, request, payload."""
        if len(self._received) < _HEADER.size:
            return None
        kind, number, _, length = _HEADER.unpack_from(self._received)
        if length > MAX_PAYLOAD:
            self.close()
            raise HostError(f"xenstored sends {length} bytes at once; what listens there is no xenstored")
        end = _HEADER.size + length
        if len(self._received) < end:
            return None
        data, self._received = self._received[_HEADER.size : end], self._received[end:]
        return kind, number, data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _TooLargeError(HostError):
    """The answer has more than `MAX_PAYLOAD` bytes."""


def _refuse(code: str, words: Sequence[str]) -> None:
    """Raise the error that xenstored gives as a word; return for "there is no such node"."""
    if code == "ENOENT":
        return
    if code == "E2BIG":
        raise _TooLargeError(f"xenstore: {words[0]} has too many children")
    if code in {"EACCES", "EPERM"}:
        raise PermissionRefused(f"xenstore: {words[0]} may not be read; run in the control domain (dom0) as root")
    known = errno.__dict__.get(code)
    raise HostError(f"xenstore: {words[0]}: {os.strerror(known) if isinstance(known, int) else code}")


def _connect(path: str | None) -> int:
    """A non-blocking descriptor: the daemon's socket, else the kernel's device."""
    given = path or os.environ.get("XENSTORED_PATH")  # as libxenstore
    places = (given,) if given else (*SOCKETS, *DEVICES)
    failures: list[OSError] = []
    for place in places:
        try:
            if not Path(place).is_socket():
                return os.open(place, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(TIMEOUT_S)
                connection.connect(place)
                connection.setblocking(False)
                return connection.detach()
        except OSError as error:
            failures.append(error)
    refused = next((error for error in failures if isinstance(error, PermissionError)), None)
    if refused is not None:
        raise PermissionRefused(f"xenstored may not be asked ({refused.strerror}); run as root")
    what = " or ".join(places[:1] if given else (SOCKETS[0], DEVICES[0]))
    raise HostError(
        f"xenstored cannot be reached at {what}: {failures[-1].strerror}; run: systemctl start xenstored; "
        "where it runs in a domain of its own: modprobe xen-xenbus-frontend"
    )
