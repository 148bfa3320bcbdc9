"""How much memory a Xen domain and dom0 may have: kept, and put back after what changes it (libvmi.py)."""

from __future__ import annotations

from pathlib import Path

from appliance.errors import GuestGone, HostError, UnreadableMemory
from appliance.xenctl import Control, Domain

DOM0 = 0


class MemoryLimits:
    """The limits of one domain and of dom0 as they were when this was made."""

    def __init__(self, domid: int, uuid: str | None = None, folder: Path | None = None) -> None:
        """Raises GuestGone: no such domain, or another one by now; HostError."""
        self._folder = folder
        with Control(folder) as control:
            found = [control.read_domain(number) for number in (domid, DOM0)]
        domain = found[0]
        if domain is None or domain.dying or (uuid is not None and domain.uuid != uuid.lower()):
            raise GuestGone(f"there is no Xen domain {domid}" + (f" with the UUID {uuid}" if uuid else ""))
        self.domain = domain
        self._found = [one for one in found if one is not None]

    def restore(self) -> tuple[Domain, ...]:
        """Put back what is no longer as it was, dom0 first; the domains for which that was needed. Raises HostError."""
        mended, trouble = [], None
        with Control(self._folder) as control:
            for before in reversed(self._found):
                try:
                    now = control.read_domain(before.domid)
                    if now is not None and now.uuid == before.uuid and now.max_pages != before.max_pages:
                        control.write_max_pages(before.domid, before.max_pages)
                        mended.append(now)
                except HostError as error:
                    trouble = trouble or error
        if trouble is not None:
            raise trouble
        return tuple(mended)

    def check_alive(self) -> None:
        """Raise GuestGone unless the same domain is there, UnreadableMemory where Xen does not tell."""
        try:
            with Control(self._folder) as control:
                now = control.read_domain(self.domain.domid)
        except HostError as error:
            raise UnreadableMemory(0, 0, str(error)) from None
        if now is None or now.dying or now.uuid != self.domain.uuid:
            raise GuestGone(f"Xen domain {self.domain.domid} has ended")
