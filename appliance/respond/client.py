"""The other end of the control socket: one request, one answer. What the command line uses."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any, Final

from appliance.errors import ConfigError, HostError, ParasightError, PermissionRefused, UsageError
from appliance.respond.place import control_path

_WAIT_S = 30.0
_MAX_ANSWER = 256 << 20  # bytes; 16,384 bans of each family are some 8 MB
_BY_CODE: Final[dict[object, type[ParasightError]]] = {
    kind.exit_code: kind for kind in (UsageError, ConfigError, PermissionRefused, HostError)
}


class NotRunning(HostError):
    """No appliance serves the control socket."""


def ask(request: dict[str, Any], path: Path | None = None, wait_s: float = _WAIT_S) -> Any:  # noqa: ANN401 - JSON
    """Send one request to the appliance that runs here and return its result.

    Raises NotRunning, or what the appliance answers as the error of the same exit code.
    """
    place = path or control_path()
    deadline_s = time.monotonic() + wait_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        _connect(server, place, deadline_s)
        try:
            server.sendall(json.dumps(request, separators=(",", ":")).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # it may have said why
        except TimeoutError as error:
            raise HostError(f"the appliance at {place} does not answer") from error
        return _result(_read_line(server, place, deadline_s), place)


def _connect(server: socket.socket, place: Path, deadline_s: float) -> None:
    while True:
        server.settimeout(max(0.001, deadline_s - time.monotonic()))
        try:
            server.connect(str(place))
        except BlockingIOError as error:  # its queue is full (unix(7)): others are before us
            if time.monotonic() >= deadline_s:
                raise HostError(f"the appliance at {place} has no time for us") from error
            time.sleep(0.05)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
            raise NotRunning(
                f"no appliance runs here (nobody answers at {place}): start one with `parasight watch TARGET...`, "
                "or set PARASIGHT_RUN_DIR to the folder of the one you mean"
            ) from error
        except PermissionError as error:
            raise PermissionRefused(f"{place}: only root and the user who runs the appliance may ask it") from error
        except OSError as error:
            raise HostError(f"cannot reach the appliance at {place}: {error}") from error
        else:
            return


def _read_line(server: socket.socket, place: Path, deadline_s: float) -> bytes:
    chunks: list[bytes] = []
    size = 0
    try:
        while not chunks or not chunks[-1].endswith(b"\n"):
            server.settimeout(max(0.001, deadline_s - time.monotonic()))
            chunk = server.recv(1 << 16)
            size += len(chunk)
            if not chunk or size > _MAX_ANSWER:
                raise HostError(f"the appliance at {place} ended without an answer")
            chunks.append(chunk)
    except TimeoutError as error:
        raise HostError(f"the appliance at {place} does not answer") from error
    except ConnectionError as error:
        raise HostError(f"the appliance at {place} ended without an answer") from error
    return b"".join(chunks)


def _result(line: bytes, place: Path) -> Any:  # noqa: ANN401 - JSON
    try:
        body = json.loads(line)
        if body["ok"]:
            return body["result"]
        text, code = str(body["error"]), body["code"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise HostError(f"what answers at {place} is no appliance of this version: {line[:80]!r}") from error
    raise _BY_CODE.get(code, ParasightError)(text)
