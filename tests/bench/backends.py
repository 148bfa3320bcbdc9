"""Every route to one guest's memory side by side, against LibVMI's own binding on a dump of it, where that is fastest.

LibVMI has no way to a KVM guest on a stock host. Its figures here are without what makes it safe: no page cache
emptied, no region checked; the lines ``libvmi`` are the route as we offer it. Xen's routes are measured by `xen`.
"""

import contextlib
import importlib
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from appliance.memory.file import open_file
from appliance.memory.libvirt import open_libvirt
from appliance.memory.libvmi import open_libvmi_file
from appliance.memory.monitor import open_monitor
from appliance.memory.qemu import open_qemu
from appliance.ports import GuestMemory
from lab.network import Network
from lab.world import World
from tests.bench.lab import Lab, say
from tests.bench.measure import Sample, settled
from tests.bench.report import Line
from tests.worlds.side import MIB, RAM, Side, open_side

PAGE = 4096
PEER = "LibVMI, raw dump"
SLOW = {"libvirt", "qmp"}  # a call costs a millisecond
BEST = {"qemu", "qemu, shared RAM", "file"}  # those that are taken without being asked for
ROUNDS = 10


@dataclass(frozen=True)
class Work:
    """One way of reading. ``less``: for a slow route so many times less of it."""

    what: str
    size: int
    less: int
    read: Callable[[GuestMemory, list[int]], object]
    scattered: bool = True

    def places(self, number: int, count: int) -> list[int]:
        """Where a round reads, the same for all."""
        if not self.scattered:
            return [(64 + 16 * number) * MIB + PAGE * page for page in range(count)]
        chance = random.Random(number)
        return [PAGE * chance.randrange(MIB // PAGE, RAM // PAGE) for _ in range(count)]


WORKS = (
    Work(
        "4 KiB all over RAM, in batches", PAGE, 50, lambda memory, places: memory.readv([(gpa, PAGE) for gpa in places])
    ),
    Work(
        "4 KiB in order, in batches",
        PAGE,
        8,
        lambda memory, places: memory.readv([(gpa, PAGE) for gpa in places]),
        scattered=False,
    ),
    Work("8 bytes all over RAM, singly", 8, 50, lambda memory, places: [memory.read(gpa, 8) for gpa in places]),
)


def run(lab: Lab) -> Iterator[Line]:
    lab.close()
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network())
        stack.enter_context(World(network))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="parasight-bench-")))
        say(f"booting a domain of libvirt ({RAM // MIB} MiB)")
        side = stack.enter_context(open_side(network, folder))
        stack.enter_context(side.paused())
        dump = side.dump()
        libvmi = importlib.import_module("libvmi")
        peer = libvmi.Libvmi(str(dump), libvmi.INIT_DOMAINNAME, mode=libvmi.VMIMode.FILE, partial=True)
        stack.callback(peer.destroy)
        routes = {name: stack.enter_context(contextlib.closing(one)) for name, one in _open(side, dump).items()}
        for work in WORKS:
            yield from _compare(work, routes, peer, lab.sizes.items // ROUNDS)


def _open(side: Side, dump: Path) -> dict[str, GuestMemory]:
    return {
        "qemu": side.plain(),
        "qemu, shared RAM": open_qemu(side.pid),
        "libvirt": open_libvirt(side.domain.uuid, pid=side.pid, uri=side.libvirtd.uri),
        "qmp": open_monitor(side.pid),
        "file": open_file(dump),
        "libvmi": open_libvmi_file(dump),
    }


def _compare(work: Work, routes: dict[str, GuestMemory], peer, count: int) -> Iterator[Line]:
    theirs, samples = Sample(), {name: Sample() for name in routes}
    with settled():
        for number in range(ROUNDS):
            places = work.places(number, count)
            for name, memory in routes.items():
                part = places[: max(1, count // work.less)] if name in SLOW else places
                samples[name].take(lambda memory=memory, part=part: work.read(memory, part), len(part))
            theirs.take(lambda places=places: [peer.read_pa(gpa, work.size) for gpa in places], len(places))
            truth = peer.read_pa(places[0], work.size)[0]
            for name, memory in routes.items():
                assert memory.read(places[0], work.size) == truth, f"{name} reads something else"
    for name, sample in samples.items():
        note = f"{1 / sample.p50:,.0f} a second against {1 / theirs.p50:,.0f}"
        least = 1.0 if name in BEST else None
        yield Line("backends", f"{name}: {work.what}", "us", sample, PEER, theirs, at_least=least, note=note)
