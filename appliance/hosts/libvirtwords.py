"""What libvirt's states, reasons and events mean to us, by the names they have in its headers. Data only.

Source: libvirt include/libvirt/libvirt-domain.h (virDomainState and the reasons of each, virDomainEventType and the
details of each, virDomainEventID); the names are given without VIR_DOMAIN_ and VIR_DOMAIN_EVENT_.
"""

from __future__ import annotations

from typing import Final

from appliance.model import Change, GuestState

STATES: Final = {
    "RUNNING": GuestState.RUNNING,
    "PAUSED": GuestState.PAUSED,
    "PMSUSPENDED": GuestState.PAUSED,
    "CRASHED": GuestState.CRASHED,
}
REASONS: Final = {  # of a state, where the state alone misleads
    "PAUSED_CRASHED": GuestState.CRASHED,
    "PAUSED_MIGRATION": GuestState.INCOMING,
    "PAUSED_STARTING_UP": GuestState.INCOMING,
    "PAUSED_POSTCOPY": GuestState.INCOMING,
    "PAUSED_POSTCOPY_FAILED": GuestState.INCOMING,
    "RUNNING_POSTCOPY": GuestState.INCOMING,
    "RUNNING_POSTCOPY_FAILED": GuestState.INCOMING,
}
LIFECYCLE: Final = {
    "DEFINED": Change.DESCRIBED,
    "UNDEFINED": Change.DESCRIBED,
    "STARTED": Change.STARTED,
    "SUSPENDED": Change.PAUSED,
    "RESUMED": Change.RESUMED,
    "STOPPED": Change.ENDED,
    "PMSUSPENDED": Change.PAUSED,
    "CRASHED": Change.CRASHED,
}
DETAILS: Final = {  # told besides
    "STARTED_FROM_SNAPSHOT": Change.REVERTED,
    "RESUMED_FROM_SNAPSHOT": Change.REVERTED,
    "SUSPENDED_FROM_SNAPSHOT": Change.REVERTED,
    "RESUMED_MIGRATED": Change.MIGRATED,
    "RESUMED_POSTCOPY": Change.MIGRATED,
    "STOPPED_CRASHED": Change.CRASHED,
}
OTHERS: Final = {
    "REBOOT": Change.REBOOTED,
    "DEVICE_ADDED": Change.DEVICES,
    "DEVICE_REMOVED": Change.DEVICES,
    "METADATA_CHANGE": Change.DESCRIBED,
}
