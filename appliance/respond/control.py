"""The control socket: one JSON object per line and request, one per answer, on a unix stream socket.

Only root and the user who runs the appliance are served (SO_PEERCRED, unix(7)). A thread accepts, one more serves
each client; clients, line lengths and waits are bounded, and no thread of a guest ever waits for any of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import selectors
import socket
import stat
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import ConfigError, HostError, ParasightError, PermissionRefused, UsageError

Json = dict[str, Any]
Answer = Callable[[object, str], object]
Tell = Callable[[str], None]

_BACKLOG = 128  # clients that wait to be accepted
_DEFECT = 70  # exit code for an error of ours
_MAX_PATH = 107  # bytes: sun_path of sockaddr_un less its final zero, unix(7)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the socket bears."""

    clients: int = 16
    line: int = 16_384  # bytes of a request
    idle_s: float = 30.0  # how long a client may take to its next whole line
    send_s: float = 10.0  # how long it may take to fetch an answer
    tick_s: float = 0.5  # how often the housekeeping is done


class ControlTaken(HostError):
    """Another appliance serves this socket already."""


class ControlServer:
    """Serves the control socket from construction to ``close``.

    ``answer`` gets the request as JSON and the name of who asks, in any of the clients' threads; what it returns is
    the result, what it raises (ParasightError) the error. ``tick`` is called twice a second in the server's own
    thread. Raises ControlTaken, PermissionRefused or ConfigError with what to do.
    """

    def __init__(
        self,
        path: Path,
        answer: Answer,
        tell: Tell,
        *,
        tick: Callable[[], None] = lambda: None,
        limits: Limits | None = None,
    ) -> None:
        self.path, self._answer, self._tell, self._tick = path, answer, tell, tick
        self._limits = limits or Limits()
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._told: set[str] = set()
        self._guard = _take(path)
        try:
            self._listener = _listen(path)
            self._listener.setblocking(False)
        except BaseException:
            os.close(self._guard)
            raise
        self._alarm, self._bell = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer what was asked, then serve no more. May be called twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._bell.close()  # wakes the thread that accepts
        self._thread.join(self._limits.send_s)
        self._alarm.close()
        self._listener.close()
        self.path.unlink(missing_ok=True)
        with self._lock:
            clients = dict(self._clients)
        for client, thread in clients.items():
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RD)  # no further request; the answer under way still goes out
            thread.join(self._limits.send_s)
        os.close(self._guard)

    # -- the server's thread --

    def _run(self) -> None:
        next_tick_s = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._alarm, selectors.EVENT_READ)
            while not self._closing.is_set():
                if time.monotonic() >= next_tick_s:
                    next_tick_s = time.monotonic() + self._limits.tick_s
                    self._keep_house()
                ready = [key.fileobj for key, _ in selector.select(self._limits.tick_s)]
                if self._listener in ready:
                    self._accept()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:  # it has left already
            return
        except OSError as error:  # out of descriptors: give it time to pass
            self._tell_once(f"the control socket cannot accept: {error}")
            self._closing.wait(0.1)
            return
        self._admit(client)

    def _keep_house(self) -> None:
        try:
            self._tick()
        except ParasightError as error:
            self._tell_once(str(error))
        except Exception:  # a defect of ours must not take the socket along
            self._tell_once(f"a defect of Parasight, please report it:\n{traceback.format_exc()}")

    def _admit(self, client: socket.socket) -> None:
        """Give the client a thread of its own, if there is room."""
        with self._lock:
            full = len(self._clients) >= self._limits.clients
            if not full:
                thread = threading.Thread(target=self._serve, args=(client,), name="control-client", daemon=True)
                self._clients[client] = thread
        if full:
            _refuse(client, HostError(f"{self._limits.clients} clients are being served already; try again"))
            return
        try:
            thread.start()
        except RuntimeError as error:  # the host is out of threads
            self._forget(client)
            _refuse(client, HostError(f"no thread for another client: {error}"))

    # -- a client's thread --

    def _serve(self, client: socket.socket) -> None:
        try:
            who = _name_peer(client)
            for line in self._lines(client):
                self._send(client, self._reply(line, who))
        except ParasightError as error:
            with contextlib.suppress(OSError):
                self._send(client, _failure(error))
        except OSError:
            pass  # it has left, or it is too slow: its loss
        finally:
            self._forget(client)
            client.close()

    def _lines(self, client: socket.socket) -> Iterator[bytes]:
        """Yield whole lines. Raises UsageError for one without end, TimeoutError for a client that says nothing."""
        buffer = b""
        deadline_s = time.monotonic() + self._limits.idle_s
        while True:
            line, newline, rest = buffer.partition(b"\n")
            if len(line) > self._limits.line:
                raise UsageError(f"a request is at most {self._limits.line} bytes long")
            if newline:
                buffer = rest
                if line.strip():
                    yield line
                deadline_s = time.monotonic() + self._limits.idle_s
                continue
            client.settimeout(max(0.001, deadline_s - time.monotonic()))
            chunk = client.recv(4096)
            if not chunk:
                if line.strip():
                    yield line
                return
            buffer += chunk

    def _reply(self, line: bytes, who: str) -> Json:
        try:
            return {"ok": True, "result": self._answer(_decode(line), who)}
        except ParasightError as error:
            return _failure(error)
        except Exception as error:
            self._tell(f"a defect of Parasight, please report it:\n{traceback.format_exc()}")
            return {"ok": False, "error": f"a defect of Parasight, please report it: {error!r}", "code": _DEFECT}

    def _send(self, client: socket.socket, body: Json) -> None:
        client.settimeout(self._limits.send_s)
        client.sendall(json.dumps(body, separators=(",", ":")).encode() + b"\n")

    def _forget(self, client: socket.socket) -> None:
        with self._lock:
            self._clients.pop(client, None)

    def _tell_once(self, line: str) -> None:
        if line not in self._told and len(self._told) < 100:
            self._told.add(line)
            self._tell(line)


