"""What kind of interface a port is, as rtnetlink names it (``ip -d link``): "tun", "veth", "macvtap"."""

from __future__ import annotations

from typing import Final

from appliance.rtnetlink import IFLA_INFO_KIND, parse_info, read_link

# Guests whose frames leave through the interface itself: tap_get_user() hands them to dev_queue_xmit(), and frames to
# the guest come in by the lower device's rx_handler (drivers/net/tap.c, drivers/net/macvlan.c, drivers/net/ipvlan/).
INSIDE_OUT: Final = frozenset({"macvtap", "ipvtap"})


def sends_outwards(kind: str | None) -> bool:
    """Whether PACKET_OUTGOING on such a port is what the guest sends.

    On a tap, vnet or vif the host sends out what is for the guest; on a macvtap it is the other way round. So says
    the kernel's source, and so does a live macvtap; an ipvtap was not tried.
    """
    return kind in INSIDE_OUT


def read_kind(index: int) -> str | None:
    """The kind of an interface of the calling thread's namespace, None where it has none or that cannot be asked."""
    try:
        return parse_info(read_link(index), IFLA_INFO_KIND)
    except OSError:
        return None
