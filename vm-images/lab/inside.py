"""What can be done inside a booted guest, whoever started it: commands, files, and the truth about itself."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence

from lab.agent import Agent, CompletedRun, Job
from lab.packages import LabError
from lab.truth import Truth


class Inside(ABC):
    """A guest with an agent. Whoever inherits this says how the agent is reached."""

    @property
    @abstractmethod
    def agent(self) -> Agent:
        """Its line to the host."""

    def run(self, command: Sequence[str] | str, timeout_s: float = 60.0) -> CompletedRun:
        """Run a command in the guest to its end; a string goes to the guest's shell. TimeoutError kills it."""
        job = self.spawn(command)
        try:
            return job.wait(timeout_s)
        except TimeoutError:
            job.kill()
            raise

    def spawn(self, command: Sequence[str] | str) -> Job:
        """Start a command in the guest and let it run."""
        return self.agent.spawn(command if isinstance(command, str) else list(command))

    def put(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Write a file in the guest."""
        self.agent.put(path, content, mode)

    def get(self, path: str) -> bytes:
        """Read a file of the guest."""
        return self.agent.get(path)

    def truth(self, *symbols: str) -> Truth:
        """What the guest itself says about its sockets and processes, and where these kernel symbols are."""
        done = self.run(["/usr/bin/python3", "-S", "-E", "/opt/lab/truth.py", *symbols], timeout_s=120)
        if done.returncode != 0:
            raise LabError(f"truth script failed: {done.stderr[-800:]}")
        return Truth.parse(json.loads(done.stdout))
