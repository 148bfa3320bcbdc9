"""What other engines want of a kernel: all symbols as the guest's /proc/kallsyms says, the note for crash tools."""

from appliance.guest.kernel import Kernel


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
