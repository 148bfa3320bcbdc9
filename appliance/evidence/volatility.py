"""The second opinion: Volatility 3 looks at a denied process, in a process of its own, while the watch goes on.

The worker (plugins/parasight/worker.py) opens the guest's memory itself and talks JSON lines over a pipe. Here is its
keeper: a thread that starts it when it is first asked, kills it when it takes too long or says what cannot be, and ends
it when nothing is asked for a while, since it holds some 250 MB. Nothing of Volatility is imported here.

What it says comes from a guest's memory through foreign code: it is bounded, and believed as one view among others.
None of it makes a process parasitic by itself, since just-in-time compilers look like injected code to these plugins.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, Final

from appliance.evidence.claims import claims_of
from appliance.model import Availability, Evidence, GuestProcess, Opinion

PLUGINS: Final = {
    "linux": ("linux.malware.malfind", "linux.malware.process_spoofing"),
    "windows": (
        "windows.malware.malfind",
        "windows.malware.ldrmodules",
        "windows.malware.suspicious_threads",
        "windows.malware.hollowprocesses",
        "windows.malware.pebmasquerade",
    ),
}
MAX_ASKED = 32  # questions that wait
MAX_ANSWER = 4 << 20
FIRST_S = 120.0  # attaching, and making the symbols of a Linux kernel, come with the first answer
ANSWER_S = 60.0
IDLE_S = 300.0  # then the worker ends, until it is asked again
MAX_FAILURES = 3  # in a row: then it is asked no more
LEAST = (2, 28)  # windows.malware.* and linux.malware.* have these names since then

_PASSED = ("PATH", "HOME", "XDG_DATA_HOME", "PARASIGHT_SYMBOLS", "PARASIGHT_SYMBOL_SHARE")  # to the worker
_ROOT = Path(__file__).resolve().parents[2]


def probe() -> Availability:
    """Whether Volatility is here, without importing it."""
    name, remedy = "second opinion", "pip install 'volatility3>=2.28'"
    if importlib.util.find_spec("volatility3") is None:
        why = "volatility3 is not installed: alerts carry our own evidence only"
        return Availability(name, ok=False, reason=why, remedy=remedy, required=False)
    version = importlib.metadata.version("volatility3")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if numbers < LEAST:
        why = f"volatility3 {version} is too old"
        return Availability(name, ok=False, reason=why, remedy=remedy, required=False)
    if not (_ROOT / "plugins" / "parasight" / "worker.py").exists():
        why = f"{_ROOT / 'plugins'} is missing"
        return Availability(name, ok=False, reason=why, remedy="run from the whole source tree", required=False)
    return Availability(name, ok=True, reason=f"volatility3 {version}, in a process of its own", required=False)


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/parasight/volatility``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "parasight" / "volatility"


class SecondOpinion:
    """Asks Volatility about processes of one guest. No method waits for it."""

    def __init__(
        self,
        location: str,
        *,
        symbols: Sequence[Path] = (),
        cache: Path | None = None,
        command: Sequence[str] | None = None,
        first_s: float = FIRST_S,
        answer_s: float = ANSWER_S,
        idle_s: float = IDLE_S,
    ) -> None:
        """``location`` is ``qemu:PID`` or ``file:PATH``, ``command`` what to start instead of our worker."""
        self._cache = cache or default_cache()
        worker = [sys.executable, "-P", "-m", "plugins.parasight.worker"]
        self._command = [*(command or worker), location, str(self._cache), *map(str, symbols)]
        self._first_s, self._answer_s, self._idle_s = first_s, answer_s, idle_s
        self._asked: Queue[tuple[str, GuestProcess] | None] = Queue(MAX_ASKED)
        self._heard: Queue[Opinion] = Queue()  # never holds more than was asked
        self._lock = threading.Lock()  # of the two below
        self._worker: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        self._failures = 0
        self._number = 0

    def ask(self, system: str, process: GuestProcess) -> bool:
        """Put a question; False: too many wait, or there is nobody to ask."""
        if self._closed or self._failures >= MAX_FAILURES or system not in PLUGINS:
            return False
        try:
            self._asked.put_nowait((system, process))
        except Full:
            return False
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="second opinion", daemon=True)
            self._thread.start()
        return True

    def heard(self) -> list[Opinion]:
        """The answers that have come since."""
        answers = []
        with contextlib.suppress(Empty):
            while True:
                answers.append(self._heard.get_nowait())
        return answers

    def close(self) -> None:
        """End the worker; what was not answered is not. May be called twice."""
        with self._lock:
            self._closed = True
            if self._worker is not None:
                self._worker.kill()
        if self._thread is not None:
            with contextlib.suppress(Full):
                self._asked.put_nowait(None)  # wakes it
            self._thread.join(10.0)
            self._thread = None

    # -- in its own thread --

    def _run(self) -> None:
        """The worker dies with the thread that has started it, so all of its life is here."""
        try:
            while not self._closed:
                try:
                    question = self._asked.get(timeout=self._idle_s)
                except Empty:
                    self._end()
                    continue
                if question is not None and not self._closed:
                    self._heard.put(self._opinion(*question))
        finally:
            self._end()

    def _opinion(self, system: str, process: GuestProcess) -> Opinion:
        if self._failures >= MAX_FAILURES:
            return Opinion(process.key, trouble="it has failed too often")
        plugins = PLUGINS[system]
        self._number += 1
        question = {
            "id": self._number,
            "os": system,
            "pid": process.pid,
            "at": f"{process.task_va:#x}",
            "plugins": list(plugins),
        }
        try:
            answer = self._converse(question)
        except (OSError, ValueError, RecursionError) as error:
            self._end()
            self._failures += 1
            return Opinion(process.key, trouble=str(error)[:300] or type(error).__name__)
        self._failures = 0
        refusal = answer.get("error")
        if refusal is not None:
            return Opinion(process.key, trouble=str(refusal)[:300])
        return self._judge(process, plugins, answer)

    def _judge(self, process: GuestProcess, plugins: Sequence[str], answer: dict[str, Any]) -> Opinion:
        rows, failed = answer.get("rows"), answer.get("failed")
        failed = failed if isinstance(failed, dict) else {}
        evidence: list[Evidence] = []
        for plugin in plugins:
            found = rows.get(plugin) if isinstance(rows, dict) else None
            evidence += claims_of(plugin, found if isinstance(found, list) else [])
        heard = [plugin for plugin in plugins if isinstance(rows, dict) and plugin in rows]
        if heard and not evidence:
            names = ", ".join(plugin.rpartition(".")[2] for plugin in heard)
            evidence = [Evidence(f"Volatility sees nothing foreign in this process ({names})", "volatility:nothing")]
        why = "; ".join(f"{plugin}: {reason}" for plugin, reason in failed.items())[:300]
        return Opinion(process.key, tuple(evidence), why or None)

    def _converse(self, question: dict[str, Any]) -> dict[str, Any]:
        """Ask, and wait for the answer. Raises OSError or ValueError with what went wrong."""
        worker, fresh = self._start()
        assert worker.stdin is not None
        assert worker.stdout is not None
        deadline_s = time.monotonic() + (self._first_s if fresh else self._answer_s)
        worker.stdin.write(json.dumps(question).encode() + b"\n")
        worker.stdin.flush()
        line = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(worker.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not selector.select(left_s):
                    raise TimeoutError("it took too long and was killed")
                part = os.read(worker.stdout.fileno(), 1 << 16)
                if not part:
                    raise OSError("it died")
                line += part
                if len(line) > MAX_ANSWER:
                    raise OSError("it said too much and was killed")
        answer = json.loads(line)
        if not isinstance(answer, dict) or answer.get("id") != question["id"]:
            raise ValueError("it said what is no answer")
        return answer

    def _start(self) -> tuple[subprocess.Popen[bytes], bool]:
        """The worker, and whether it was started just now. In its own session: a Ctrl-C is not for it."""
        if self._worker is not None and self._worker.poll() is None:
            return self._worker, False
        self._end()
        with self._lock:
            if self._closed:
                raise OSError("it is closed")
            self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            environment = {name: os.environ[name] for name in _PASSED if name in os.environ}
            environment |= {"PYTHONPATH": str(_ROOT), "LC_ALL": "C.UTF-8", "XDG_CACHE_HOME": str(self._cache)}
            self._worker = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
            return self._worker, True

    def _end(self) -> None:
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                worker.communicate(timeout=10.0)  # closes the pipes; a killed process ends at once
