"""Capture files as a frame source: pcap and pcapng, for replay (``appliance.ports.FrameSource``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Final

from appliance.errors import ConfigError, UsageError
from appliance.tap.capture import Captured, CaptureFile
from appliance.tap.frame import SNAP, CapturedFrame
from appliance.tap.links import NO_MAC, to_ethernet
from appliance.tap.sides import Pair, Sides, read_pair

BATCH: Final = 256
GUESS_PACKETS: Final = 20_000  # how far into the file the guess of the guest's address looks


class PcapSource:
    """The frames of a capture file. ``local``: the guest's IP or MAC addresses; None: guess, see ``sides``.

    Raises UsageError when there is no such file, ConfigError when it is no capture or of an unknown link layer.
    A cut or corrupt file delivers what is before the damage; ``truncation`` then says where that is.
    """

    def __init__(self, path: str | Path, local: Iterable[str] | None = None) -> None:
        self._path = Path(path)
        self.skipped: dict[str, int] = {}  # packets that are none of the guest's, by reason
        try:
            self.sides = Sides(local, () if local is not None else self._pairs())
            self._file = self._path.open("rb")
        except FileNotFoundError as error:
            raise UsageError(f"there is no capture file {path}") from error
        except OSError as error:
            raise ConfigError(f"cannot read capture file {path}: {error.strerror}") from error
        except ValueError as error:
            raise UsageError(f"the guest's addresses for {path}: {error}") from error
        self._capture = CaptureFile(self._file, str(path))
        try:
            self._packets = self._open()
        except ConfigError:
            self._file.close()
            raise
        self.exhausted = False

    @property
    def truncation(self) -> str | None:
        """Where and why reading stopped before the end of the file; None when all of it was read."""
        return self._capture.truncation

    def frames(self, timeout_s: float) -> Iterator[CapturedFrame]:
        """Yield the next frames, at most a batch."""
        if self.exhausted:
            return
        batch = list(islice(self._packets, BATCH))
        if len(batch) < BATCH:
            self.close()
        for packet in batch:
            if (frame := self._convert(packet)) is not None:
                yield frame

    def fileno(self) -> int:
        """-1: there is nothing to wait for."""
        return -1

    def lost(self) -> int:
        """Always 0: a file does not say what its maker lost."""
        return 0

    def close(self) -> None:
        """Close the file."""
        self.exhausted = True
        self._file.close()

    def _open(self) -> Iterator[Captured]:
        """Read the first packet at once, so that a file that is no capture is refused at once."""
        packets = self._capture.packets()
        first = list(islice(packets, 1))
        for packet in first:
            if to_ethernet(packet.link_type, packet.data) is None:
                raise ConfigError(f"{self._path}: packets of link type {packet.link_type} are not supported")
        return chain(first, packets)

    def _convert(self, packet: Captured) -> CapturedFrame | None:
        found = to_ethernet(packet.link_type, packet.data)
        if found is None or len(found[0]) < 14:
            self._skip("runt" if found else f"link type {packet.link_type}")
            return None
        data, longer = found
        from_guest = self.sides.is_from_guest(data)
        if from_guest is None:
            self._skip("not the guest's")
            return None
        if not from_guest and self.sides.by_ip and not data[0] & 1:
            data = NO_MAC + data[6:]  # IP addresses decided: the MAC of whoever captured must not contradict them
        return CapturedFrame(packet.at_ns, from_guest, data[:SNAP], packet.wire_len + longer)

    def _skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def _pairs(self) -> Iterator[Pair]:
        """Who talks with whom in the first part of the file."""
        with self._path.open("rb") as file:
            for packet in islice(CaptureFile(file, str(self._path)).packets(), GUESS_PACKETS):
                found = to_ethernet(packet.link_type, packet.data)
                if found is not None and (pair := read_pair(found[0])) is not None:
                    yield pair
