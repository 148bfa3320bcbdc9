"""From the word at the command line to a guest: what a word may mean."""

import pytest

from appliance.errors import UsageError
from appliance.hosts.inventory import Inventory
from appliance.hosts.targets import resolve
from appliance.model import GuestId, GuestInfo


class Source:
    """A hypervisor with guests that are made up."""

    name = "made up"

    def __init__(self, *guests):
        self.guests = list(guests)

    def find_guests(self):
        return self.guests

    def fileno(self):
        return -1

    def changes(self):
        return ()

    def close(self):
        pass


def domain(domid, name):
    uuid = f"00000000-0000-0000-0000-{domid:012}"
    return GuestInfo(GuestId(f"xen:{domid}", uuid, name, f"xen-{uuid}-{domid}"), domid=domid, hypervisor="xen")


def test_digits_behind_xen_are_a_domid_and_never_a_name():
    source = Source(domain(5, "web"), domain(9, "5"))
    with Inventory([source]) as inventory:
        assert resolve("xen:5", inventory).domid == 5
        source.guests.pop(0)
        with pytest.raises(UsageError, match="no running guest 'xen:5'"):
            resolve("xen:5", inventory)
        assert resolve("5", inventory).domid == resolve("xen:9", inventory).domid == 9