def _decode(line: bytes) -> object:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError('this is no JSON; a request is one object on a line, as {"do": "status"}') from error


def _failure(error: ParasightError) -> Json:
    return {"ok": False, "error": str(error), "code": error.exit_code}


def _refuse(client: socket.socket, error: ParasightError) -> None:
    """Say why and hang up; never waits."""
    with contextlib.suppress(OSError):
        client.setblocking(False)
        client.send(json.dumps(_failure(error)).encode() + b"\n")
    client.close()


def _name_peer(client: socket.socket) -> str:
    """The user at the other end. Raises PermissionRefused for one who has no say here."""
    _, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if uid not in {0, os.geteuid()}:
        raise PermissionRefused("only root and the user who runs this appliance may ask it")
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _take(path: Path) -> int:
    """Own the socket's place: a lock that ends with the process, so that a stale socket is told from a living one."""
    if len(os.fsencode(path)) > _MAX_PATH:
        raise ConfigError(f"{path} is too long a name for a socket: choose a shorter folder with PARASIGHT_RUN_DIR")
    lock = path.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        guard = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        kind = PermissionRefused if isinstance(error, PermissionError) else ConfigError
        raise kind(f"cannot use {lock}: {error.strerror}; set PARASIGHT_RUN_DIR to a folder you may write") from error
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(guard, 20, 0).decode(errors="replace").strip()
        os.close(guard)
        who = f" (pid {owner})" if owner.isdecimal() else ""
        raise ControlTaken(
            f"an appliance is already running{who}: use `parasight status` to see it and `parasight stop` to end it, "
            "or set PARASIGHT_RUN_DIR to another folder to run a second one beside it"
        ) from error
    os.ftruncate(guard, 0)
    os.pwrite(guard, f"{os.getpid()}\n".encode(), 0)
    return guard


def _listen(path: Path) -> socket.socket:
    """Bind the socket, mode 0600 from its first moment on. Raises ConfigError, PermissionRefused."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_symlink() or path.exists():
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise ConfigError(f"{path} is in the way and no socket: remove it")
            path.unlink()  # left behind by an appliance that was killed: we hold its lock
        os.fchmod(listener.fileno(), 0o600)  # bind() takes the mode over, less the umask (net/unix/af_unix.c)
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        kind = PermissionRefused if isinstance(error, PermissionError) else ConfigError
        raise kind(f"cannot listen on {path}: {error.strerror}") from error
    except ConfigError:
        listener.close()
        raise
    return listener
