"""What is foreign in processes of a real guest: nothing in honest ones, and each trick where it was played."""

import contextlib
import hashlib
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from appliance.errors import GuestError
from appliance.guest.attach import attach
from appliance.guest.linux.eye import LinuxEye
from appliance.guest.linux.facts import Facts
from appliance.guest.linux.injection import Injection
from appliance.memory.qemu import open_qemu
from appliance.model import Evidence, GuestProcess, Region, VcpuState
from appliance.ports import GuestMemory
from lab.agent import Job
from lab.guest import Guest, boot
from lab.image import build
from lab.network import Network
from lab.world import SINK_PORT, World

pytestmark = pytest.mark.system

KERNELS = ("debian-12-cloud", "debian-12-cloud-6.12")

# Plays one trick on itself or on another process, says READY and where, and waits.
TRICKS = r"""
import ctypes, mmap, os, shutil, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
R, W, X, SHARED, PRIVATE, ANON = 1, 2, 4, 1, 2, 32
PAUSE = bytes.fromhex("b8220000000f05ebf7")  # again: mov $34, %eax; syscall; jmp again

def anonymous(prot, content):
    at = libc.mmap(None, 8192, R | W, PRIVATE | ANON, -1, 0)
    ctypes.memmove(at, content, len(content))
    assert libc.mprotect(at, 8192, prot) == 0
    return at

def rwx():
    return anonymous(R | W | X, b"\x90\xc3")

def rx():
    return anonymous(R | X, b"\x90\xc3")

def thread():
    at, thread = anonymous(R | X, PAUSE), ctypes.c_ulong()
    assert libc.pthread_create(ctypes.byref(thread), None, ctypes.c_void_p(at), None) == 0
    time.sleep(1)
    return at

def crowd():
    for number in range(60_000):
        libc.mmap(None, 4096, R | X | W * (number & 1), PRIVATE | ANON, -1, 0)
    for _ in range(100):
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    return 0

def memfd():
    fd = os.memfd_create("stage2")
    os.write(fd, b"\x90\xc3" + bytes(4094))
    return libc.mmap(None, 4096, R | X, PRIVATE, fd, 0)

def deleted():
    shutil.copy("/usr/lib/x86_64-linux-gnu/libz.so.1", "/opt/libcopy.so")
    library = ctypes.CDLL("/opt/libcopy.so")
    os.unlink("/opt/libcopy.so")
    keep.append(library)
    return ctypes.cast(library.crc32, ctypes.c_void_p).value

def writable():
    shutil.copy("/usr/lib/x86_64-linux-gnu/libz.so.1", "/opt/libwritable.so")
    fd = os.open("/opt/libwritable.so", os.O_RDWR)
    return libc.mmap(None, 8192, R | W | X, PRIVATE, fd, 0)

def poke():
    pid, address, byte = int(sys.argv[2]), int(sys.argv[3], 16), int(sys.argv[4], 16)
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(bytes([byte]))
    return address

def trace():
    assert libc.ptrace(0x4206, int(sys.argv[2]), None, None) == 0, ctypes.get_errno()  # PTRACE_SEIZE
    return 0

keep = []
at = globals()[sys.argv[1]]()
print(f"READY {at:x}", flush=True)
time.sleep(1000)
"""


@pytest.fixture(scope="module", params=KERNELS)
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    with Network() as network, World(network), boot(build(request.param), network, name="foreign") as booted:
        booted.put("/opt/tricks.py", TRICKS.encode())
        assert booted.run("/opt/demo/web.sh").returncode == 0
        yield booted


class Look:
    """An appliance attached to the guest."""

    def __init__(self, memory: GuestMemory) -> None:
        self.kernel = attach(memory)
        self.eye = LinuxEye(self.kernel)
        self.injection = Injection(self.kernel, Facts(self.kernel))

    def process(self, pid: int) -> GuestProcess:
        return next(one for one in self.eye.read_snapshot().processes if one.pid == pid)

    def find(self, pid: int) -> tuple[Evidence, ...]:
        return self.eye.find_foreign(self.process(pid))

    def maps(self, pid: int) -> list[tuple[int, int, str, str]]:
        memory, files = self.injection.read_map(self.process(pid))
        return [(v.start, v.end, v.protection, files[v.file].shown if v.file else v.label) for v in memory.vmas]


@pytest.fixture(scope="module")
def look(guest: Guest) -> Iterator[Look]:
    memory = open_qemu(guest.pid)
    yield Look(memory)
    memory.close()


