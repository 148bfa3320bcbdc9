"""A listener of the benchmarks that is made of Python: ``python -m tests.bench.listen KIND IFNAME [MAC [hold|block]]``.

``kernel`` is ours: it says ``ready``, listens until SIGTERM, then prints what it saw as JSON.
"""

from __future__ import annotations

import json
import signal
import sys
import time


def kernel(ifname: str, mac: str, doing: str = "") -> None:
    """Ours. ``doing``: block every flow, or hold every new one, to be released at once; SIGUSR1 keeps them waiting."""
    from appliance.flow.community import community_id
    from appliance.model import FlowEnded, FlowId, FlowStarted, GuestId, GuestPort, HoldPolicy
    from appliance.tap.bpf.tap import KernelTap

    stopped: list[int] = []
    toggled: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    signal.signal(signal.SIGUSR1, lambda number, _: toggled.append(number))
    tap = KernelTap(GuestId(f"port:{ifname}"), [GuestPort(ifname, mac)], time.time_ns, community_id=community_id)
    if doing == "hold":
        tap.hold_new(HoldPolicy(deadline_s=3))
    kept: list[FlowId] | None = None
    told = packets = held = 0
    print("ready", flush=True)
    while True:
        last = bool(stopped)
        dropped = tap.dropped() if last else 0
        events = tap.close() if last else tap.poll(0.1)
        told += len(events)
        for event in events:
            if type(event) is FlowEnded:
                packets += event.counts.packets_out + event.counts.packets_in
            elif doing and type(event) is FlowStarted:
                if doing == "block":
                    tap.block(event.flow.id)
                elif event.held:
                    held += 1
                    if kept is None:
                        tap.release(event.flow.id)
                    else:
                        kept.append(event.flow.id)
        if last:
            break
        if toggled:
            toggled.clear()
            print("keeping" if kept is None else "releasing", flush=True)
            for flow in kept or ():
                tap.release(flow)
            kept = [] if kept is None else None
    stats = tap.stats()
    said = {
        "flows": stats.flows, "packets": packets, "lost": stats.lost, "recovered": tap.recovered, "held": held,
        "dropped": dropped, "events": told,
    }  # fmt: skip
    print(json.dumps(said), flush=True)


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
