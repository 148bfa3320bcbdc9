"""Which kind of switch a port belongs to, as rtnetlink names it (``ip -d link``): "bridge_slave", "openvswitch_slave".

Sources: rtnetlink(7), include/uapi/linux/if_link.h, ``rtnl_link_slave_info_fill`` in net/core/rtnetlink.c,
net/openvswitch/vport-internal_dev.c (the master of all its ports is of the kind "openvswitch"),
lib/netdev-offload-tc.c in Open vSwitch (the qdiscs and filters of its offload).
"""

from __future__ import annotations

from typing import Final

from appliance.hosts.netns import call_in
from appliance.model import GuestPort
from appliance.rtnetlink import IFLA_INFO_SLAVE_KIND, parse_info, read_link

OPEN_VSWITCH: Final = "openvswitch"


def explain_switch(port: GuestPort, kind: str | None) -> str | None:
    """What a port's switch may hide from us, None for nothing."""
    if kind != OPEN_VSWITCH:
        return None
    return (
        f"port {port.ifname} belongs to Open vSwitch: with other_config:hw-offload=true it owns the port's ingress, so "
        "connections can be observed only, and what a card forwards by itself does not cross the port; "
        "see: ovs-vsctl get Open_vSwitch . other_config:hw-offload"
    )


def read_switch(netns: str | None, index: int) -> str | None:
    """The kind of the switch that an interface is a port of; None: of none, or it cannot be asked."""
    try:
        return call_in(netns, lambda: parse_info(read_link(index), IFLA_INFO_SLAVE_KIND))
    except OSError:
        return None
