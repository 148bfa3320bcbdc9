"""Ports of a running guest that come and go while it is watched."""

from __future__ import annotations

from collections.abc import Callable

from appliance.errors import ParasightError
from appliance.model import GuestInfo, GuestPort
from appliance.tap.bpf.tap import KernelTap
from appliance.tap.watcher import PortWatcher

Tell = Callable[[str], None]
Latest = Callable[[], GuestInfo]
LOOKS = 3  # after a change: a port exists a moment before its guest holds it


class Plugging:
    """Keeps a tap on the ports that its guest has now. Used by the guest's thread."""

    def __init__(self, info: GuestInfo, tap: KernelTap, tell: Tell, latest: Latest) -> None:
        """``latest`` tells the guest as it is now. Raises UsageError, PermissionRefused, HostError."""
        self._info, self._tap, self._tell, self._latest = info, tap, tell, latest
        self._netns = info.ports[0].netns
        self._watcher = PortWatcher(self._netns)
        self._looks = 0
        self._said: str | None = None

    def look(self, *, changed: bool = False) -> None:
        """Once a second or so: follow what has changed. What cannot be followed is said once."""
        try:
            if self._watcher.changes() or changed:
                self._looks = LOOKS
            if self._looks:
                self._looks -= 1
                self._follow()
        except ParasightError as error:
            if self._said != str(error):
                self._said = str(error)
                self._tell(f"{self._info.id.target}: {error}")

    def _follow(self) -> None:
        now = self._latest()
        if now.id.instance != self._info.id.instance:
            return  # another guest by the same name: the watch of this one is about to end
        here = [port for port in now.ports if port.netns == self._netns]
        for port in self._tap.follow(here):
            self._tell(f"{self._info.id.target}: port {port.ifname} has come and is watched too")
        self._complain_of([port for port in now.ports if port not in here])

    def _complain_of(self, elsewhere: list[GuestPort]) -> None:
        for port in elsewhere:
            line = f"{self._info.id.target}: port {port.ifname} is in another network namespace: not watched"
            if line != self._said:
                self._said = line
                self._tell(line)

    def close(self) -> None:
        """Follow no more."""
        self._watcher.close()
