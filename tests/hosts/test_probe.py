"""What a host lacks is named, with the command that mends it. Hosts are made of files; KVM is tried for real."""

import os

import pytest

from appliance.hosts import kvm, proc
from appliance.hosts.probe import describe_guests, probe_host, probe_kvm
from appliance.hosts.probe_libvirt import probe_libvirt
from appliance.hosts.probe_xen import is_xen, probe_xen
from appliance.model import GuestId, GuestInfo


def put(root, *paths, text=""):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


# -- KVM --


def test_a_host_without_kvm_runs_guests_under_emulation(tmp_path) -> None:
    line = probe_kvm(tmp_path)
    assert not line.ok
    assert not line.required
    assert "modprobe kvm_intel" in line.remedy


def test_kvm_is_believed_when_a_guest_ran_on_it(tmp_path) -> None:
    put(tmp_path, "dev/kvm")
    assert probe_kvm(tmp_path, trial=lambda device: "").ok
    line = probe_kvm(tmp_path, trial=lambda device: "it did not end")
    assert not line.ok
    assert line.reason == "/dev/kvm is there and does not work: it did not end"
    assert "-accel tcg" in line.remedy


def test_a_file_that_is_no_kvm_fails_the_trial(tmp_path) -> None:
    put(tmp_path, "dev/kvm")
    assert "Inappropriate ioctl" in probe_kvm(tmp_path).reason


def test_a_kvm_that_never_comes_back_is_given_up(tmp_path) -> None:
    assert kvm.run_trial(str(tmp_path / "kvm"), seconds=0.001) == (
        "a guest of three instructions did not end within 0.001 s"
    )


# What a real device answers differs from host to host; a host without one has nothing to ask.
@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm that may be opened")
def test_the_trial_on_this_hosts_kvm_ends_with_an_answer() -> None:
    why = kvm.run_trial(seconds=60)
    assert why == "" or why.startswith(("the guest ended with exit reason", "a guest of three"))


def test_on_xen_kvm_is_not_asked_for(tmp_path) -> None:
    put(tmp_path, "sys/hypervisor/type", text="xen\n")
    assert probe_kvm(tmp_path).ok


# -- guests --


def guest(pid, *notes, hypervisor="qemu"):
    return GuestInfo(GuestId(f"{hypervisor}:{pid}"), pid, notes=notes, hypervisor=hypervisor)


def test_guests_are_counted_by_hypervisor_and_what_cannot_be_seen_has_a_line() -> None:
    first, second, *rest = describe_guests([guest(1), guest(2, "slirp: use a tap"), guest(3, hypervisor="xen")])
    assert (first.ok, first.reason) == (True, "3 guests run here (2 of QEMU, 1 of Xen)")
    assert (second.name, second.ok, second.required, second.reason) == (
        "guest qemu:2",
        False,
        False,
        "slirp: use a tap",
    )
    assert rest == []


def test_a_host_without_guests_is_told_what_to_do() -> None:
    (line,) = describe_guests([])
    assert (line.ok, line.required, line.remedy) == (False, False, "start a guest; then: parasight guests")


def test_a_source_that_cannot_be_asked_is_a_trouble_of_the_list_of_guests() -> None:
    (line,) = describe_guests([guest(1)], ["libvirt does not answer"])
    assert not line.ok
    assert "libvirt does not answer" in line.reason


def test_a_thousand_notes_are_not_a_thousand_lines() -> None:
    lines = list(describe_guests([guest(pid, "no tap") for pid in range(1000)]))
    assert len(lines) == 26
    assert lines[-1].reason == "976 more notes"


def test_every_line_has_a_name_of_its_own(tmp_path) -> None:
    names = [one.name for one in probe_host(root=tmp_path)]
    assert len(names) == len(set(names))
    assert {
        "python",
        "host",
        "reading guests' memory",
        "yama",
        "packets",
        "namespaces",
        "guests",
        "libvirt",
        "kvm",
    } <= {*names}


# -- libvirt --


def libvirt(root, *, troubles=(), binding=True):
    return probe_libvirt(troubles, root, binding=binding)


