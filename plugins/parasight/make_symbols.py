"""Makes the symbol file with which stock Volatility reads a Linux guest: ``python -m plugins.parasight.make_symbols``.

Arguments: ``qemu:PID`` or ``file:PATH``, and a folder, which ``vol -s`` then takes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .home import find_appliance


def main() -> None:
    """Entry of the command."""
    location, folder = sys.argv[1:]
    find_appliance()
    from appliance.guest.attach import attach  # noqa: PLC0415  found just now

    from .layer import open_memory  # noqa: PLC0415
    from .session import write_linux_isf  # noqa: PLC0415

    memory = open_memory(location)
    vcpus = memory.vcpus()
    print(write_linux_isf(attach(memory, cr3=vcpus[0].cr3 if vcpus else None), Path(folder)))


if __name__ == "__main__":
    main()
