"""The guests a run needs: booted when first asked for, never two at a time."""

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from appliance.guest.attach import attach
from appliance.guest.kernel import Kernel
from appliance.guest.linux.eye import LinuxEye
from appliance.memory.qemu import QemuMemory, open_qemu
from lab.guest import Guest, boot
from lab.image import build
from lab.network import WORLD_IP4, WORLD_IP6, Network
from lab.world import World
from plugins.parasight.btf import Btf
from plugins.parasight.symbols import read_symbols

IMAGE = "debian-12-cloud"
WORKLOAD = "exec python3 -S -E /opt/workloads/sockets.py --count {count} --server {v4} --server6 {v6} --own"


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    sockets: int = 1000
    rounds: int = 9
    slow_rounds: int = 2  # of a peer that takes many seconds
    items: int = 20_000  # of things that take microseconds
    tap_s: float = 3.0
    impact_rounds: int = 100
    eye_slices: int = 100
    eye_packets: int = 6_000
    eye_flows: int = 5_000
    eye_rounds: int = 3  # of those who dissect
    hold_rounds: int = 300
    held: int = 1000  # at once
    peers: bool = True  # those that take seconds to start

    @classmethod
    def quick(cls) -> "Sizes":
        return cls(
            sockets=48,
            rounds=2,
            slow_rounds=1,
            items=200,
            tap_s=0.5,
            impact_rounds=4,
            eye_slices=4,
            eye_packets=1000,
            eye_flows=100,
            hold_rounds=20,
            held=50,
            peers=False,
        )


@dataclass
class Crowd:
    """A guest with many sockets, and everything the engines need of it. Without LA57, for Volatility's sake."""

    guest: Guest
    memory: QemuMemory
    kernel: Kernel
    folder: Path

    @cached_property
    def eye(self) -> LinuxEye:
        return LinuxEye(self.kernel)

    @cached_property
    def types(self) -> Btf:
        return Btf(self.kernel.types.blob)

    @cached_property
    def symbols(self) -> dict[str, int]:
        return read_symbols(self.kernel)


class Lab:
    """Guests for one run of the benchmarks."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._crowd: tuple[Crowd, ExitStack] | None = None

    def crowd(self) -> Crowd:
        """The guest with many sockets."""
        if self._crowd is None:
            stack = ExitStack()
            try:
                guest = self._boot(stack, "crowd", cpu="max,la57=off")
                command = WORKLOAD.format(count=self.sizes.sockets, v4=WORLD_IP4, v6=WORLD_IP6)
                guest.spawn(command).wait_for("READY", 120)
                memory = open_qemu(guest.pid, monitor=guest.qmp_path)
                stack.callback(memory.close)
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="parasight-bench-")))
                self._crowd = Crowd(guest, memory, attach(memory, cache=False), folder), stack
            except BaseException:
                stack.close()
                raise
        return self._crowd[0]

    def quiet(self, stack: ExitStack) -> Guest:
        """Another guest, in which nothing happens; the crowded one ends first."""
        self.close()
        return self._boot(stack, "quiet")

    def close(self) -> None:
        if self._crowd is not None:
            self._crowd[1].close()
            self._crowd = None

    def _boot(self, stack: ExitStack, name: str, **options: str) -> Guest:
        image = build(IMAGE, say)
        network = stack.enter_context(Network())
        stack.enter_context(World(network))
        say(f"booting {name} ({image.release}, 1 GiB)")
        return stack.enter_context(boot(image, network, name=name, **options))


def say(line: str) -> None:
    """Progress, for whoever waits."""
    print(f"bench: {line}", file=sys.stderr, flush=True)
