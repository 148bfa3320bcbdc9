"""One of the two who listen to a port in the tap benchmark: our tap and flow table, in a process of its own.

``python -m tests.bench.tapper NETNS IFNAME MAC``: says ``ready``, listens until SIGTERM, then prints what it saw.
"""

import json
import signal
import sys
import time

from appliance.flow.table import FlowTable
from appliance.flow.tracking import TrackedTap
from appliance.model import GuestId, GuestPort
from appliance.tap.af_packet import PortSource


def main(netns: str, ifname: str, mac: str) -> None:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    port = GuestPort(ifname, mac, netns)
    tap = TrackedTap(GuestId(f"port:{ifname}"), PortSource(port), FlowTable(GuestId("port:bench"), [mac]), time.time_ns)
    print("ready", flush=True)
    start = time.process_time()
    while not stopped:
        tap.poll(0.1)
    cpu_s = time.process_time() - start
    stats = tap.stats()
    print(json.dumps({"packets": stats.packets, "flows": stats.flows, "lost": stats.lost, "cpu_s": cpu_s}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
