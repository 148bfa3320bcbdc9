"""A guest whose memory this host cannot read is listed with the reason, and has no route to its memory."""

import platform
import shutil
import subprocess

import pytest

from appliance.errors import UsageError
from appliance.hosts.arguments import parse_arguments
from appliance.hosts.qemu import find_guest
from appliance.hosts.unreadable import emulated, explain_encryption, explain_unreadable
from appliance.routes import open_memory

SEV = "sev-guest,id=sev0,cbitpos=47,reduced-phys-bits=1"


def notes(*words: str, target: str = "x86_64") -> list[str]:
    return list(explain_unreadable(parse_arguments(["qemu-system-x86_64", *words]), target))


@pytest.mark.parametrize(
    ("machine", "thing", "name"),
    [
        ("q35,confidential-guest-support=sev0", SEV, "AMD SEV)"),
        ("q35,memory-encryption=sev0", SEV, "AMD SEV)"),
        ("q35,confidential-guest-support=sev0", f"{SEV},policy=0x5", "AMD SEV-ES)"),
        ("q35,confidential-guest-support=sev0", f"{SEV},policy=1", "AMD SEV)"),
        ("q35,confidential-guest-support=sev0", "sev-snp-guest,id=sev0,policy=0x30000", "AMD SEV-SNP)"),
        ("q35,confidential-guest-support=tdx", '{"qom-type":"tdx-guest","id":"tdx"}', "Intel TDX)"),
        ('{"type":"q35","confidential-guest-support":"tdx"}', '{"qom-type":"tdx-guest","id":"tdx"}', "Intel TDX)"),
        ("q35,confidential-guest-support=lsec0", "other-guest,id=lsec0", "other-guest)"),
        ("q35,confidential-guest-support=lsec0", SEV, "lsec0)"),
    ],
)
def test_memory_that_is_encrypted_is_named_by_what_encrypts_it(machine, thing, name) -> None:
    (note,) = notes("-machine", machine, "-object", thing)
    assert f"its memory is encrypted ({name}" in note
    assert "only its packets are watched" in note


def test_libvirts_names_say_the_same() -> None:
    for ours, theirs in (("sev", "sev-guest"), ("sev-snp", "sev-snp-guest"), ("tdx", "tdx-guest")):
        assert explain_encryption(ours) == explain_encryption(theirs)


def test_an_object_that_the_machine_does_not_use_encrypts_nothing() -> None:
    assert notes("-machine", "q35", "-object", SEV) == []
    assert notes() == []


def test_a_guest_of_another_kind_of_processor_is_watched_by_its_packets() -> None:
    (note,) = notes("-machine", "virt", target="aarch64")
    assert note.startswith("it emulates aarch64: ")


@pytest.mark.parametrize(
    ("executable", "target"),
    [
        ("/usr/bin/qemu-system-aarch64", "aarch64"),
        ("qemu-system-x86_64-spice", "x86_64"),
        ("/opt/qemu-system-riscv64-9.1", "riscv64"),
        ("qemu-system-i386", "i386"),
        ("/usr/libexec/qemu-kvm", platform.machine()),
        ("kvm", platform.machine()),
    ],
)
def test_what_a_qemu_emulates_is_told_by_its_name(executable, target) -> None:
    assert emulated(executable) == target


@pytest.mark.parametrize(
    ("name", "words", "why"),
    [
        ("qemu-system-x86_64", ["-machine", "q35,confidential-guest-support=sev0", "-object", SEV], "AMD SEV"),
        ("qemu-system-aarch64", ["-machine", "virt"], "emulates aarch64"),
    ],
)
def test_a_running_guest_that_cannot_be_read_is_listed_without_a_route(tmp_path, name, words, why) -> None:
    """A shell by the name of a QEMU: this host's own could not run such a guest."""
    shutil.copy("/bin/sh", tmp_path / name)
    with subprocess.Popen(
        [tmp_path / name, "-c", "echo; read line", *words, "-nodefaults"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()  # in the middle of its exec it has no command line
        guest = find_guest(process.pid)
        process.stdin.close()
    assert guest.routes == ()
    assert any(why in note for note in guest.notes)
    with pytest.raises(UsageError, match="only its packets can be watched"):
        open_memory(guest)
