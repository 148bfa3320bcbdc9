"""Attach: from RAM to the first question that can be asked, against what Volatility needs before its first row."""

import gc
from collections.abc import Iterator
from pathlib import Path

from appliance.guest.attach import attach
from appliance.guest.linux.eye import LinuxEye
from plugins.parasight.btf import Btf
from plugins.parasight.isf import make_isf
from plugins.parasight.symbols import read_symbols
from tests.against.volatility import Volatility, write_isf
from tests.bench.lab import Lab, say
from tests.bench.measure import Sample, settled
from tests.bench.report import Line

MAKE, LOAD = "volatility3: make and load ISF", "volatility3: load ISF"


def run(lab: Lab) -> Iterator[Line]:
    crowd = lab.crowd()
    cr3 = crowd.memory.vcpus()[0].cr3
    cache = Path(crowd.folder, "profiles")
    isf = Path(crowd.folder, "kernel.json")
    scanned, pointed, warm_scanned, warm, volatility, load = (Sample() for _ in range(6))

    def ours(**hints: object) -> LinuxEye:
        return LinuxEye(attach(crowd.memory, **hints))

    def make() -> Path:
        kernel = crowd.kernel
        return write_isf(make_isf(Btf(kernel.types.blob), read_symbols(kernel), kernel.image.va), isf)

    ours(cache_dir=cache)  # fills it
    with settled():
        for number in range(lab.sizes.rounds):
            scanned.take(lambda: ours(cache=False))
            pointed.take(lambda: ours(cr3=cr3, cache=False))
            warm_scanned.take(lambda: ours(cache_dir=cache))
            warm.take(lambda: ours(cr3=cr3, cache_dir=cache))
            if number < lab.sizes.slow_rounds:
                say("attach: volatility3 makes and loads its symbols")
                volatility.take(lambda: (make(), Volatility(crowd.kernel, isf)))
                load.take(lambda: Volatility(crowd.kernel, isf))
                gc.collect()
    yield Line("attach", "cold, from RAM alone", "ms", scanned, MAKE, volatility, below=1.0)
    yield Line("attach", "cold, with the vCPU's CR3", "ms", pointed, MAKE, volatility, below=0.5)
    yield Line("attach", "warm, from RAM alone", "ms", warm_scanned, LOAD, load)
    yield Line("attach", "warm, with the vCPU's CR3", "ms", warm, LOAD, load, below=0.1)
