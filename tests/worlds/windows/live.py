"""A machine that lives: connections come and go while others read its RAM."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Self

from tests.worlds.windows.machine import Machine
from tests.worlds.windows.net import Endpoint
from tests.worlds.windows.planted import Process

HOME = "10.0.0.5"
PORTS = range(20000, 48000)


class Busy:
    """Opens and closes connections of some processes, ``alive`` at a time; freed blocks are poisoned or used again.

    Whose a connection is follows from its local port alone, so that a reader can be judged whenever it looked.
    """

    def __init__(self, machine: Machine, owners: Sequence[Process], alive: int = 200, seed: int = 0) -> None:
        self.machine, self.owners, self.alive = machine, tuple(owners), alive
        self.steps = 0
        self._chance = random.Random(seed)
        self._open: deque[Endpoint] = deque()
        self._next = 0
        self._going = threading.Event()
        self._thread: threading.Thread | None = None
        for _ in range(alive):
            self._connect()

    def owner_of(self, port: int) -> Process:
        """Who owns every connection of this local port, past and present."""
        return self.owners[port % len(self.owners)]

    def step(self) -> None:
        """One connection goes, another one comes."""
        self._open.rotate(self._chance.randrange(3))
        self.machine.tcp_close(self._open.popleft(), poison=self._chance.random() < 0.5)
        self._connect()
        self.steps += 1

    def __enter__(self) -> Self:
        """Begin to change, in a thread of its own, as fast as may be while others need the processor too."""
        self._going.set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._going.clear()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while self._going.is_set():
            for _ in range(10):
                self.step()
            self.machine.tick(0.01)
            time.sleep(0.001)

    def _connect(self) -> None:
        port = PORTS[self._next % len(PORTS)]
        self._next += 1
        peer = f"198.51.100.{self._chance.randrange(250)}"
        self._open.append(self.machine.tcp(self.owner_of(port), (HOME, port), (peer, 443), hold_port=False))
