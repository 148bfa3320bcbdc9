"""From a packet's tuple to the process, against engines that have to walk for it."""

import itertools
import random
from collections.abc import Iterator

from appliance.model import Direction, Endpoint, FiveTuple, Flow, FlowId, GuestId, Match, Snapshot
from tests.against import drgn_reader
from tests.bench.lab import Lab
from tests.bench.measure import Sample, settled
from tests.bench.report import Line

WALKS = 15


def run(lab: Lab) -> Iterator[Line]:
    crowd, sizes = lab.crowd(), lab.sizes
    eye = crowd.eye
    flows = connections(eye.read_snapshot())
    prog = drgn_reader.open_program(crowd.kernel, crowd.types, crowd.symbols, paging="linear")
    drgn_reader.list_sockets(prog)  # so that its types are made
    hits = sum(eye.find_owner(flow).match is Match.EXACT for flow in flows)
    assert hits >= 0.99 * len(flows), f"only {hits} of {len(flows)} connections have an owner"
    ours, walk, drgn = Sample(), Sample(), Sample()
    chosen = random.Random(1)
    with settled():
        for flow in itertools.islice(itertools.cycle(chosen.sample(flows, len(flows))), sizes.items):
            ours.take(lambda flow=flow: eye.find_owner(flow))
            if len(ours) % max(1, sizes.items // WALKS) == 0:
                walk.take(eye.read_snapshot)
                ends = [(end.ip, end.port) for end in (flow.tuple.local, flow.tuple.remote)]
                drgn.take(lambda ends=ends: drgn_reader.find_socket(prog, *ends))
    what = f"one of {len(flows):,} connections"
    yield Line("lookup", what, "us", ours, "drgn, until found", drgn, below=25e-6, note=f"{hits:,} exact at once")
    yield Line("lookup", what, "us", ours, "own full walk", walk)


def connections(snapshot: Snapshot) -> list[Flow]:
    """A flow for every connected socket that a process of the initial network namespace holds."""
    listening = {one.local.port for one in snapshot.sockets if one.state == "LISTEN"}
    home = snapshot.processes[0].netns
    found = []
    for number, one in enumerate(snapshot.sockets):
        if one.remote is not None and one.owners and one.netns == home:
            direction = Direction.IN if one.local.port in listening else Direction.OUT
            key = FiveTuple(one.protocol, on_the_wire(one.local), on_the_wire(one.remote))
            found.append(Flow(FlowId(GuestId("qemu:0"), number), key, direction, 0))
    return found


def on_the_wire(end: Endpoint) -> Endpoint:
    """Packets of a v4-mapped socket are IPv4."""
    return Endpoint(getattr(end.ip, "ipv4_mapped", None) or end.ip, end.port)