@pytest.fixture
def trick(guest: Guest) -> Iterator[Callable[..., tuple[int, int]]]:
    jobs: list[Job] = []

    def play(*words: str) -> tuple[int, int]:
        """Start it; returns its pid and the address it speaks of."""
        job = guest.spawn(["/usr/bin/python3", "-S", "-E", "/opt/tricks.py", *words])
        jobs.append(job)
        job.wait_for("READY", 60)
        return job.pid, int(job.output.split()[1], 16)

    yield play
    for job in jobs:
        job.kill()


@pytest.fixture
def sleeper(guest: Guest) -> Iterator[int]:
    job = guest.spawn(["/usr/bin/python3", "-c", "import time; print('READY', flush=True); time.sleep(1000)"])
    job.wait_for("READY", 60)
    yield job.pid
    job.kill()


def truth(guest: Guest, pid: int) -> list[tuple[int, int, str, str]]:
    lines = [re.split(r"\s+", line, maxsplit=5) for line in guest.get(f"/proc/{pid}/maps").decode().splitlines()]
    ranges = [(*(int(part, 16) for part in line[0].split("-")), line[1], line[5].strip()) for line in lines]
    return [line for line in ranges if line[3] != "[vsyscall]"]  # the gate is no mapping of the process


def of_kind(found: Sequence[Evidence], kind: str) -> list[Evidence]:
    return [one for one in found if one.kind == kind]


def test_honest_processes_have_nothing_foreign(guest: Guest, look: Look, sleeper: int) -> None:
    everything = "import asyncio, ctypes, decimal, hashlib, json, ssl, sqlite3, threading, time, zlib"
    job = guest.spawn(["/usr/bin/python3", "-c", f"{everything}; print('READY', flush=True); time.sleep(1000)"])
    job.wait_for("READY", 60)
    processes = look.eye.read_snapshot().processes
    found = {f"{one.pid} {one.name}": look.eye.find_foreign(one) for one in processes}
    job.kill()
    assert len([one for one in processes if isinstance(one.path, str)]) >= 6
    assert {who: what for who, what in found.items() if what} == {}


def test_the_memory_map_equals_the_guests_own(guest: Guest, look: Look, sleeper: int) -> None:
    nginx = [one.pid for one in look.eye.read_snapshot().processes if one.name == "nginx"]
    for pid in (1, sleeper, *nginx):
        assert look.maps(pid) == truth(guest, pid)


def test_a_map_of_many_mappings_equals_the_guests_own(guest: Guest, look: Look) -> None:
    many = "import mmap, time; m = [mmap.mmap(-1, 8192, prot=1 + 2 * (i & 1)) for i in range(3000)]"
    job = guest.spawn(["/usr/bin/python3", "-c", f"{many}; print('READY', flush=True); time.sleep(1000)"])
    job.wait_for("READY", 60)
    mine, its = look.maps(job.pid), truth(guest, job.pid)
    job.kill()
    assert len(its) > 1000
    assert mine == its


def test_expressions_compiled_by_pcre_are_unusual_and_no_more(guest: Guest, look: Look) -> None:
    config = guest.get("/opt/demo/nginx.conf").decode().replace("/run/nginx.pid", "/run/pcre.pid")
    config = config.replace("80", "8080").replace("events", "pcre_jit on; events")
    config = config.replace("root /opt", "location ~ ^/a(b|c)+d$ { return 204; } root /opt")
    guest.put("/opt/pcre.conf", config.encode())
    assert guest.run("/usr/sbin/nginx -c /opt/pcre.conf").returncode == 0
    found = look.find(int(guest.get("/run/pcre.pid")))
    guest.run("kill $(cat /run/pcre.pid)")
    assert [(one.kind, one.weight) for one in found] == [("anon-exec", 1)]
    assert "PCRE" in found[0].claim


@pytest.mark.parametrize(("name", "protection"), [("rwx", "rwxp"), ("rx", "r-xp")])
def test_executable_memory_of_no_file_is_found(
    look: Look, trick: Callable[..., tuple[int, int]], name: str, protection: str
) -> None:
    pid, address = trick(name)
    (one,) = look.find(pid)
    assert (one.kind, one.address, one.size, one.weight) == ("anon-exec", address, 8192, 2)
    assert one.detail == f"{protection}; 1 of 2 pages resident, bytes at {address:#x}: 90c3{'00' * 14}; no file"
    assert one.sha256 == hashlib.sha256(b"\x90\xc3".ljust(4096, b"\0")).hexdigest()


