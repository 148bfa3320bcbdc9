"""A listener of the benchmarks that is made of Python: ``python -m tests.bench.listen KIND IFNAME [MAC]``.

``kernel`` is ours: it says ``ready``, listens until SIGTERM, then prints what it saw as JSON.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import Counter


def kernel(ifname: str, mac: str) -> None:
    from appliance.flow.community import community_id
    from appliance.model import FlowEnded, GuestId, GuestPort
    from appliance.tap.bpf.tap import KernelTap

    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    tap = KernelTap(GuestId(f"port:{ifname}"), [GuestPort(ifname, mac)], time.time_ns, community_id=community_id)
    kinds: Counter[str] = Counter()
    packets = 0

    def count(events: list) -> None:
        nonlocal packets
        for event in events:
            kinds[type(event).__name__] += 1
            if type(event) is FlowEnded:
                packets += event.counts.packets_out + event.counts.packets_in

    print("ready", flush=True)
    while not stopped:
        count(tap.poll(0.1))
    count(tap.close())
    stats = tap.stats()
    said = {"seen": stats.packets, "flows": stats.flows, "lost": stats.lost, "recovered": tap.recovered}
    print(json.dumps({**said, "evicted": stats.evicted, "packets": packets, "events": kinds}), flush=True)


def scapy(ifname: str) -> None:
    from scapy.layers import inet, l2  # noqa: F401 (what a frame is made of)
    from scapy.sendrecv import sniff

    sniff(iface=ifname, store=False, prn=lambda _: None)


def nfstream(ifname: str) -> None:
    from nfstream import NFStreamer

    for _ in NFStreamer(source=ifname, n_dissections=20, idle_timeout=10, n_meters=1, statistical_analysis=False):
        pass


if __name__ == "__main__":
    {"kernel": kernel, "scapy": scapy, "nfstream": nfstream}[sys.argv[1]](*sys.argv[2:])
