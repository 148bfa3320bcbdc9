"""The control room: what people and programs on this host ask of a running appliance, and the book of bans.

A unix socket (``control``) takes requests, ``room`` answers them, and each guest's own thread carries out what concerns
it (``desk``, ``mailbox``). Bans outlive a restart (``bans``, ``banning``, ``banfile``).
"""

from appliance.respond.banning import Banning
from appliance.respond.control import ControlServer, ControlTaken
from appliance.respond.desk import GuestDesk, GuestStatus, HeldFlow
from appliance.respond.mailbox import Mailbox, NoAnswer
from appliance.respond.never import host_addresses, spare
from appliance.respond.place import control_path, run_dir
from appliance.respond.room import ControlRoom, Words

__all__ = [
    "Banning",
    "ControlRoom",
    "ControlServer",
    "ControlTaken",
    "GuestDesk",
    "GuestStatus",
    "HeldFlow",
    "Mailbox",
    "NoAnswer",
    "Words",
    "control_path",
    "host_addresses",
    "run_dir",
    "spare",
]
