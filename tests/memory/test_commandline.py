"""QEMU's command line, and where its machines put their RAM."""

import json
from itertools import pairwise

import pytest

from appliance.errors import HostError
from appliance.memory.commandline import Backend, parse_command_line, qemu_target
from appliance.memory.layout import above_start, below_4g, extents

GIB = 1 << 30
QEMU = "/usr/bin/qemu-system-x86_64"


def parse(*arguments):
    return parse_command_line([QEMU, *arguments])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1024", GIB), ("1G", GIB), ("1g", GIB), ("size=1024", GIB), ("size=1048576k", GIB), ("0.5G", GIB // 2),
        ("4096,slots=2,maxmem=8G", 4 * GIB), ("size=4G,slots=2,maxmem=8G", 4 * GIB), ("slots=2,size=2G", 2 * GIB),
        ("1T", 1024 * GIB), ("0x400", GIB), ("1048577k", (1 << 30) + 8192),
    ],
)  # fmt: skip
def test_the_size_of_ram_is_read_in_every_notation(text, size):
    assert parse("-m", text).ram_size == size


def test_without_a_size_ram_has_128_mib():
    line = parse()
    assert (line.ram_size, line.machine) == (128 << 20, "pc")
    assert line.blocks == (Backend("ram", "anonymous", 128 << 20, shared=False),)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (["-machine", "q35"], "q35"), (["-M", "pc"], "pc"), (["-machine", "type=pc-q35-7.2,accel=kvm"], "q35"),
        (["-M", "accel=tcg,type=pc-i440fx-8.1"], "pc"), (["-machine", "microvm,acpi=on"], "microvm"),
        (["--machine", "pc-q35-rhel9.2.0"], "q35"), (["-machine", "accel=kvm", "-machine", "q35"], "q35"),
    ],
)  # fmt: skip
def test_the_machine_is_read_in_every_notation(options, kind):
    assert parse(*options).machine == kind


def test_a_machine_we_cannot_map_is_refused_by_name():
    with pytest.raises(HostError, match="none"):
        parse("-M", "none")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("memory-backend-ram,id=m,size=1G", Backend("m", "anonymous", GIB, shared=False)),
        ("memory-backend-memfd,id=m,size=1G", Backend("m", "memfd", GIB, shared=True)),
        ("memory-backend-memfd,id=m,size=1G,share=off", Backend("m", "memfd", GIB, shared=False)),
        ("memory-backend-file,id=m,size=1073741824,mem-path=/a,,b,share", Backend("m", "file", GIB, True, "/a,b")),
        (
            json.dumps({"qom-type": "memory-backend-file", "id": "m", "mem-path": "/x", "share": True, "size": GIB}),
            Backend("m", "file", GIB, shared=True, path="/x"),
        ),
    ],
)
def test_a_memory_backend_is_read_in_both_notations(text, expected):
    line = parse("-m", "1G", "-object", text, "-machine", "q35,memory-backend=m")
    assert line.blocks == (expected,)


def test_numa_nodes_follow_their_numbers():
    objects = [part for name in "ab" for part in ("-object", f"memory-backend-ram,id={name},size=512M")]
    line = parse("-m", "1G", *objects, "-numa", "node,nodeid=1,memdev=a", "-numa", "node,nodeid=0,cpus=0,memdev=b")
    assert [block.id for block in line.blocks] == ["b", "a"]


def test_monitors_of_a_manager_are_left_alone():
    line = parse(
        "-qmp", "unix:/run/own.sock,server=on,wait=off",
        "-chardev", "socket,id=mine,path=/run/mine.sock,server=on,wait=off", "-mon", "chardev=mine,mode=control",
        "-chardev", "socket,id=charmonitor,fd=25,server=on,wait=off", "-mon", "chardev=charmonitor,mode=control",
        "-chardev", "socket,id=old,path=/var/lib/libvirt/qemu/d/m.sock,server=on", "-mon", "chardev=old,mode=control",
        "-chardev", "socket,id=human,path=/run/human.sock,server=on", "-mon", "chardev=human,mode=readline",
        "-qmp", "unix:/run/client.sock", "-qmp", "tcp:localhost:4444,server",
    )  # fmt: skip
    assert set(line.monitors) == {"/run/own.sock", "/run/mine.sock"}


