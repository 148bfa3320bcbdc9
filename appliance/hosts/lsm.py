"""AppArmor and SELinux: by which label we run, and whether it may keep us from looking into a QEMU process.

An unconfined process of AppArmor may look into any other; a confined one needs a rule of its own profile and one of
QEMU's. SELinux decides by the two types, and by the boolean ``deny_ptrace`` for everybody.
Sources: apparmor.d(5) (ptrace rules), security/apparmor/ipc.c (profile_tracee_perm), security/selinux/hooks.c
(selinux_ptrace_access_check), the reference policy's ``deny_ptrace``, proc(5) (attr/current).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from appliance.model import Availability


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One thing that stands in the way, and the command that takes it away."""

    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Profile:
    """An AppArmor profile; ``unconfined`` is one, too."""

    name: str
    mode: str

    @property
    def free(self) -> bool:
        """Whether it keeps us from nothing."""
        return self.mode != "enforce"


def probe(root: Path) -> Iterator[Availability]:
    """One line for each module that this kernel uses."""
    profile = _apparmor(root)
    if profile is not None:
        by = "" if profile.name == "unconfined" else f" (profile {profile.name}, {profile.mode})"
        reason = f"we run {'unconfined' if profile.free else 'confined'}{by}"
        remedy = None if profile.free else f"where a guest cannot be read: aa-complain {profile.name}"
        yield Availability("apparmor", profile.free, reason, remedy, required=False)
    enforcing, label = _selinux(root), read_label(root, "self") or "unlabelled"
    if enforcing and _denies_ptrace(root):
        yield Availability("selinux", False, _DENIED.reason, _DENIED.remedy)
    elif enforcing is not None:
        reason = f"{'enforcing' if enforcing else 'permissive'}; we run as {label}"
        yield Availability("selinux", True, reason, required=False)


def find_obstacles(pid: int, root: Path) -> Iterator[Obstacle]:
    """What may keep us from looking into one process."""
    profile = _apparmor(root)
    if profile is not None and not profile.free:
        yield Obstacle(
            f"AppArmor confines us by the profile {profile.name}, QEMU by {read_label(root, pid) or 'none'}",
            f"aa-complain {profile.name}; or allow it: 'ptrace (read, trace) peer=libvirt-*,' in our profile, and "
            f"'ptrace (readby, tracedby) peer={profile.name},' in /etc/apparmor.d/abstractions/libvirt-qemu",
        )
    if _selinux(root):
        mine, its = read_label(root, "self") or "unlabelled", read_label(root, pid) or "unlabelled"
        yield (
            _DENIED
            if _denies_ptrace(root)
            else Obstacle(
                f"SELinux enforces: we are {mine}, QEMU is {its}",
                "ausearch -m avc -ts recent | audit2allow -M parasight && semodule -i parasight.pp",
            )
        )


def read_label(root: Path, pid: int | str) -> str | None:
    """The security label of a process, None where there is none."""
    for name in ("apparmor/current", "current"):
        if text := read_text(root / f"proc/{pid}/attr/{name}"):
            return text.rstrip("\0\n")
    return None


def read_text(path: Path) -> str | None:
    """A small text file without its last line end; None where there is none, or we may not."""
    try:
        return path.read_text("utf-8", "replace").rstrip("\n")
    except OSError:
        return None


_DENIED = Obstacle(
    "SELinux' boolean deny_ptrace is on: nobody may look into another process", "setsebool -P deny_ptrace off"
)


def _apparmor(root: Path) -> Profile | None:
    """Our own profile; None where AppArmor is not in use."""
    if read_text(root / "sys/module/apparmor/parameters/enabled") != "Y":
        return None
    label = read_label(root, "self") or "unconfined"
    found = re.fullmatch(r"(.*) \((\w+)\)", label)
    return Profile(found[1], found[2]) if found else Profile(label, "unconfined")


def _selinux(root: Path) -> bool | None:
    """Whether it enforces; None where it is not in use."""
    text = read_text(root / "sys/fs/selinux/enforce")
    return None if text is None else text == "1"


def _denies_ptrace(root: Path) -> bool:
    return (read_text(root / "sys/fs/selinux/booleans/deny_ptrace") or "0").startswith("1")
