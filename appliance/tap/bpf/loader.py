"""Makes the maps and loads the programs. What this host can do is tried, never derived from a version."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from appliance.errors import HostError, PermissionRefused
from appliance.model import Availability
from appliance.tap.bpf import elf
from appliance.tap.bpf.layout import SIZES, Transport, build_specs
from appliance.tap.bpf.syscalls import Map, count_cpus, load_program, raise_memlock

OBJECT: Final = Path(__file__).with_name("parasight_tap.bpf.o")
OBJECTS: Final = {Transport.RING: OBJECT, Transport.PERF: OBJECT.with_name("parasight_tap_perf.bpf.o")}
MAX_FLOWS: Final = 131072
RING_BYTES: Final = 8 << 20
PROGRAMS: Final = ("from_guest", "to_guest", "inject")  # on the hooks of a port; run by us
OBSERVE: Final = ("observe",)  # on a packet socket


class Loaded:
    """Maps and programs of one tap; they live until the last descriptor and the last filter are gone."""

    def __init__(
        self,
        max_flows: int = MAX_FLOWS,
        ring_bytes: int = RING_BYTES,
        path: Path | None = None,
        *,
        transport: Transport = Transport.RING,
        programs: tuple[str, ...] = PROGRAMS,
    ) -> None:
        """Raises PermissionRefused and HostError; the text holds the verifier's words."""
        if sys.byteorder != "little":
            raise HostError("the kernel tap is built for little-endian hosts only")
        raise_memlock()
        self.maps: dict[str, Map] = {}
        self.programs: dict[str, int] = {}
        with ExitStack() as undo:
            undo.callback(self.close)
            what = "its object"
            try:
                code = elf.parse((path or OBJECTS[transport]).read_bytes())
                if code.sizes != SIZES:
                    raise ValueError("it was built for other structures than layout.py has")
                for spec in build_specs(max_flows, ring_bytes, transport, count_cpus()):
                    what = f"map {spec.name}"
                    self.maps[spec.name] = Map(
                        spec.name, spec.kind, spec.key_size, spec.value_size, spec.entries, spec.flags
                    )
                descriptors = {name: made.fd for name, made in self.maps.items()}
                for name in programs:
                    what = f"program {name}"
                    program = code.programs[name]
                    self.programs[name] = load_program(name, program.link(descriptors), code.license, program.kind)
            except OSError as error:
                raise _explain(error, what) from error
            except (ValueError, KeyError) as error:
                raise HostError(f"kernel tap: {what} cannot be used: {error}") from error
            undo.pop_all()

    def close(self) -> None:
        """Give all descriptors back; attached programs go on."""
        for fd in self.programs.values():
            os.close(fd)
        self.programs.clear()
        for made in self.maps.values():
            made.close()


def probe() -> Availability:
    """Whether the kernel tap loads here: found out by loading it, small."""
    name = "kernel tap (tc, eBPF)"
    try:
        Loaded(max_flows=1024, ring_bytes=1 << 16).close()
    except PermissionRefused as error:
        return Availability(name, False, str(error), "run as root, or grant CAP_BPF and CAP_NET_ADMIN", required=False)
    except HostError as error:
        return Availability(name, False, str(error), "the packet socket is used instead", required=False)
    return Availability(name, True, "maps and programs load", required=False)


def _explain(error: OSError, what: str) -> HostError:
    if error.errno == errno.EPERM:
        return PermissionRefused(f"kernel tap: {what}: CAP_BPF and CAP_NET_ADMIN are needed; run as root")
    if error.errno == errno.ENOMEM:
        return HostError(f"kernel tap: {what}: no kernel memory (RLIMIT_MEMLOCK before Linux 5.11)")
    return HostError(f"kernel tap: {what}: {error.strerror or error}")
