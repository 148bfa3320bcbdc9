"""Guest memory: eight bytes at a time, and a thousand reads at once, against what else can read a QEMU's RAM."""

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

from tests.bench.lab import Crowd, Lab
from tests.bench.measure import Sample, settled
from tests.bench.report import Line

BATCH = 1000
MONITOR_READS = 50


def socket_places(crowd: Crowd) -> list[int]:
    """Where the guest's sockets lie: pages it uses, scattered as they really are."""
    found = [crowd.kernel.to_gpa(one.address) for one in crowd.eye.read_snapshot().sockets]
    random.Random(1).shuffle(found)
    return found


def run(lab: Lab) -> Iterator[Line]:
    crowd, count = lab.crowd(), lab.sizes.items
    memory, guest = crowd.memory, crowd.guest
    region = max(memory.regions, key=lambda region: region.size)
    places = list(itertools.islice(itertools.cycle(socket_places(crowd)), count))
    base = int(guest.qmp("human-monitor-command", **{"command-line": f"gpa2hva {region.gpa:#x}"}).split()[-1], 16)
    shift = base - region.gpa
    fd = os.open(f"/proc/{guest.pid}/mem", os.O_RDONLY)
    dump = crowd.folder / "pmemsave"

    def pmemsave(gpa: int) -> bytes:
        guest.qmp("pmemsave", val=gpa, size=8, filename=str(dump))
        return dump.read_bytes()

    for gpa in places[:10]:
        assert memory.read(gpa, 8) == os.pread(fd, 8, gpa + shift) == pmemsave(gpa), "the peers read something else"
    ours, plain, many, singly, monitor = (Sample() for _ in range(5))
    with settled():
        for start in range(0, count, BATCH):
            part = places[start : start + BATCH]
            spans = [(gpa, 8) for gpa in part]
            ours.take(lambda part=part: [memory.read(gpa, 8) for gpa in part], len(part))
            plain.take(lambda part=part: [os.pread(fd, 8, gpa + shift) for gpa in part], len(part))
            many.take(lambda spans=spans: memory.readv(spans), len(part))
            singly.take(lambda part=part: [os.pread(fd, 8, gpa + shift) for gpa in part], len(part))
            for gpa in part[: max(1, MONITOR_READS * len(part) // count)]:
                monitor.take(lambda gpa=gpa: pmemsave(gpa))
    os.close(fd)
    Path(dump).unlink()
    batch = min(BATCH, count)
    yield Line("memory", "read 8 bytes", "us", ours, "os.pread", plain)
    yield Line("memory", "read 8 bytes", "us", ours, "QMP pmemsave", monitor)
    yield Line("memory", f"readv of {batch}, each", "us", many, "os.pread", singly)
    yield Line("memory", f"readv of {batch}, each", "us", many, "QMP pmemsave", monitor)
