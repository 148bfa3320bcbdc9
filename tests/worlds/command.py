"""The command `parasight`, run as a person runs it."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[dict]:
        return [json.loads(line) for line in self.out.splitlines()]


def environment(home: Path) -> dict[str, str]:
    chosen = {name: os.environ[name] for name in ("PARASIGHT_LIBVIRT_URI",) if name in os.environ}
    return chosen | {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "PARASIGHT_STATE": str(home / "state"),
        "PARASIGHT_RUN_DIR": str(home / "run"),
        "XDG_CACHE_HOME": str(home / "cache"),
    }


def parasight(*words: object, home: Path, prefix: tuple[str, ...] = (), timeout_s: float = 120) -> Done:
    command = [*prefix, sys.executable, "-m", "appliance.cli", *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(home), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


class Watching:
    """`parasight watch ... --output jsonl` under way; Volatility looks too only where a test asks for it."""

    def __init__(self, *words: object, home: Path) -> None:
        command = [sys.executable, "-m", "appliance.cli", "watch", *map(str, words), "--output", "jsonl"]
        if "--second-opinion" not in words:
            command.append("--no-second-opinion")
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.verdicts: list[dict] = []
        self.summary: dict = {}
        self.said: list[str] = []
        self._readers = [threading.Thread(target=self._read_out, daemon=True)]
        for line in self._process.stderr:
            self.said.append(line.rstrip())
            if line.strip() == "ready":
                break
        else:
            raise AssertionError(f"ended with {self._process.wait()}: {self.said}")
        self._readers.append(threading.Thread(target=self._read_err, daemon=True))
        for reader in self._readers:
            reader.start()

    def _read_out(self) -> None:
        for line in self._process.stdout:
            body = json.loads(line)
            if body.get("summary"):
                self.summary = body
            else:
                self.verdicts.append(body)

    def _read_err(self) -> None:
        self.said.extend(line.rstrip() for line in self._process.stderr)

    def kill(self) -> None:
        """As by the kernel: it has no time for anything."""
        self._process.kill()
        self.wait()

    def end(self) -> int:
        self._process.terminate()
        return self.wait()

    def wait(self) -> int:
        code = self._process.wait(timeout=60)
        for reader in self._readers:
            reader.join(timeout=10)
        self._process.stdout.close()
        self._process.stderr.close()
        assert not any("Traceback" in line for line in self.said), self.said
        return code

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self.wait()
