"""Attach: from RAM to the first question that can be asked, against what Volatility needs before its first row."""

from collections.abc import Iterator
from pathlib import Path

from appliance.guest.attach import attach
from appliance.guest.linux.eye import LinuxEye
from tests.against.btf import Btf
from tests.against.isf import make_isf
from tests.against.symbols import read_symbols
from tests.against.volatility import Volatility, write_isf
from tests.bench.lab import Lab, say
from tests.bench.measure import Sample, settled
from tests.bench.report import Line

PEER = "volatility3: make and load ISF"


def run(lab: Lab) -> Iterator[Line]:
    crowd = lab.crowd()
    vcpus = crowd.memory.vcpus()
    cache = Path(crowd.folder, "profiles")
    cache.mkdir(exist_ok=True)
    scanned, pointed, warm, volatility, load = (Sample() for _ in range(5))
    isf = Path(crowd.folder, "kernel.json")

    def ours(**hints: object) -> LinuxEye:
        return LinuxEye(attach(crowd.memory, **hints))

    def make() -> Path:
        kernel = crowd.kernel
        return write_isf(make_isf(Btf(kernel.types.blob), read_symbols(kernel), kernel.image.va), isf)

    ours(cache_dir=cache)  # fills it
    with settled():
        for number in range(lab.sizes.rounds):
            scanned.take(ours)
            pointed.take(lambda: ours(cr3=vcpus[0].cr3))
            warm.take(lambda: ours(cache_dir=cache))
            if number < lab.sizes.slow_rounds:
                say("attach: volatility3 makes and loads its symbols")
                volatility.take(lambda: (make(), Volatility(crowd.kernel, isf)))
                load.take(lambda: Volatility(crowd.kernel, isf))
    yield Line("attach", "cold, from RAM alone", "ms", scanned, PEER, volatility, below=1.0)
    yield Line("attach", "cold, with the vCPU's CR3", "ms", pointed, PEER, volatility, below=0.5)
    note = "" if any(cache.iterdir()) else "nothing was written to the cache: this is a cold attach"
    yield Line("attach", "warm, profile cache", "ms", warm, "volatility3: load ISF", load, below=0.1, note=note)
