"""What keeps us from looking into a QEMU process is named, with the command that mends it. Hosts are made of files."""

import subprocess
import sys

import pytest

from appliance.hosts import confinement
from appliance.hosts.confinement import explain_refusal, has_capability, probe_confinement

PID = 4242
ALL, NONE, NO_PTRACE = "000001ffffffffff", "0000000000000000", "000001fffff7ffff"


@pytest.fixture
def host(tmp_path):
    """Write files of /proc and /sys; returns where they are."""

    def write(**files: str):
        for name, text in files.items():
            path = tmp_path / PATHS[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    write(status=f"Name:\tparasight\nSeccomp:\t0\nCapEff:\t{ALL}\n")
    return write


PATHS = {
    "status": "proc/self/status",
    "yama": "proc/sys/kernel/yama/ptrace_scope",
    "apparmor": "sys/module/apparmor/parameters/enabled",
    "selinux": "sys/fs/selinux/enforce",
    "deny_ptrace": "sys/fs/selinux/booleans/deny_ptrace",
    "lockdown": "sys/kernel/security/lockdown",
    "ours": "proc/self/attr/apparmor/current",
    "its": f"proc/{PID}/attr/apparmor/current",
    "our_context": "proc/self/attr/current",
    "its_context": f"proc/{PID}/attr/current",
}


def lines(root):
    return {one.name: one for one in probe_confinement(root)}


@pytest.mark.parametrize(
    ("scope", "capabilities", "ok"),
    [
        *((scope, ALL, scope != "3") for scope in "0123"),
        *((scope, NO_PTRACE, scope == "0") for scope in "0123"),
    ],
)
def test_yama_admits_whom_its_scope_says(host, scope, capabilities, ok) -> None:
    line = lines(host(yama=f"{scope}\n", status=f"CapEff:\t{capabilities}\n"))["yama"]
    assert line.ok == ok
    assert scope in line.reason
    assert (line.remedy is None) == ok


def test_scope_3_of_yama_needs_a_reboot_and_until_then_another_route(host) -> None:
    line = lines(host(yama="3\n"))["yama"]
    assert line.required
    assert "sysctl.d" in line.remedy
    assert "reboot" in line.remedy
    assert "--route libvirt" in line.remedy


def test_a_kernel_without_yama_is_no_obstacle(host) -> None:
    assert lines(host())["yama"].reason == "ptrace_scope is absent"


def test_a_capability_is_read_from_the_effective_set(host) -> None:
    root = host(status=f"CapPrm:\t{ALL}\nCapEff:\t{NO_PTRACE}\n")
    assert not has_capability(confinement.CAP_SYS_PTRACE, root)
    assert has_capability(confinement.CAP_SYS_ADMIN, root)
    assert not has_capability(confinement.CAP_SYS_ADMIN, root / "nowhere")


def test_this_process_may_read_its_own_memory() -> None:
    """Where a seccomp filter forbids it this fails, and so would every guest."""
    assert lines(confinement.ROOT)["seccomp"].ok


def test_a_seccomp_filter_that_lets_us_pass_is_told_and_no_obstacle(host) -> None:
    line = lines(host(status=f"CapEff:\t{ALL}\nSeccomp:\t2\n"))["seccomp"]
    assert line.ok
    assert "filter is active" in line.reason


FILTERED = """
import ctypes, struct
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER, NR, EPERM = 38, 22, 2, 310, 1  # 310: process_vm_readv on x86-64
code = [(0x20, 0, 0, 0), (0x15, 0, 1, NR), (0x06, 0, 0, 0x50000 | EPERM), (0x06, 0, 0, 0x7FFF0000)]
rules = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
program = ctypes.create_string_buffer(struct.pack("H6xQ", len(code), ctypes.addressof(rules)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
assert libc.prctl(PR_SET_SECCOMP, FILTER, ctypes.byref(program), 0, 0) == 0
from appliance.hosts.confinement import explain_refusal, probe_confinement
(line,) = [one for one in probe_confinement() if one.name == "seccomp"]
print(line.ok, line.required, line.reason, line.remedy, explain_refusal(1).reason, sep=chr(10))
"""


@pytest.mark.root("an obstacle before seccomp: the capability")
def test_a_seccomp_filter_that_forbids_the_call_is_found_by_trying() -> None:
    done = subprocess.run([sys.executable, "-c", FILTERED], capture_output=True, text=True, timeout=60, check=True)
    ok, required, reason, remedy, why = done.stdout.splitlines()
    assert (ok, required) == ("False", "True")
    assert reason == why == "process_vm_readv is refused even on ourselves (Operation not permitted): a seccomp filter"
    assert "--cap-add SYS_PTRACE" in remedy


def test_without_a_security_module_there_is_no_line_of_one(host) -> None:
    assert lines(host()).keys() == {"yama", "seccomp"}


def test_an_unconfined_process_of_apparmor_may_look(host) -> None:
    for label in ("unconfined\n", "/usr/bin/parasight (complain)\n"):
        line = lines(host(apparmor="Y\n", ours=label))["apparmor"]
        assert line.ok
        assert line.remedy is None


def test_a_confined_process_of_apparmor_is_told_both_profiles_and_both_rules(host) -> None:
    root = host(apparmor="Y\n", ours="parasight (enforce)\n", its=f"libvirt-{PID} (enforce)\n")
    line = lines(root)["apparmor"]
    assert not line.ok
    assert not line.required  # its profile may have the rule
    obstacle = explain_refusal(PID, root)
    assert "profile parasight" in obstacle.reason
    assert f"libvirt-{PID} (enforce)" in obstacle.reason
    assert "aa-complain parasight" in obstacle.remedy
    assert "ptrace (read, trace) peer=libvirt-*," in obstacle.remedy
    assert "ptrace (readby, tracedby) peer=parasight," in obstacle.remedy


def test_an_apparmor_that_is_switched_off_is_none(host) -> None:
    assert "apparmor" not in lines(host(apparmor="N\n", ours="parasight (enforce)\n"))


def test_selinux_is_told_with_our_context(host) -> None:
    for enforce, word in (("1", "enforcing"), ("0", "permissive")):
        line = lines(host(selinux=enforce, our_context="system_u:system_r:unconfined_service_t:s0\0"))["selinux"]
        assert line.ok
        assert line.reason == f"{word}; we run as system_u:system_r:unconfined_service_t:s0"


def test_deny_ptrace_of_selinux_is_switched_off_by_one_command(host) -> None:
    root = host(selinux="1", deny_ptrace="1 1", our_context="u:r:t:s0")
    line = lines(root)["selinux"]
    assert (line.ok, line.required, line.remedy) == (False, True, "setsebool -P deny_ptrace off")
    assert explain_refusal(PID, root).remedy == line.remedy
    assert lines(host(deny_ptrace="0 0"))["selinux"].ok


def test_a_refusal_under_selinux_names_both_contexts_and_how_to_allow_it(host) -> None:
    root = host(selinux="1", our_context="u:r:parasight_t:s0", its_context="u:r:svirt_t:s0:c1,c2")
    obstacle = explain_refusal(PID, root)
    assert "parasight_t" in obstacle.reason
    assert "svirt_t" in obstacle.reason
    assert "audit2allow" in obstacle.remedy


def test_lockdown_does_not_hide_guests(host) -> None:
    for text, word, more in (
        ("[none] integrity confidentiality\n", "none", False),
        ("none [integrity] confidentiality\n", "integrity", False),
        ("none integrity [confidentiality]\n", "confidentiality", True),
    ):
        line = lines(host(lockdown=text))["lockdown"]
        assert line.ok
        assert line.reason.startswith(f"{word}: ")
        assert ("tc+perf" in line.reason) == more


def test_the_first_obstacle_is_the_capability(host) -> None:
    root = host(status=f"CapEff:\t{NONE}\n", yama="3\n", apparmor="Y\n", ours="parasight (enforce)\n")
    assert explain_refusal(PID, root).reason == "CAP_SYS_PTRACE is missing"
    assert "ptrace_scope is 3" in explain_refusal(PID, host(status=f"CapEff:\t{ALL}\n")).reason


def test_another_user_namespace_is_an_obstacle(host, tmp_path) -> None:
    for who, number in (("self", 1), (PID, 2)):
        (tmp_path / f"proc/{who}/ns").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"proc/{who}/ns/user").symlink_to(f"user:[{number}]")
    assert "another user namespace" in explain_refusal(PID, host()).reason


def test_what_nothing_explains_is_said_so(host) -> None:
    assert "nothing that we know of explains it" in explain_refusal(PID, host()).reason
