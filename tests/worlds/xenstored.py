"""A xenstored that is made up: a tree in a dict behind a real socket, with the real one's protocol and its habits.

Events may come before an answer and in the same packet. ``stalled``: it takes questions and answers none.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path

HEADER = struct.Struct("=IIII")
DIRECTORY, READ, WATCH, UNWATCH, EVENT, ERROR, INTRODUCED, PART = 1, 2, 4, 5, 15, 16, 17, 21


class Xenstored:
    """``tree`` maps paths to values; what is below a path need not be there for the path to be."""

    def __init__(self, folder: Path, tree: dict[str, str]) -> None:
        self.path = str(folder / "xenstored")
        self.tree = dict(tree)
        self.refused: dict[str, str] = {}  # errors by path
        self.building: set[int] = set()  # domains that nobody has told it of yet
        self.stalled = threading.Event()
        self.asked: list[tuple[int, str]] = []
        self._watches: dict[socket.socket, set[tuple[str, str]]] = {}
        self._lock = threading.RLock()
        self._listen()

    def _listen(self) -> None:
        Path(self.path).unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(self.path)
        self._socket.listen()
        threading.Thread(target=self._accept, args=(self._socket,), daemon=True).start()

    def fire(self, path: str) -> None:
        """Tell those who watch the path, or one above it."""
        with self._lock:
            for peer, watches in self._watches.items():
                told = [(at, word) for at, word in watches if path == at or path.startswith(at + "/")]
                with contextlib.suppress(OSError):  # who has left is told nothing
                    peer.sendall(b"".join(_message(EVENT, 0, path, word) for _, word in told))

    def write(self, path: str, value: str | None) -> None:
        """Change a value (None: remove it and what is below), and tell."""
        with self._lock:
            if value is None:
                self.tree = {at: text for at, text in self.tree.items() if at != path and not at.startswith(path + "/")}
            else:
                self.tree[path] = value
            self.fire(path)

    def watched(self) -> set[str]:
        with self._lock:
            return {at for watches in self._watches.values() for at, _ in watches}

    def send_to_all(self, data: bytes) -> None:
        """Bytes that nobody asked for."""
        with self._lock:
            for peer in self._watches:
                peer.sendall(data)

    def restart(self) -> None:
        """Hang up on everybody and listen again."""
        self.close()
        self._listen()

    def close(self) -> None:
        with self._lock:
            self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
            for peer in self._watches:  # whoever serves it closes it
                with suppress(OSError):
                    peer.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        try:
            while True:
                peer, _ = listener.accept()
                with self._lock:
                    self._watches[peer] = set()
                threading.Thread(target=self._serve, args=(peer,), daemon=True).start()
        except OSError:
            return  # closed

    def _serve(self, peer: socket.socket) -> None:
        try:
            with peer, peer.makefile("rb") as stream:
                while head := stream.read(HEADER.size):
                    kind, request, _, length = HEADER.unpack(head)
                    words = stream.read(length).decode().split("\0")[:-1]
                    with self._lock:
                        self.asked.append((kind, words[0]))
                        if not self.stalled.is_set():
                            peer.sendall(self._answer(peer, kind, request, words))
        except (OSError, ValueError):
            pass  # it hung up
        with self._lock:
            self._watches.pop(peer, None)

    def _answer(self, peer: socket.socket, kind: int, request: int, words: list[str]) -> bytes:
        path = words[0]
        if path in self.refused:
            return _message(ERROR, request, self.refused[path])
        if kind == INTRODUCED:
            known = f"/local/domain/{path}/domid" in self.tree and int(path) not in self.building
            return _message(INTRODUCED, request, "T" if known else "F")
        if kind == WATCH:
            self._watches[peer].add((path, words[1]))
            return _message(EVENT, 0, path, words[1]) + _message(WATCH, request, "OK")
        if kind == UNWATCH:
            self._watches[peer].discard((path, words[1]))
            return _message(UNWATCH, request, "OK")
        if kind == READ and path in self.tree:
            return HEADER.pack(READ, request, 0, len(self.tree[path].encode())) + self.tree[path].encode()
        below = [at[len(path) + 1 :].partition("/")[0] for at in self.tree if at.startswith(path + "/")]
        if kind == READ or not (below or path in self.tree):
            return _message(ERROR, request, "ENOENT")
        data = b"".join(name.encode() + b"\0" for name in dict.fromkeys(below))
        if kind == PART:
            start = int(words[1])
            part = b"7\0" + (data + b"\0")[start : start + 4000]
            return HEADER.pack(PART, request, 0, len(part)) + part
        if len(data) > 4096:
            return _message(ERROR, request, "E2BIG")
        return HEADER.pack(DIRECTORY, request, 0, len(data)) + data


def _message(kind: int, request: int, *words: str) -> bytes:
    data = b"".join(word.encode() + b"\0" for word in words)
    return HEADER.pack(kind, request, 0, len(data)) + data


def domain(domid: int, uuid: str, name: str, *, kind: str = "pvh", mib: int = 128) -> dict[str, str]:
    """What libxl writes for a domain without devices."""
    here = f"/local/domain/{domid}"
    return {
        f"{here}/vm": f"/vm/{uuid}",
        f"{here}/name": name,
        f"{here}/domid": str(domid),
        f"{here}/memory/static-max": str(mib << 10),
        f"{here}/memory/target": str(mib << 10),
        f"{here}/memory/videoram": "0",
        f"/libxl/{domid}/type": kind,
    }


def card(domid: int, number: int, mac: str, *, backend: int = 0, **more: str) -> dict[str, str]:
    """What libxl writes for a network card."""
    there = f"/local/domain/{backend}/backend/vif/{domid}/{number}"
    written = {f"/libxl/{domid}/device/vif/{number}/backend": there, f"/libxl/{domid}/device/vif/{number}/mac": mac}
    return written | {f"{there}/{key}": value for key, value in ({"mac": mac, "bridge": "xenbr0"} | more).items()}
