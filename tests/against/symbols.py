"""All symbols of a kernel, decoded in one pass: from the raw tables in memory, or as the guest's /proc/kallsyms says.

The other engines want the whole table at once; the appliance looks up single names.
"""

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
        name = b"".join([tokens[code] for code in names[position : position + length]])[1:].decode()
        position += length
        found.setdefault(name, kernel.symbols.address(index))
    return found


def parse_kallsyms(text: str) -> dict[str, int]:
    """``/proc/kallsyms`` without the modules' symbols."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        address, _, name, *module = line.split()
        if not module:
            found.setdefault(name, int(address, 16))
    return found


def read_vmcoreinfo(kernel: Kernel, symbols: dict[str, int]) -> bytes:
    """The note that the kernel writes for crash tools (kernel/vmcore_info.c)."""
    size = kernel.u64(symbols["vmcoreinfo_size"])
    return kernel.read(kernel.u64(symbols["vmcoreinfo_data"]), min(size, 4096))
