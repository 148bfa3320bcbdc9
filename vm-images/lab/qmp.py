"""A small QMP client on a socket that is already connected (QEMU's docs/interop/qmp-spec.txt). Keeps every event."""

from __future__ import annotations

import json
import queue
import socket
import threading
from typing import Any

from lab.packages import LabError


class Qmp:
    """One monitor connection. `events` grows as QEMU reports; it is never cleared."""

    def __init__(self, connection: socket.socket, timeout_s: float = 30.0) -> None:
        self.events: list[dict[str, Any]] = []
        self._connection, self._lines, self._timeout_s = connection, connection.makefile("rb"), timeout_s
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, name="qmp", daemon=True).start()
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: Any) -> Any:
        """Execute a command; what it returned. LabError when QEMU refuses or has ended."""
        with self._lock:
            message = {"execute": name, "arguments": arguments}
            try:
                self._connection.sendall(json.dumps(message).encode() + b"\n")
                answer = self._answers.get(timeout=self._timeout_s)
            except (OSError, queue.Empty):
                raise LabError(f"QEMU did not answer {name}") from None
        if "error" in answer:
            raise LabError(f"QEMU refused {name}: {answer['error'].get('desc')}")
        return answer["return"]

    def _listen(self) -> None:
        try:
            with self._lines as lines:
                for line in lines:
                    message = json.loads(line)
                    if "event" in message:
                        self.events.append(message)
                    elif "QMP" not in message:
                        self._answers.put(message)
        except (OSError, ValueError):
            pass  # QEMU has ended
        self._answers.put({"error": {"desc": "QEMU has ended"}})