def test_a_thread_in_injected_code_is_found(look: Look, trick: Callable[..., tuple[int, int]]) -> None:
    pid, address = trick("thread")
    found = look.find(pid)
    assert of_kind(found, "anon-exec")[0].weight == 2
    (thread,) = of_kind(found, "foreign-thread")
    assert (thread.address, thread.weight) == (address, 2)
    assert "began in" in thread.claim
    rip = re.search(r"rip (0x[0-9a-f]+)", thread.detail or "")
    assert rip is not None
    assert int(rip[1], 16) == address + 7


def test_code_of_a_memfd_is_found(look: Look, trick: Callable[..., tuple[int, int]]) -> None:
    pid, address = trick("memfd")
    (one,) = look.find(pid)
    assert (one.kind, one.address, one.weight) == ("memfd", address, 2)
    assert "/memfd:stage2" in one.claim


def test_a_library_without_a_name_is_found(look: Look, trick: Callable[..., tuple[int, int]]) -> None:
    pid, address = trick("deleted")
    (one,) = look.find(pid)
    assert (one.kind, one.weight) == ("deleted-file", 1)
    assert one.address <= address < one.address + one.size
    assert (one.detail or "").endswith("path /opt/libcopy.so (deleted)")


def test_writable_code_of_a_file_is_found(look: Look, trick: Callable[..., tuple[int, int]]) -> None:
    pid, address = trick("writable")
    (one,) = look.find(pid)
    assert (one.kind, one.address, one.weight) == ("writable-exec-file", address, 2)


def test_one_changed_byte_of_libc_is_found_at_its_page(
    guest: Guest, look: Look, sleeper: int, trick: Callable[..., tuple[int, int]]
) -> None:
    text = next(line for line in truth(guest, sleeper) if "libc.so.6" in line[3] and line[2] == "r-xp")
    address = text[0] + 0x12345
    before = guest.run(["dd", f"if=/proc/{sleeper}/mem", "bs=1", f"skip={address}", "count=1", "of=/tmp/byte"])
    assert before.returncode == 0, before.stderr
    old = guest.get("/tmp/byte")[0]
    trick("poke", str(sleeper), f"{address:x}", f"{old ^ 0xFF:x}")
    (one,) = look.find(sleeper)
    assert (one.kind, one.address, one.size, one.weight) == ("modified-text", address & -4096, 4096, 2)
    assert "1 byte differs" in one.claim
    assert f"+{address & 4095:#x} {old:02x} to {old ^ 0xFF:02x}" in (one.detail or "")
    trick("poke", str(sleeper), f"{address:x}", "cc")
    assert [(one.kind, one.weight) for one in look.find(sleeper)] == [("modified-text", 1)]
    trick("poke", str(sleeper), f"{address:x}", f"{old:x}")
    assert [(one.kind, one.weight) for one in look.find(sleeper)] == [("modified-text", 0)]


def test_a_changed_vdso_is_found(guest: Guest, look: Look, sleeper: int, trick: Callable[..., tuple[int, int]]) -> None:
    vdso = next(line[0] for line in truth(guest, sleeper) if line[3] == "[vdso]")
    trick("poke", str(sleeper), f"{vdso + 0x20:x}", "ab")
    (one,) = look.find(sleeper)
    assert (one.kind, one.address, one.weight) == ("modified-text", vdso, 2)
    assert "1 byte differs" in one.claim


def test_a_process_that_is_nothing_but_injected_code_costs_bounded_time(
    look: Look, trick: Callable[..., tuple[int, int]]
) -> None:
    process = look.process(trick("crowd")[0])
    began = time.monotonic()
    assert look.injection.find(process)
    assert time.monotonic() - began < 10  # a bound, not a speed: 60,000 mappings must not hold the appliance up
    found = Injection(look.kernel, Facts(look.kernel), clock=lambda: 0.0).find(process)  # how much without a hurry
    regions = of_kind(found, "anon-exec")
    assert len(regions) == 65
    assert {one.weight for one in regions} == {2}
    assert any("more odd executable mappings" in one.claim for one in regions)


def test_a_tracer_is_found(look: Look, sleeper: int, trick: Callable[..., tuple[int, int]]) -> None:
    tracer, _ = trick("trace", str(sleeper))
    (one,) = look.find(sleeper)
    assert (one.kind, one.weight) == ("ptrace", 1)
    assert one.detail == f"tracer {tracer} python3; threads {sleeper}"


