"""What is found foreign in processes of machines made of bytes, and code to put there."""

from appliance.guest.windows.injection import Injection
from appliance.guest.windows.processes import Processes
from appliance.model import Evidence, GuestProcess
from tests.guest.windows.machines import kernel_of

NOTEPAD = "C:\\Windows\\System32\\notepad.exe"
PLAIN = b"\x90" * 64  # code that says nothing of itself
PEB_WALK = bytes.fromhex("65488b042560000000")


def described(machine, process) -> GuestProcess:
    processes = Processes(kernel_of(machine))
    return processes.describe(processes.read(process.va))


def look(machine, process) -> tuple[Evidence, ...]:
    return Injection(kernel_of(machine)).find(described(machine, process))


def kinds(found) -> list[tuple[str, int]]:
    return [(one.kind, one.weight) for one in found]


def only(found, kind: str) -> Evidence:
    matching = [one for one in found if one.kind == kind]
    assert len(matching) == 1, found
    return matching[0]


def heavy(found) -> list[Evidence]:
    return [one for one in found if one.weight > 1]


def change(machine, process, module, code: bytes, offset: int = 0x1200) -> int:
    return machine.hook(process, module, offset, code)
