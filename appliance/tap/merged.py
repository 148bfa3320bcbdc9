"""Several ports of one guest as one frame source: one descriptor to wait on, fair batches."""

from __future__ import annotations

import select
from collections.abc import Iterator, Sequence

from appliance.ports import Frame, FrameSource


class MergedSource:
    """The frames of all ``sources``, which must have descriptors. Exhausted when all of them are."""

    def __init__(self, sources: Sequence[FrameSource]) -> None:
        self._sources = tuple(sources)
        self._epoll = select.epoll()
        self._watched = {source.fileno(): source for source in self._sources}
        for descriptor in self._watched:
            self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLERR)

    def frames(self, timeout_s: float) -> Iterator[Frame]:
        """Wait at most ``timeout_s``, then yield one batch of each source that has frames."""
        ready = [descriptor for descriptor, _ in self._epoll.poll(max(0.0, timeout_s))]
        for descriptor in ready or list(self._watched):  # silence may mean that a port is gone: let each one look
            source = self._watched[descriptor]
            yield from source.frames(0)
            if source.exhausted:
                self._epoll.unregister(descriptor)
                del self._watched[descriptor]

    @property
    def exhausted(self) -> bool:
        """No source will deliver anything any more."""
        return all(source.exhausted for source in self._sources)

    def fileno(self) -> int:
        """The epoll descriptor: readable while any source has frames."""
        return -1 if self._epoll.closed else self._epoll.fileno()

    def lost(self) -> int:
        """What all sources lost."""
        return sum(source.lost() for source in self._sources)

    def close(self) -> None:
        """Close all."""
        for source in self._sources:
            source.close()
        self._epoll.close()
