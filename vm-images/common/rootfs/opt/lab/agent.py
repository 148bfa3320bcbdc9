# ruff: noqa: PTH101, PTH103, PTH120, PTH123, PTH208
# (no pathlib: it takes long to import in an emulated guest)
"""The guest's end of the lab: runs commands and moves files for the host, over one virtio-serial port.

One JSON object per line each way. Every request carries `job`, and so does every answer to it. What is written before
the host listens is lost, so the agent never speaks first.
"""

import base64
import contextlib
import json
import os
import select
import signal
import subprocess
import threading
import time
from typing import IO, Any

PORT = "lab.agent"
CHUNK = 48 * 1024


def port_path(wanted: str = PORT) -> str:
    while True:
        for name in os.listdir("/sys/class/virtio-ports"):
            with open(f"/sys/class/virtio-ports/{name}/name") as text:
                if text.read().strip() == wanted:
                    return f"/dev/{name}"
        time.sleep(0.1)


class Agent:
    mark = b""  # what a message begins with

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.lock = threading.Lock()
        self.jobs: dict[int, int] = {}

    def send(self, **answer: object) -> None:
        line = self.mark + json.dumps(answer).encode() + b"\n"
        with self.lock:
            while line:
                line = line[os.write(self.fd, line) :]

    def serve(self) -> None:
        rest = b""
        while True:
            data = os.read(self.fd, 65536)
            if not data:  # the host's end is closed
                time.sleep(0.1)
                continue
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self.handle(json.loads(line))

    def handle(self, request: dict[str, Any]) -> None:
        do, job = request["do"], request["job"]
        try:
            if do == "hello":
                self.send(job=job, ok=True)
            elif do == "spawn":
                self.spawn(job, request["command"])
            elif do == "kill":
                self.kill(request["target"], request["signal"])
                self.send(job=job, ok=True)
            elif do == "put":
                self.put(request)
                self.send(job=job, ok=True)
            elif do == "get":
                threading.Thread(target=self.get, args=(job, request["path"]), daemon=True).start()
        except (OSError, KeyError, ValueError) as error:
            self.send(job=job, error=f"{type(error).__name__}: {error}")

    def kill(self, target: int, number: int) -> None:
        if target not in self.jobs:  # it has ended, or an agent before this one started it
            self.send(job=target, error="no longer known to the guest's agent")
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.jobs[target], number)

    def put(self, request: dict[str, Any]) -> None:
        path, mode = request["path"], "ab" if request["append"] else "wb"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, mode) as file:
            file.write(base64.b64decode(request["data"]))
        os.chmod(path, request["mode"])

    def get(self, job: int, path: str) -> None:
        try:
            with open(path, "rb") as file:
                while data := file.read(CHUNK):
                    self.send(job=job, data=base64.b64encode(data).decode())
            self.send(job=job, ok=True)
        except OSError as error:
            self.send(job=job, error=f"{type(error).__name__}: {error}")

    def spawn(self, job: int, command: str | list[str]) -> None:
        process = subprocess.Popen(
            command,
            shell=isinstance(command, str),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.jobs[job] = process.pid
        self.send(job=job, pid=process.pid)
        threading.Thread(target=self.attend, args=(job, process), daemon=True).start()

    def attend(self, job: int, process: subprocess.Popen[bytes]) -> None:
        ended, end = os.pipe()
        pumps = [
            threading.Thread(target=self.pump, args=(job, name, pipe, ended), daemon=True)
            for name, pipe in (("stdout", process.stdout), ("stderr", process.stderr))
        ]
        for pump in pumps:
            pump.start()
        code = process.wait()
        os.close(end)
        for pump in pumps:
            pump.join()
        os.close(ended)
        del self.jobs[job]
        self.send(job=job, exit=code)

    def pump(self, job: int, stream: str, pipe: IO[bytes], ended: int) -> None:
        """Send what is in the pipe until nothing can follow. A background child may hold it open for ever."""
        reading = pipe.fileno()
        while reading in select.select([reading, ended], [], [])[0]:
            data = os.read(reading, CHUNK)
            if not data:
                return
            self.send(job=job, stream=stream, data=base64.b64encode(data).decode())


def prepare() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    os.environ.update(PATH="/usr/sbin:/usr/bin:/sbin:/bin", HOME="/root", LANG="C.UTF-8", PYTHONDONTWRITEBYTECODE="1")


def main() -> None:
    prepare()
    Agent(os.open(port_path(), os.O_RDWR)).serve()


if __name__ == "__main__":
    main()
