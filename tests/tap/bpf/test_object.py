"""The committed object is what its source says."""

import platform
import re
import shutil
import struct
import subprocess

import pytest

from appliance.errors import HostError
from appliance.tap.bpf import elf
from appliance.tap.bpf.layout import (
    EVENT,
    EVENT_COUNTS,
    EVENT_FLOW,
    EVENT_FRAME,
    EVENT_HEAD,
    FLOW,
    GLANCE,
    IGNORED,
    KEY,
    PORT,
    SIZES,
    STATS,
    SWEPT,
    VERDICT,
    Transport,
    build_specs,
)
from appliance.tap.bpf.loader import OBJECT, OBJECTS, OBSERVE, PROGRAMS, Loaded
from appliance.tap.bpf.syscalls import VerifierError, load_program

SOURCE = OBJECT.with_suffix(".c")
BUILT_WITH = "14.0"
FLAGS = ("-O2", "-target", "bpf", "-fno-jump-tables", "-Wall", "-Werror")


def include() -> str:
    return f"-I/usr/include/{platform.machine()}-linux-gnu"


@pytest.fixture
def clang() -> str:
    """`./run test` installs it, so that it is missing only where the tests are started by hand."""
    found = shutil.which("clang")
    assert found, "clang is missing: apt-get install clang"
    return found


@pytest.mark.root("bpf(2)")
@pytest.mark.parametrize("transport", Transport)
def test_the_objects_are_built_from_their_source(clang, tmp_path, transport) -> None:
    built = tmp_path / "built.o"
    defines = ["-DPERF_ARRAY"] if transport is Transport.PERF else []
    subprocess.run([clang, *FLAGS, *defines, include(), "-c", "-o", built, SOURCE], check=True, timeout=120)
    ours, theirs = elf.parse(OBJECTS[transport].read_bytes()), elf.parse(built.read_bytes())
    assert set(ours.programs) == set(theirs.programs) == {*PROGRAMS, *OBSERVE}
    version = subprocess.run([clang, "--version"], check=True, capture_output=True, text=True, timeout=10).stdout
    if f"version {BUILT_WITH}" in version:
        assert ours == theirs, "run clang as the head of the source says, and commit the object"
    Loaded(1024, 1 << 16, built, transport=transport, programs=(*PROGRAMS, *OBSERVE)).close()


def test_the_structures_are_as_long_as_in_the_source(clang, tmp_path) -> None:
    sizes = {"key": KEY, "flow": FLOW, "event": EVENT, "verdict": VERDICT, "port": PORT, "stats": STATS}
    values = {spec.name: spec for spec in build_specs(1024, 4096)}
    checks = [f'_Static_assert(sizeof(struct {name}) == {layout.size}, "{name}");' for name, layout in sizes.items()]
    checks += [
        f'_Static_assert(sizeof(struct {struct}) == {values[name].key_size}, "{name}");'
        for name, struct in (("peers4", "peer4"), ("peers6", "peer6"), ("macs", "mac"), ("fragments", "datagram"))
    ]
    checks += [
        f'_Static_assert(sizeof(struct scratch) == {values["scratch"].value_size}, "scratch");',
        f'_Static_assert(sizeof(struct noted) == {values["fragments"].value_size}, "noted");',
        f'_Static_assert(REASONS == {len(IGNORED)}, "reasons");',
    ]
    probe = tmp_path / "probe.c"
    probe.write_text("\n".join([f'#include "{SOURCE}"', *checks, ""]))
    subprocess.run([clang, *FLAGS, include(), "-fsyntax-only", probe], check=True, timeout=60)


@pytest.mark.parametrize("transport", Transport)
def test_the_programs_stay_within_what_old_kernels_take(transport) -> None:
    for program in elf.parse(OBJECTS[transport].read_bytes()).programs.values():
        assert len(program.instructions) // 8 <= 4096
        assert {name for _, name in program.maps} <= {spec.name for spec in build_specs(1024, 4096)}
    assert re.search(rb"GPL", elf.parse(OBJECT.read_bytes()).license)


def test_a_damaged_object_is_named(tmp_path) -> None:
    data = OBJECT.read_bytes()
    for broken in (b"", b"\x7fELF", data[:3000], bytes(200), data[:18] + b"\x3e" + data[19:]):
        with pytest.raises(ValueError, match="BPF object"):
            elf.parse(broken)
        path = tmp_path / "broken.o"
        path.write_bytes(broken)
        with pytest.raises(HostError, match="its object cannot be used"):
            Loaded(1024, 1 << 16, path)


@pytest.mark.parametrize("transport", Transport)
def test_an_object_that_was_built_for_other_structures_is_refused(tmp_path, transport) -> None:
    """Else it would load, and tell nothing."""
    data = OBJECTS[transport].read_bytes()
    ours = struct.pack(f"<{len(SIZES)}I", *SIZES)
    assert data.count(ours) == 1
    path = tmp_path / "older.o"
    path.write_bytes(data.replace(ours, struct.pack("<I", SIZES[0] + 8) + ours[4:]))
    with pytest.raises(HostError, match="built for other structures"):
        Loaded(1024, 1 << 16, path, transport=transport)


@pytest.mark.root("bpf(2)")
def test_the_verifier_is_quoted() -> None:
    exit_without_value = b"\x95" + bytes(7)
    with pytest.raises(VerifierError, match="R0 !read_ok"):
        load_program("bad", exit_without_value, b"GPL")


def test_the_parts_of_an_event_and_of_a_flow_are_read_from_where_they_lie():
    event = bytes(range(EVENT.size))
    all_of_it = EVENT.unpack(event)
    assert EVENT_HEAD.unpack_from(event) == tuple(all_of_it[i] for i in (0, 1, 2, 3, 4, 7, 10, 11, 12, 15))
    assert EVENT_FLOW.unpack_from(event) == tuple(all_of_it[i] for i in (6, 8, 9, 13, 14, 16, 18))
    assert EVENT_COUNTS.unpack_from(event) == all_of_it[19:23]
    assert EVENT_FRAME.unpack_from(event) == (all_of_it[17], all_of_it[23])
    flow = bytes(range(FLOW.size))
    swept = SWEPT.unpack(flow)
    assert GLANCE.size == FLOW.size and GLANCE.unpack(flow) == tuple(swept[i] for i in (0, 2, 7, 15))
