"""A table of XP's tcpip.sys: an array of heads of singly linked chains, kept up to date.

A chain has no link back, so a torn one shows in its objects only: one that cannot be what it should be ends its chain,
and is counted. Every look reads the heads and all objects that are known in two batches, so that what changed in the
middle of a chain is seen as well; new objects cost one more batch for each step down the chains.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final, Generic, Protocol, TypeVar

from appliance.errors import UnreadableMemory
from appliance.guest.windows.space import AddressSpace
from appliance.guest.windows.xp_tables import Place

MAX_OBJECTS: Final = 65_536


class Linked(Protocol):
    """An object of a chain."""

    @property
    def va(self) -> int:
        """Its address."""
        ...

    @property
    def following(self) -> int:
        """The next one's address, 0 at the end."""
        ...

    @property
    def identity(self) -> tuple[object, ...]:
        """What makes it this very object, wherever it stands in its chain."""
        ...


Item = TypeVar("Item", bound=Linked)


class ChainTable(Generic[Item]):
    """The objects of one table. ``span`` says what to read of one, ``parse`` makes it, None where it cannot be one."""

    def __init__(
        self,
        space: AddressSpace,
        is_kernel: Callable[[int], bool],
        span: Callable[[int], tuple[int, int]],
        parse: Callable[[int, bytes], Item | None],
    ) -> None:
        self._space, self._is_kernel, self._span, self._parse = space, is_kernel, span, parse
        self._pointer = space.pointer_size
        self._seen: dict[int, tuple[bytes, Item]] = {}
        self.lost: list[tuple[int, str]] = []  # where a chain broke off in the last look, and why
        self._heads = b""  # as read in the last look; so are the objects' bytes
        self._spans: list[tuple[int, int]] = []
        self._raws: list[bytes] = []
        self._moved = False
        self.changes = 0  # counts looks that found something else than the one before

    def __iter__(self) -> Iterator[Item]:
        return (item for _, item in self._seen.values())

    def __contains__(self, va: int) -> bool:
        return va in self._seen

    def __len__(self) -> int:
        return len(self._seen)

    def look(self, place: Place) -> bool:
        """Read the table; whether its heads were the same before and after. Raises UnreadableMemory (the heads)."""
        span = (place.va, place.chains * self._pointer)
        before = self._read_heads(span)
        known = list(self._seen)
        read = self._space.readv(self._spans)
        if before == self._heads and read == self._raws and not self.lost:
            return True
        raws = dict(zip(known, read, strict=True))
        found: dict[int, tuple[bytes, Item]] = {}
        self.lost, self._moved = [], False
        pending = [head for (head,) in struct.iter_unpack("<I" if self._pointer == 4 else "<Q", before) if head]
        while pending:
            pending = self._step(pending, raws, found)
        if len(found) != len(self._seen) or any(va not in self._seen for va in found) or self._moved:
            self.changes += 1
        self._seen, self._heads = found, before
        self._spans = [self._span(va) for va in found]
        self._raws = [raw for raw, _ in found.values()]
        return self._read_heads(span) == before

    def settled(self) -> list[Item]:
        """The objects that still are what they were in the last look; all are read again."""
        kept = []
        for (before, item), raw in zip(self._seen.values(), self._space.readv(self._spans), strict=True):
            if raw == before:
                kept.append(item)
                continue
            now = self._parse(item.va, raw) if raw is not None else None
            if now is not None and now.identity == item.identity:
                kept.append(item)
        return kept

    def _step(
        self, pending: list[int], raws: dict[int, bytes | None], found: dict[int, tuple[bytes, Item]]
    ) -> list[int]:
        """One object of each chain; what follows them."""
        mask = 2 * self._pointer - 1  # blocks of the pool are aligned to its headers
        fresh = [va for va in pending if va not in raws and not va & mask and self._is_kernel(va)]
        if fresh:
            raws.update(zip(fresh, self._space.readv([self._span(va) for va in fresh]), strict=True))
        following = []
        for va in pending:
            raw = raws.get(va)
            if va in found:
                self.lost.append((va, "two chains run into each other, or one into itself"))
                continue
            if raw is None:
                self.lost.append((va, "a chain leads to what cannot be read"))
                continue
            if len(found) >= MAX_OBJECTS:
                self.lost.append((va, f"more than {MAX_OBJECTS} objects"))
                return []
            seen = self._seen.get(va)
            item = seen[1] if seen is not None and seen[0] == raw else self._parse(va, raw)
            if item is not None and seen is not None and item != seen[1]:
                self._moved = True
            if item is None:
                self.lost.append((va, "a chain leads to what it should not"))
                continue
            found[va] = raw, item
            if item.following:
                following.append(item.following)
        return following

    def _read_heads(self, span: tuple[int, int]) -> bytes:
        raw = self._space.readv([span])[0]
        if raw is None:
            raise UnreadableMemory(*span, "a table of tcpip.sys")
        return raw
