"""All symbols of a Linux kernel, decoded in one pass from the raw tables in its memory.

Engines that are not ours want the whole table at once; the appliance looks up single names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from appliance.guest.kernel import Kernel


def read_symbols(kernel: Kernel) -> dict[str, int]:
    """Every symbol of the image by name; of equal names the first."""
    tables = kernel.symbols.tables
    names, tokens = tables.names, tables.tokens
    found: dict[str, int] = {}
    position = 0
    for index in range(tables.count):
        length = names[position]
        position += 1
        if length >= 0x80:
            length = length & 0x7F | names[position] << 7
            position += 1
        name = b"".join([tokens[code] for code in names[position : position + length]])[1:].decode(errors="replace")
        position += length
        found.setdefault(name, kernel.symbols.address(index))
    return found