def test_memory_devices_are_named_since_their_place_is_not_known():
    line = parse("-m", "1G,slots=1,maxmem=2G", "-device", "pc-dimm,id=d,memdev=m1", "-device", "virtio-net-pci")
    assert line.hotplug == ("m1",)


def test_names_of_libvirt_are_read():
    line = parse("-name", "guest=web,debug-threads=on", "-uuid", "11111111-2222-3333-4444-555555555555")
    assert (line.name, line.uuid) == ("web", "11111111-2222-3333-4444-555555555555")


@pytest.mark.parametrize("text", ["", "nonsense", "1Z", "-", "{}", ",,,"])
def test_a_size_that_is_none_is_a_host_error_or_the_default(text):
    try:
        assert parse("-m", text).ram_size >= 0
    except HostError as error:
        assert "memory size" in str(error)


@pytest.mark.parametrize(
    ("argv0", "exe", "target"),
    [
        ("qemu-system-x86_64", "/usr/bin/qemu-system-x86_64", "x86"), ("kvm", "/usr/libexec/qemu-kvm", "x86"),
        ("qemu-system-x86_64", "/usr/bin/qemu-system-x86_64 (deleted)", "x86"), ("x", "/opt/qemu-system-i386", "x86"),
        ("qemu-system-aarch64", "/usr/bin/qemu-system-aarch64", "aarch64"), ("bash", "/bin/bash", None),
        ("qemu-img", "/usr/bin/qemu-img", None), ("", "", None),
    ],
)  # fmt: skip
def test_a_qemu_is_known_by_its_program(argv0, exe, target):
    assert qemu_target(argv0, exe) == target


@pytest.mark.parametrize(
    ("machine", "size", "limit", "low"),
    [
        ("pc", 1 * GIB, None, 1 * GIB), ("pc", 0xE0000000 - 8192, None, 0xE0000000 - 8192),
        ("pc", 0xE0000000, None, 0xC0000000), ("pc", 5 * GIB, None, 0xC0000000), ("pc", 5 * GIB, "2G", 2 * GIB),
        ("pc", 3 * GIB, "4080M", 3 * GIB), ("q35", 1 * GIB, None, 1 * GIB), ("q35", 0xB0000000, None, 0x80000000),
        ("q35", 0xB0000000 - 8192, None, 0xB0000000 - 8192), ("q35", 5 * GIB, None, 0x80000000),
        ("q35", 5 * GIB, "1G", GIB), ("microvm", 4 * GIB, None, 0xC0000000), ("microvm", 3 * GIB, None, 0xC0000000),
    ],
)  # fmt: skip
def test_ram_is_split_below_4_gib_as_qemu_does(machine, size, limit, low):
    line = parse("-m", f"{size >> 10}k", "-M", f"{machine},max-ram-below-4g={limit}" if limit else machine)
    assert below_4g(line) == low
    runs = extents(line)
    assert sum(run.size for run in runs) == size - 0x60000
    assert [run.gpa for run in runs] == [0, 0x100000, 1 << 32][: len(runs)]
    assert all(one.offset + one.size <= two.offset for one, two in pairwise(runs))


def test_ram_that_would_reach_the_hypertransport_hole_moves_up_on_amd():
    line = parse("-m", "1100G", "-M", "q35")
    assert (above_start(line, amd=False), above_start(line, amd=True)) == (1 << 32, 1 << 40)
    assert above_start(parse("-m", "64G"), amd=True) == 1 << 32


def test_a_name_that_looks_like_an_option_changes_nothing() -> None:
    found = parse_command_line(["qemu-system-x86_64", "-m", "64", "-name", "-m", "-uuid", "-x"])
    assert (found.name, found.uuid, found.ram_size) == ("-m", "-x", 64 << 20)