def test_a_preloaded_library_is_found(guest: Guest, look: Look) -> None:
    job = guest.spawn(
        "LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libz.so.1 exec python3 -c 'import time; print(1); time.sleep(99)'"
    )
    time.sleep(2)
    (one,) = look.find(job.pid)
    job.kill()
    assert (one.kind, one.weight) == ("ld-preload", 1)
    assert one.detail == "LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libz.so.1"


class Tampered:
    """Guest memory in which one page at a time holds what we like. Remembers which pages were read."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory, self.name, self.live = memory, memory.name, memory.live
        self.page, self.content = -1, b""
        self.seen: set[int] = set()

    @property
    def regions(self) -> tuple[Region, ...]:
        return self._memory.regions

    def read(self, gpa: int, size: int) -> bytes:
        return self._tamper(gpa, self._memory.read(gpa, size))

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        found = self._memory.readv(spans)
        return [raw if raw is None else self._tamper(gpa, raw) for (gpa, _), raw in zip(spans, found, strict=True)]

    def _tamper(self, gpa: int, raw: bytes) -> bytes:
        self.seen.update(range(gpa & -4096, gpa + len(raw), 4096))
        low, high = max(gpa, self.page), min(gpa + len(raw), self.page + 4096)
        if self.page < 0 or low >= high:
            return raw
        return raw[: low - gpa] + self.content[low - self.page : high - self.page] + raw[high - gpa :]

    def vcpus(self) -> tuple[VcpuState, ...]:
        return self._memory.vcpus()

    def check_alive(self) -> None:
        self._memory.check_alive()

    def close(self) -> None:
        self._memory.close()


def test_whatever_a_page_of_the_guest_holds_the_look_ends(guest: Guest, trick: Callable[..., tuple[int, int]]) -> None:
    memory = Tampered(open_qemu(guest.pid))
    look = Look(memory)
    pid, _ = trick("thread")
    process = look.process(pid)
    memory.seen.clear()
    look.injection.find(process)
    pages, chaos = sorted(memory.seen), random.Random(7)
    slowest = 0.0
    for round_ in range(150):
        memory.page = chaos.choice(pages)
        if round_ % 2:
            memory.content = chaos.randbytes(4096)
        else:  # a page of pointers into the direct map
            words = (look.kernel.page_offset + chaos.choice(pages) + chaos.randrange(512) * 8 for _ in range(512))
            memory.content = b"".join(word.to_bytes(8, "little") for word in words)
        began = time.monotonic()
        with contextlib.suppress(GuestError):
            assert all(isinstance(one, Evidence) for one in look.injection.find(process))
        slowest = max(slowest, time.monotonic() - began)
    memory.close()
    assert slowest < 5


def test_an_ordinary_look_takes_milliseconds(look: Look, guest: Guest) -> None:
    nginx = [one for one in look.eye.read_snapshot().processes if one.name == "nginx"]
    times = []
    for _ in range(30):
        began = time.thread_time()
        look.eye.find_foreign(nginx[-1])
        times.append(time.thread_time() - began)
    print(f"{guest.image.release}: {sorted(times)[15] * 1000:.2f} ms of CPU time for one nginx process")
    assert sorted(times)[15] < 0.02


def test_the_parasite_in_the_web_server_is_named(guest: Guest, look: Look) -> None:
    master = int(guest.get("/run/nginx.pid"))
    worker, other = [one.pid for one in look.eye.read_snapshot().processes if one.parent_pid == master]
    assert guest.run(f"/opt/parasite/infect.sh {worker} 10.77.0.1 {SINK_PORT} rwx").returncode == 0
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not of_kind(look.find(worker), "anon-exec"):
        time.sleep(0.5)
    found = look.find(worker)
    assert look.maps(worker) == truth(guest, worker)
    maps = truth(guest, worker)
    (region,) = of_kind(found, "anon-exec")
    assert (region.address, region.address + region.size, "rwxp", "") in maps
    assert (region.weight, region.detail or "") == (
        2,
        f"rwxp; 1 of 1 pages resident, bytes at {region.address:#x}: c3{'00' * 15}; no file",
    )
    (library,) = of_kind(found, "odd-path")
    code = next(line for line in maps if "libparasite" in line[3] and line[2] == "r-xp")
    assert (library.address, library.address + library.size, library.weight) == (code[0], code[1], 2)
    assert "/dev/shm/.x/libparasite.so" in library.claim
    threads = [one for one in of_kind(found, "foreign-thread") if one.weight == 2]
    assert len(threads) == 1
    assert code[0] <= threads[0].address < code[1]
    assert f"began in {code[3]}" in threads[0].claim
    assert look.find(other) == ()
