"""The appliance's worker: a process of its own in which Volatility 3 is asked about single processes of one guest.

``python -m plugins.parasight.worker LOCATION CACHE [SYMBOLS...]``: LOCATION is ``qemu:PID``, ``xen:DOMID`` or
``file:PATH``. It opens the guest's memory itself, read-only. One JSON object per line on standard input and output:

    {"id": 1, "os": "linux", "pid": 812, "at": "0xffff...", "plugins": ["linux.malware.malfind"]}
    {"id": 1, "rows": {"linux.malware.malfind": [{...}]}, "failed": {PLUGIN: WHY}, "cut": 0, "took_s": 0.2}
    {"id": 2, "error": "the process is gone"}

It is held down from inside, whatever the guest's memory makes Volatility do: data and CPU time by limits of the kernel,
each plugin by a timer, rows and values by number and length. It ends with its standard input, and with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .home import find_appliance

find_appliance()

from appliance.errors import ParasightError  # noqa: E402  found just now
from appliance.guest.attach import attach as attach_linux  # noqa: E402
from appliance.guest.windows.attach import attach as attach_windows  # noqa: E402
from appliance.guest.windows.symbols import SymbolStore  # noqa: E402

if TYPE_CHECKING:
    from appliance.guest.kernel import Kernel
    from appliance.ports import GuestMemory

    from .session import Session

MAX_DATA = 3 << 30  # bytes of heap; types and symbols of a kernel take some 300 MB
MAX_CPU_S = 90  # of one question, attaching and making symbols included
MAX_PLUGIN_S = 15.0  # of one plugin
MAX_ROWS = 256  # of one plugin
MAX_REQUEST = 1 << 16
MAX_FILES = 16  # symbol files of Linux kernels in the cache, some 13 MB each
PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
NICE = 10


class _TooLong(BaseException):
    """A plugin has had its time. No Exception: Volatility catches those."""


class Worker:
    """Answers questions on one guest."""

    def __init__(self, location: str, cache: Path, symbols: list[str]) -> None:
        self._location, self._cache, self._symbols = location, cache, symbols
        self._session: Session | None = None
        self._kernel: tuple[object, ...] = ()

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Run the plugins for one process."""
        began_s = time.monotonic()
        pid, at = int(question["pid"]), int(question["at"], 16)
        session = self._find(question["os"], pid, at)
        rows: dict[str, list[dict[str, Any]]] = {}
        failed: dict[str, str] = {}
        cut = 0
        for plugin in question["plugins"]:
            try:
                with _timer(MAX_PLUGIN_S):
                    found = session.run(plugin, at=at, limit=4 * MAX_ROWS, pid=[pid])
                    rows[plugin] = [_plain(row) for row in found[:MAX_ROWS]]
                cut += max(0, len(found) - MAX_ROWS)
            except _TooLong:
                failed[plugin] = f"took more than {MAX_PLUGIN_S:.0f} s"
            except MemoryError:
                raise
            except Exception as error:  # whatever a guest's memory makes of foreign code
                failed[plugin] = f"{type(error).__name__}: {error}"[:300]
        return {"rows": rows, "failed": failed, "cut": cut, "took_s": round(time.monotonic() - began_s, 3)}

    def _find(self, system: str, pid: int, at: int) -> Session:
        """The session in which this process is; a kernel that was replaced by a reboot is attached to again."""
        session = self._session
        if session is not None:
            session.forget()
        if session is None or not _is_there(session, pid, at):
            session = self._session = self._open(system)
            if not _is_there(session, pid, at):
                raise LookupError("the process is gone")
        return session

    def _open(self, system: str) -> Session:
        """Attach; where the kernel is the one we know, with the symbols that we have."""
        from . import session  # noqa: PLC0415  Volatility reads its environment when it is imported
        from .layer import open_memory  # noqa: PLC0415

        memory = open_memory(self._location)
        if system == "windows":
            store = SymbolStore.default([Path(folder) for folder in self._symbols])
            session.add_symbol_dirs(store.dirs)
            windows = attach_windows(memory, symbols=store)
            key: tuple[object, ...] = windows.pdb, windows.base, windows.space.root
            if self._session is not None and key == self._kernel:
                return self._session
            self._kernel = key
            return session.open_windows(windows, self._location)
        linux = _attach_linux(memory)
        key = linux.build_id, linux.image, linux.root
        if self._session is not None and key == self._kernel:
            return self._session
        self._kernel = key
        isf = session.write_linux_isf(linux, self._cache / "symbols")
        _tidy(isf.parent)
        return session.open_linux(linux, self._location, isf)


def _attach_linux(memory: GuestMemory) -> Kernel:
    vcpus = memory.vcpus()
    return attach_linux(memory, cr3=vcpus[0].cr3 if vcpus else None)


def _tidy(folder: Path) -> None:
    """Keep the symbol files used last: a guest can claim to be any number of kernels."""
    used: list[tuple[float, Path]] = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another guest's worker tidies up, too
            used.append((path.stat().st_mtime, path))
    for _, path in sorted(used)[:-MAX_FILES]:
        path.unlink(missing_ok=True)


def _is_there(session: Session, pid: int, at: int) -> bool:
    try:
        return session.pid(at) == pid
    except Exception:  # unreadable, or no such thing: it is not there
        return False


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    from .session import plain  # noqa: PLC0415

    return {name: plain(value) for name, value in row.items()}


@contextlib.contextmanager
def _timer(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _hold_down() -> None:
    """Limits that hold without anybody's help. Memory that is only mapped to be read, a guest's RAM, is not counted."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA, MAX_DATA))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICE)


def _grant_cpu() -> None:
    """CPU time for one question, from now on; the kernel kills what takes more."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + MAX_CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def serve(worker: Worker, questions: IO[bytes], answers: IO[bytes]) -> None:
    """Answer until there are no more questions."""
    while line := questions.readline(MAX_REQUEST):
        _grant_cpu()
        question: dict[str, Any] = {}
        try:
            read = json.loads(line)
            question = read if isinstance(read, dict) else {}
            reply = worker.answer(question)
        except MemoryError:
            reply = {"error": "out of memory"}
        except (LookupError, ParasightError) as error:
            reply = {"error": str(error)[:300]}
        except Exception as error:  # the appliance hears why, and counts it
            reply = {"error": f"{type(error).__name__}: {error}"[:300]}
        answers.write(json.dumps({"id": question.get("id"), **reply}).encode() + b"\n")
        answers.flush()
        if reply.get("error") == "out of memory":
            sys.exit(1)


def main() -> None:
    """Entry of the process."""
    location, cache, *symbols = sys.argv[1:]
    parent = os.getppid()
    _hold_down()
    if os.getppid() != parent:  # it ended before we asked to be told
        return
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever plugins print is no answer
    from volatility3.framework import constants  # noqa: PLC0415  after the limits

    constants.OFFLINE = True
    serve(Worker(location, Path(cache), symbols), sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
