"""The guest's own /etc/passwd, read from its page cache: user names for numbers.

From the root directory of process 1 down the dentry cache (include/linux/dcache.h), then through the file's page cache
(``address_space.i_pages``, an XArray: lib/xarray.c) and ``vmemmap`` to the pages. Whatever is not cached is not read:
names are a courtesy, never needed.
"""

from __future__ import annotations

from appliance.errors import GuestError
from appliance.guest.kernel import Kernel
from appliance.guest.linux.facts import Facts
from appliance.guest.linux.record import is_object

MAX_CHILDREN = 8192  # entries of one directory looked at
MAX_BYTES = 256 << 10
MAX_USERS = 16_384
MAX_NAME = 32  # useradd(8): LOGIN_NAME_MAX allows 256, Debian 32
PAGE = 4096
XA_CHUNK = 64  # include/linux/xarray.h: XA_CHUNK_SIZE
XA_DEPTH = 11  # 64 bits in steps of 6


class Passwd:
    """Reads user names of one guest."""

    def __init__(self, kernel: Kernel, facts: Facts) -> None:
        self._kernel = kernel
        self._dentry = facts.record("dentry")
        self._inode = facts.record("inode")
        self._root = facts.offset("fs.root.dentry")
        self._children = facts.offset("dentry.children")
        self._sibling = facts.offset("dentry.sibling")
        self._head = facts.find("address_space.xa_head")
        self._shift, self._slots = facts.find("xa_node.shift"), facts.find("xa_node.slots")
        self._page = facts.size("page")

    def read(self, fs: int) -> dict[int, str]:
        """User names by uid, as ``fs`` (a ``struct fs_struct``) sees /etc/passwd; empty when it is not cached."""
        try:
            dentry = self._kernel.u64(fs + self._root) if is_object(fs) else 0
            for name in (b"etc", b"passwd"):
                dentry = self._child(dentry, name)
            return _parse(self._content(dentry)) if dentry else {}
        except GuestError:
            return {}

    def _child(self, directory: int, wanted: bytes) -> int:
        """The dentry of that name in a directory, 0 when it is not in the dentry cache."""
        if not is_object(directory):
            return 0
        head = directory + self._children
        node, seen = self._kernel.u64(head), 0
        while is_object(node) and node != head and seen < MAX_CHILDREN:
            dentry = node - self._sibling
            _, size, name, hashed, inode = self._dentry.parse(self._kernel.read(*self._dentry.span(dentry)))
            if size == len(wanted) and hashed and inode and self._kernel.read(name, size) == wanted:
                return dentry
            node, seen = self._kernel.u64(node), seen + 1
        return 0

    def _content(self, dentry: int) -> bytes:
        inode = self._dentry.parse(self._kernel.read(*self._dentry.span(dentry)))[4]
        size, mapping, _ = self._inode.parse(self._kernel.read(*self._inode.span(inode)))
        size = min(size, MAX_BYTES)
        pages = [self._find_page(mapping, index) for index in range(-(-size // PAGE))]
        base, start = self._kernel.page_offset, self._kernel.vmemmap_base
        spans = [(base + (page - start) // self._page * PAGE, PAGE) if page else (0, 8) for page in pages]
        raws = self._kernel.readv(spans)
        return b"".join(
            raw if raw is not None and page else bytes(PAGE) for raw, page in zip(raws, pages, strict=True)
        )[:size]

    def _find_page(self, mapping: int, index: int) -> int:
        """``struct page`` of one page of a file, 0 when it is not cached (``xas_load``)."""
        if self._head is None or self._shift is None or self._slots is None:
            return 0
        entry, shift = self._kernel.u64(mapping + self._head), 64
        base = 0
        for _ in range(XA_DEPTH):
            if entry & 3 != 2 or entry < PAGE:  # no node: a page, a shadow entry or nothing
                break
            node = entry - 2
            shift = self._kernel.u8(node + self._shift)
            slot = index >> shift & (XA_CHUNK - 1)
            entry = self._kernel.u64(node + self._slots + 8 * slot)
            if entry & 3 == 2 and entry < PAGE:  # a sibling: the folio begins at another slot
                slot = entry >> 2
                if slot >= XA_CHUNK:
                    return 0
                entry = self._kernel.u64(node + self._slots + 8 * slot)
            base = (index >> shift & ~(XA_CHUNK - 1) | slot) << shift
        if entry & 3 or not is_object(entry) or (shift == 64 and index):
            return 0
        return entry + (index - base) * self._page


def _parse(content: bytes) -> dict[int, str]:
    users: dict[int, str] = {}
    for line in content.split(b"\n")[:MAX_USERS]:
        parts = line.split(b":")
        if len(parts) >= 4 and parts[2].isdigit() and len(parts[2]) <= 10:
            users.setdefault(int(parts[2]), parts[0][:MAX_NAME].decode("utf-8", "backslashreplace"))
    return users
