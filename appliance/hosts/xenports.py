"""Where the network cards of a Xen domain end on this host, and which of them end elsewhere.

What lies below ``/local/domain/ID/device`` is written by the guest, so only the other end is believed.
Sources: docs/misc/xenstore-paths.pandoc, tools/libs/light/libxl_nic.c, tools/hotplug/Linux/vif-common.sh (names of
interfaces), xen/include/public/io/netif.h.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from appliance.hosts.netns import find_index
from appliance.hosts.switch import explain_switch, read_switch
from appliance.hosts.untappable import explain_device
from appliance.hosts.xenstore import XenStore
from appliance.model import GuestPort

VIFS: Final = "/local/domain/0/backend/vif"
_BACKEND: Final = re.compile(r"/local/domain/(\d+)/backend/vif/\d+/\d+")


def find_ports(store: XenStore, domid: int, notes: list[str]) -> Iterator[GuestPort]:
    """The interfaces behind the domain's cards, those that QEMU emulates last; ``notes`` gets what cannot be tapped."""
    numbers = {*store.names(f"/libxl/{domid}/device/vif"), *store.names(f"{VIFS}/{domid}")}
    emulated: list[GuestPort] = []
    for number in sorted((word for word in numbers if word.isdecimal()), key=int):
        backend = store.read(f"/libxl/{domid}/device/vif/{number}/backend") or f"{VIFS}/{domid}/{number}"
        owner = _BACKEND.fullmatch(backend)
        mac = store.read(f"/libxl/{domid}/device/vif/{number}/mac") or store.read(f"{backend}/mac")
        mac = mac.lower() if mac else None
        card = f"network card {number} ({mac or 'of an unknown address'})"
        if owner is None or int(owner[1]):
            other = int(owner[1]) if owner else None
            name = store.read(f"/local/domain/{other}/name")
            notes.append(
                f"{card} is served by the driver domain {name or other}: its packets do not cross this host; use a "
                "bridge of this domain, or watch in that one"
            )
            continue
        name = store.read(f"{backend}/vifname") or f"vif{domid}.{number}"
        found = [
            GuestPort(ifname, mac, ifindex=index)
            for ifname in (name, f"{name}-emu", f"tap{domid}.{number}")
            if (index := find_index(None, ifname)) is not None
        ]
        if not found:
            notes.append(f"{card} has no interface {name} here: its packets cannot be tapped")
        notes += [note for port in found if (note := _explain_port(port)) is not None]
        yield from found[:1]
        emulated += found[1:]
    yield from emulated


def _explain_port(port: GuestPort) -> str | None:
    return explain_switch(port, read_switch(None, port.ifindex)) if port.ifindex is not None else None


def explain_cards(store: XenStore, domid: int) -> Iterator[str]:
    """What PCI devices that were handed to the domain hide from us."""
    for number in store.names(f"/local/domain/0/backend/pci/{domid}"):
        path = f"/local/domain/0/backend/pci/{domid}/{number}"
        for name in store.names(path):
            if re.fullmatch(r"dev-\d+", name) and (note := explain_device(f"pci {store.read(f'{path}/{name}')}")):
                yield note
