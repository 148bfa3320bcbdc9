"""Guests whose memory this host cannot read, and what to do about it: they are watched by their packets.

Sources: QEMU qapi/qom.json (``sev-guest``, ``sev-snp-guest``, ``tdx-guest``, ``s390-pv-guest``, ``pef-guest``),
docs/system/confidential-guest-support.rst, docs/system/i386/amd-memory-encryption.rst (policy bit 2 asks for SEV-ES),
docs/system/i386/tdx.rst; libvirt docs/formatdomain.rst (``launchSecurity``).
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from typing import Final

from appliance.hosts.arguments import Arguments

_NAMES: Final = {  # by QEMU's object, or by libvirt's type of launchSecurity
    "sev": "AMD SEV",
    "sev-es": "AMD SEV-ES",
    "sev-snp": "AMD SEV-SNP",
    "tdx": "Intel TDX",
    "s390-pv": "IBM Secure Execution",
    "pef": "POWER PEF",
    "rme": "Arm CCA",
}
_X86: Final = re.compile(r"x86(_64)?|i386|amd64|i686")


def explain_unreadable(arguments: Arguments, target: str) -> Iterator[str]:
    """Yield why the guest's memory cannot be read, nothing where it can; ``target`` is what its QEMU emulates."""
    if _X86.fullmatch(target) is None:
        yield f"it emulates {target}: only the memory of x86 guests is understood; its packets are watched"
    if arguments.encryption is not None:
        yield explain_encryption(arguments.encryption)


def explain_encryption(kind: str) -> str:
    """Say what encrypts the guest's memory, by QEMU's name of it or by libvirt's."""
    name = _NAMES.get(kind.removesuffix("-guest"), kind)
    return (
        f"its memory is encrypted ({name}): this host cannot read it, its processes stay unknown and only its packets "
        "are watched; to see its processes, start it without launchSecurity (QEMU: confidential-guest-support)"
    )


def emulated(executable: str) -> str:
    """What a QEMU of this file name emulates: ``qemu-system-aarch64`` says so, ``kvm`` runs the host's own kind."""
    found = re.search(r"qemu-system-(\w+)", executable.rsplit("/", 1)[-1])
    return found[1] if found else platform.machine()
