"""A Windows guest with 1,000 connections in shared buckets: full walk, refresh, one packet to its owner, attaching.

The guest is made of bytes (tests/worlds/windows). The peer is stock volatility3's windows.netstat on the same memory,
with its layers, symbols and modules already built, so that only its own walk is timed; it follows no chains and finds
fewer.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from appliance.guest.windows.attach import attach
from appliance.guest.windows.eye import WindowsEye
from appliance.guest.windows.symbols import SymbolStore
from appliance.memory.file import open_file
from appliance.model import Direction, Endpoint, FiveTuple, Flow, FlowId, GuestId, Match, Transport
from tests.bench.lab import Lab, say
from tests.bench.measure import Sample, interleave, settled
from tests.bench.report import Line
from tests.worlds.windows import Machine

LOCAL, REMOTE, FIRST_PORT = "10.0.0.5", "198.51.100.7", 20_000
OFTEN = 50  # cheap looks in one round


def run(lab: Lab) -> Iterator[Line]:
    sizes = lab.sizes
    with tempfile.TemporaryDirectory(prefix="parasight-bench-") as folder:
        image = Path(folder, "win.raw")
        with Machine("20348", path=image) as machine:
            machine.write_symbols(folder)
            for number in range(sizes.sockets):
                owner = machine.all.all[3 + number % 10]
                machine.tcp(owner, (LOCAL, FIRST_PORT + number), (REMOTE, 443))
            say("windows: volatility3 builds its layers; this takes a while")
            netstat, construct = _volatility(image, Path(folder))
            yield from _lines(machine, image, Path(folder), netstat, construct, sizes.sockets, sizes.rounds)


def _lines(
    machine: Machine,
    image: Path,
    folder: Path,
    netstat: Callable[[], list[Any]],
    construct: Callable[[], object],
    count: int,
    rounds: int,
) -> Iterator[Line]:
    store = SymbolStore([folder], cache_dir=folder / "cache", share=None)
    memory = open_file(image)
    memory.live = True  # type: ignore[misc]  # it is: its maker can change it, and a live guest's memory is not swept
    eye = WindowsEye(attach(memory, symbols=store))
    snapshot = eye.read_snapshot()
    found = sum(socket.remote is not None and bool(socket.owners) for socket in snapshot.sockets)
    assert found == count, f"{found} of {count} connections"
    with settled():
        ours, listed = interleave(rounds, eye.read_snapshot, eye._network.walk)  # the latter is what netstat tells
        attached, constructed = interleave(rounds, lambda: attach(memory, symbols=store), construct)
        slow = Sample()
        for _ in range(2):
            rows = slow.take(netstat)
    note = f"ours finds {found:,}, the peer {len(rows):,}"
    what = f"{count:,} connections"
    peer = "volatility3 windows.netstat"
    yield Line("windows", f"{what} with owners", "ms", listed, peer, slow, at_least=100, below=0.025, note=note)
    what_else = f"{what}, full look: processes, ports, hidden ones too"
    yield Line("windows", what_else, "ms", ours, peer, slow, below=0.025)

    sockets = eye._network._sockets  # the refresh by itself is no question that anybody asks an eye
    refreshed = Sample()
    with settled():
        for _ in range(rounds):
            refreshed.take(lambda: [sockets.refresh_connections() for _ in range(OFTEN)], OFTEN)
    yield Line("windows", f"{what}, refresh, nothing new", "ms", refreshed, "a full walk", ours, below=0.002)

    def fresh() -> None:
        machine.tcp(machine["explorer.exe"], (LOCAL, fresh.port), (REMOTE, 443))

    fresh.port = FIRST_PORT + count
    changed = Sample()
    with settled():
        for _ in range(rounds):
            fresh()
            fresh.port += 1
            changed.take(sockets.refresh_connections)
    yield Line("windows", f"{what}, refresh, one new", "ms", changed, "a full walk", ours, below=0.002)

    flows = [_flow(FIRST_PORT + number) for number in range(min(count, OFTEN))]
    assert all(eye.find_owner(flow).match is Match.EXACT for flow in flows)
    looked = Sample()
    with settled():
        for _ in range(rounds):
            looked.take(lambda: [eye.find_owner(flow) for flow in flows], len(flows))
    yield Line("windows", "one packet to its owner", "us", looked, peer, slow, below=50e-6)
    yield Line("windows", "attach, symbols cached", "ms", attached, "volatility3, warm", constructed, below=0.2)
    memory.close()


def _flow(port: int) -> Flow:
    ends = Endpoint(ip_address(LOCAL), port), Endpoint(ip_address(REMOTE), 443)
    return Flow(FlowId(GuestId("bench"), port), FiveTuple(Transport.TCP, *ends), Direction.OUT, time.time_ns())


def _volatility(image: Path, symbols: Path) -> tuple[Callable[[], list[Any]], Callable[[], object]]:
    """Stock netstat on the image, ready to run; and what constructing it again costs."""
    import volatility3.symbols
    from volatility3 import framework
    from volatility3.framework import automagic, constants, contexts, plugins
    from volatility3.framework.interfaces.plugins import FileHandlerInterface
    from volatility3.plugins.windows import netstat

    constants.OFFLINE = True
    constants.CACHE_PATH = str(symbols / "vol-cache")
    constants.IDENTIFIERS_PATH = str(symbols / "vol-cache" / "identifier.cache")
    Path(constants.CACHE_PATH).mkdir(exist_ok=True)
    constants.SYMBOL_BASEPATHS.insert(0, str(symbols))
    volatility3.symbols.__path__ = constants.SYMBOL_BASEPATHS
    framework.import_files(volatility3.plugins, True)
    context = contexts.Context()
    available = automagic.available(context)
    context.config["automagic.LayerStacker.single_location"] = image.absolute().as_uri()

    def construct() -> Any:
        chosen = automagic.choose_automagic(available, netstat.NetStat)
        return plugins.construct_plugin(context, chosen, netstat.NetStat, "plugins", None, FileHandlerInterface)

    made = construct()

    def run_once() -> list[Any]:
        rows: list[Any] = []
        made.run().populate(lambda node, _: rows.append(node.values), None)
        return rows

    assert run_once(), "volatility3 does not see the guest"
    return run_once, construct
