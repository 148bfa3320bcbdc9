"""What stock Volatility 3 finds foreign on a machine made of bytes, the eye finds at the same places."""

from appliance.guest.windows.injection import Injection
from appliance.guest.windows.processes import Processes
from tests.against.windows_oracle import ask
from tests.guest.windows.machines import ALICE, kernel_of
from tests.worlds.windows import Machine

PLUGINS = ("malfind", "ldrmodules", "suspicious_threads", "hollowprocesses")


def test_whatever_stock_volatility_accuses_the_eye_accuses_and_no_other_process(tmp_path) -> None:
    with Machine("20348", path=tmp_path / "memory.raw") as machine:
        notepad = machine.process("notepad.exe", sid=ALICE, session=1)
        region, dll = machine.inject(notepad), machine.foreign_dll(notepad)
        hollow = machine.process("hollow.exe", sid=ALICE, session=1)
        place = machine.hollow(hollow)
        kernel = kernel_of(machine)
        processes, injection = Processes(kernel), Injection(kernel)
        found = {
            (process.pid, one.kind, one.address)
            for process in machine.truth().processes
            for one in injection.find(processes.describe(processes.read(process.va)))
            if one.weight > 1
        }
        machine.write_symbols(tmp_path)
        said = ask(tmp_path / "memory.raw", tmp_path, [f"malware.{name}" for name in PLUGINS])
    assert {pid for pid, _, _ in found} == {notepad.pid, hollow.pid}

    injected = {(row["PID"], row["Start VPN"]) for row in said["malware.malfind"]}
    assert injected == {(notepad.pid, region.start), (hollow.pid, place.start)}
    assert injected == {(pid, address) for pid, kind, address in found if kind == "injected-pe"}

    # Volatility lists every region with MZ, and the program's own, in whose place there is no image any more.
    unlisted = {(row["Pid"], row["Base"]) for row in said["malware.ldrmodules"] if not row["InLoad"]}
    assert unlisted == {(notepad.pid, dll.base), (notepad.pid, region.start)}
    assert {(pid, address) for pid, kind, address in found if kind == "unlisted-module"} == {(notepad.pid, dll.base)}

    threads = {(row["PID"], row["Address"]) for row in said["malware.suspicious_threads"]}
    assert threads == {(pid, address) for pid, kind, address in found if kind == "foreign-thread"}

    hollowed = {row["PID"] for row in said["malware.hollowprocesses"]}
    assert hollowed == {pid for pid, kind, _ in found if kind == "hollowed"} == {hollow.pid}