def test_a_host_without_libvirt_needs_none(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("PARASIGHT_LIBVIRT_URI", raising=False)
    assert libvirt(tmp_path, binding=False).ok


def test_a_missing_binding_is_installed_by_one_command(tmp_path) -> None:
    line = libvirt(put(tmp_path, "run/libvirt/libvirt-sock"), binding=False)
    assert not line.ok
    assert "apt-get install python3-libvirt" in line.remedy
    assert "libvirt-dev pkg-config" in line.remedy


@pytest.mark.parametrize("daemon", ["libvirtd", "virtqemud"])
def test_a_daemon_that_does_not_run_is_started_by_one_command(tmp_path, daemon, monkeypatch) -> None:
    monkeypatch.delenv("PARASIGHT_LIBVIRT_URI", raising=False)
    line = libvirt(put(tmp_path, f"usr/sbin/{daemon}"))
    assert (line.ok, line.remedy) == (False, f"systemctl start {daemon}.socket")


@pytest.mark.parametrize(
    ("trouble", "remedy"),
    [
        ("libvirt (qemu:///system) does not answer: is its daemon stuck?", "systemctl restart virtqemud"),
        (
            "libvirt (qemu:///system) cannot be asked: Failed to connect socket: Permission denied",
            "usermod -aG libvirt",
        ),
        ("libvirt (qemu:///system) cannot be asked: authentication unavailable", "usermod -aG libvirt"),
        ("libvirt (qemu:///system) cannot be asked: No such file or directory", "systemctl start virtqemud.socket"),
    ],
)
def test_what_libvirt_complains_of_is_told_in_its_own_words_with_what_mends_it(tmp_path, trouble, remedy) -> None:
    put(tmp_path, "run/libvirt/virtqemud-sock", "usr/sbin/virtqemud")
    line = libvirt(tmp_path, troubles=[trouble])
    assert (line.ok, line.reason) == (False, trouble)
    assert line.remedy.startswith(remedy)


def test_a_socket_that_is_not_ours_to_write_to_needs_the_group(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("PARASIGHT_LIBVIRT_URI", raising=False)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write to every socket
    line = libvirt(put(tmp_path, "run/libvirt/libvirt-sock"))
    assert not line.ok
    assert "memory cannot be read" in line.reason
    assert "usermod -aG libvirt" in line.remedy


def test_a_daemon_that_answers_is_a_route(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("PARASIGHT_LIBVIRT_URI", raising=False)
    line = libvirt(put(tmp_path, "run/libvirt/virtqemud-sock"))
    assert (line.ok, line.reason) == (True, "/run/libvirt/virtqemud-sock answers")
    monkeypatch.setenv("PARASIGHT_LIBVIRT_URI", "test:///default")
    assert "test:///default" in libvirt(tmp_path).reason


# -- Xen --


@pytest.fixture
def dom0(tmp_path):
    put(tmp_path, "sys/hypervisor/type", text="xen\n")
    put(tmp_path, "sys/hypervisor/version/major", text="4\n")
    put(tmp_path, "sys/hypervisor/version/minor", text="17\n")
    put(tmp_path, "proc/xen/capabilities", text="control_d\n")
    return put(tmp_path, "dev/xen/privcmd", "run/xenstored/socket")


def test_a_host_without_xen_has_no_line_of_it(tmp_path) -> None:
    assert not is_xen(tmp_path)
    assert list(probe_xen(tmp_path)) == []


def test_a_control_domain_with_its_devices_is_ready(dom0) -> None:
    lines = list(probe_xen(dom0))
    assert [one.name for one in lines] == ["xen domain", "xen privcmd", "xenstore"]
    assert all(one.ok for one in lines)
    assert "Xen 4.17" in lines[0].reason


def test_a_control_domain_is_known_by_its_features_without_xenfs(dom0) -> None:
    (dom0 / "proc/xen/capabilities").unlink()
    put(dom0, "sys/hypervisor/properties/features", text="00002705\n")
    assert not next(probe_xen(dom0)).ok
    put(dom0, "sys/hypervisor/properties/features", text="00002f05\n")
    assert next(probe_xen(dom0)).ok


def test_a_guest_of_xen_is_not_the_place_to_look_from(dom0) -> None:
    put(dom0, "proc/xen/capabilities", text="\n")
    (line,) = probe_xen(dom0)
    assert not line.ok
    assert "run parasight in dom0" in line.remedy


@pytest.mark.parametrize(
    ("gone", "name", "remedy"),
    [
        ("dev/xen/privcmd", "xen privcmd", "modprobe xen-privcmd"),
        ("run/xenstored/socket", "xenstore", "xenstored.service"),
    ],
)
def test_what_a_control_domain_lacks_is_named(dom0, gone, name, remedy) -> None:
    (dom0 / gone).unlink()
    (line,) = [one for one in probe_xen(dom0) if not one.ok]
    assert (line.name, line.required) == (name, True)
    assert remedy in line.remedy


# -- processes --


def test_a_qemu_whose_executable_may_not_be_read_is_known_by_its_whole_name(tmp_path, monkeypatch) -> None:
    put(tmp_path, "7/exe")  # no link that could be read
    put(tmp_path, "7/comm", text="qemu-system-x86\n")  # as the kernel cuts it
    put(tmp_path, "7/cmdline", text="/usr/bin/qemu-system-x86_64\0-S\0")
    monkeypatch.setattr(proc, "PROC", tmp_path)
    assert proc.read_qemu(7) == "qemu-system-x86_64"
    (tmp_path / "7/cmdline").unlink()
    assert proc.read_qemu(7) == "qemu-system-x86"
