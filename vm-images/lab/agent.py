"""The host's end of the guest agent: jobs and files over one socket, one JSON object per line.

The guest's end is vm-images/common/rootfs/opt/lab/agent.py.
"""

from __future__ import annotations

import base64
import itertools
import json
import queue
import signal
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from lab.packages import LabError

CHUNK = 32 * 1024


@dataclass(frozen=True, slots=True)
class CompletedRun:
    """A command of the guest that has ended."""

    returncode: int
    stdout: str
    stderr: str


class Job:
    """A command running in the guest."""

    def __init__(self, agent: Agent, number: int) -> None:
        self.pid = 0
        self._agent, self._number = agent, number
        self._streams = {"stdout": bytearray(), "stderr": bytearray()}
        self._changed = threading.Condition()
        self._exit: int | None = None

    @property
    def output(self) -> str:
        """What it wrote to its standard output up to now."""
        return self._streams["stdout"].decode(errors="replace")

    @property
    def errors(self) -> str:
        """What it wrote to its standard error up to now."""
        return self._streams["stderr"].decode(errors="replace")

    @property
    def running(self) -> bool:
        return self._exit is None

    def wait(self, timeout_s: float = 60.0) -> CompletedRun:
        """Wait for its end. TimeoutError leaves it running."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._exit is not None, timeout_s):
                raise TimeoutError(f"guest job still runs after {timeout_s} s; {self._tail()}")
        assert self._exit is not None
        return CompletedRun(self._exit, self.output, self.errors)

    def wait_for(self, text: str, timeout_s: float = 60.0) -> None:
        """Wait until the text is in its output; LabError when it ends before."""
        with self._changed:
            if not self._changed.wait_for(lambda: text in self.output or not self.running, timeout_s):
                raise TimeoutError(f"no {text!r} from guest job within {timeout_s} s; {self._tail()}")
        if text not in self.output:
            raise LabError(f"guest job ended ({self._exit}) before {text!r}; {self._tail()}")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to it and its children."""
        if self.running:
            self._agent.request("kill", target=self._number, signal=int(number))

    def handle(self, answer: dict[str, Any]) -> None:
        """Take in one message of the agent about this job."""
        with self._changed:
            if self._exit is not None and "error" in answer:
                return
            if "data" in answer:
                self._streams[answer["stream"]] += base64.b64decode(answer["data"])
            self.pid = answer.get("pid", self.pid)
            if "error" in answer:
                self._streams["stderr"] += answer["error"].encode()
            self._exit = answer.get("exit", 127 if "error" in answer else self._exit)
            self._changed.notify_all()

    def _tail(self) -> str:
        return f"its last words: {(self.output + self.errors)[-800:]!r}"


class Agent:
    """Speaks to the agent of one guest. Safe for several threads."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._lines = connection, connection.makefile("rb")
        self._send_lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._jobs: dict[int, Job] = {}
        self._answers: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        threading.Thread(target=self._listen, name="guest agent", daemon=True).start()

    def hello(self, timeout_s: float) -> bool:
        """Whether the agent answers; asks once."""
        try:
            self.request("hello", timeout_s=timeout_s)
        except TimeoutError:
            return False
        return True

    def spawn(self, command: list[str] | str) -> Job:
        """Start a command (a string goes to the shell) and return at once."""
        number = next(self._numbers)
        job = self._jobs[number] = Job(self, number)
        self._send(do="spawn", job=number, command=command)
        return job

    def put(self, path: str, content: bytes, mode: int) -> None:
        for start in range(0, max(len(content), 1), CHUNK):
            data = base64.b64encode(content[start : start + CHUNK]).decode()
            self.request("put", path=path, data=data, mode=mode, append=start > 0)

    def get(self, path: str) -> bytes:
        return self.request("get", path=path)

    def request(self, do: str, timeout_s: float = 60.0, **details: Any) -> bytes:
        """Ask and wait for the end of the answer; the bytes it carried. LabError when the guest could not."""
        number = next(self._numbers)
        answers = self._answers[number] = queue.SimpleQueue()
        self._send(do=do, job=number, **details)
        content, deadline = bytearray(), time.monotonic() + timeout_s
        try:
            while True:
                answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
                if "error" in answer:
                    raise LabError(f"guest: {do} {details.get('path', '')}: {answer['error']}")
                content += base64.b64decode(answer.get("data", ""))
                if answer.get("ok"):
                    return bytes(content)
        except queue.Empty:
            raise TimeoutError(f"guest agent did not answer {do!r} within {timeout_s} s") from None
        finally:
            del self._answers[number]

    def _send(self, **message: Any) -> None:
        with self._send_lock:
            try:
                self._connection.sendall(json.dumps(message).encode() + b"\n")
            except OSError as error:
                raise LabError(f"the guest is gone: {error}") from None

    def _listen(self) -> None:
        try:
            with self._lines as lines:
                for line in lines:
                    answer = json.loads(line)
                    if (job := self._jobs.get(answer["job"])) is not None:
                        job.handle(answer)
                    elif (answers := self._answers.get(answer["job"])) is not None:
                        answers.put(answer)
        except (OSError, ValueError):
            pass  # the guest has ended; whoever waits is told below
        for job in list(self._jobs.values()):
            if job.running:
                job.handle({"error": "the guest has ended"})
        for answers in list(self._answers.values()):
            answers.put({"error": "the guest has ended"})
