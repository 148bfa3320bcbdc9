"""The full walk: every connection with its processes, against drgn and volatility3 on the same guest.

The peers list the sockets behind all descriptors, with pid and name. Ours also walks the kernel's hash tables (so
TIME_WAIT and SYN_RECV are in it), describes every process fully and re-validates what it found. drgn is measured twice:
as documented, on physical memory; and at its best, with the direct map that only our attach knows, but for all that a
snapshot tells.
"""

from collections.abc import Iterator
from pathlib import Path

from appliance.guest.attach import attach
from appliance.guest.linux.eye import LinuxEye
from plugins.parasight.isf import make_isf
from tests.against import drgn_reader
from tests.against.volatility import Volatility, write_isf
from tests.bench.lab import Lab, say
from tests.bench.measure import Sample, interleave, settled
from tests.bench.report import Line


def same_answer(prog) -> object:
    """What of our snapshot drgn can tell too: sockets by descriptor, those without one, processes described."""
    return (
        drgn_reader.list_sockets(prog),
        drgn_reader.count_states(prog),
        drgn_reader.describe_processes(prog),
    )


def run(lab: Lab) -> Iterator[Line]:
    crowd, sizes = lab.crowd(), lab.sizes
    kernel, types, symbols = crowd.kernel, crowd.types, crowd.symbols
    eye = crowd.eye

    documented = drgn_reader.open_program(kernel, types, symbols, paging="drgn")
    helped = drgn_reader.open_program(kernel, types, symbols, paging="linear")
    count = len(eye.read_snapshot().sockets)
    assert len(drgn_reader.list_sockets(documented)) > 0.8 * count, "drgn does not see the guest"
    what = f"{count:,} sockets"

    cold, cold_drgn = Sample(), Sample()
    for _ in range(min(5, sizes.rounds)):
        fresh = attach(crowd.memory, cache=False)
        with settled():
            cold.take(lambda fresh=fresh: LinuxEye(fresh).read_snapshot())
            cold_drgn.take(
                lambda: drgn_reader.list_sockets(drgn_reader.open_program(kernel, types, symbols, paging="drgn"))
            )
    yield Line("walk", f"{what}, cold", "ms", cold, "drgn", cold_drgn)

    with settled():
        ours, drgn, best = interleave(
            sizes.rounds,
            eye.read_snapshot,
            lambda: drgn_reader.list_sockets(documented),
            lambda: same_answer(helped),
        )
    yield Line("walk", f"{what}, warm", "ms", ours, "drgn", drgn, at_least=10, below=0.040)
    yield Line("walk", f"{what}, warm", "ms", ours, "drgn, our paging, all we tell", best)

    isf = write_isf(make_isf(types, symbols, kernel.image.va), Path(crowd.folder, "walk.json"))
    volatility = Volatility(kernel, isf)
    say("walk: volatility3 lists the sockets; this takes a while")
    again, slow = Sample(), Sample()
    with settled():
        for _ in range(3):
            again.take(eye.read_snapshot)
        rows = slow.take(lambda: volatility.run("sockstat"))
    with settled():
        for _ in range(3):
            again.take(eye.read_snapshot)
    assert len(rows) > 0.8 * count, "volatility3 does not see the guest"
    yield Line("walk", f"{what}, warm", "ms", again, "volatility3 sockstat", slow, at_least=100)
