"""A freed object's memory is used again: the same address is not the same thing."""

import struct

from appliance.guest.layout import Field
from appliance.guest.linux.fast import FastPath, _Known
from appliance.guest.linux.processes import Processes
from appliance.guest.linux.record import Record
from appliance.guest.linux.tasks import Task, TaskList
from appliance.model import Owner
from tests.guest.linux.test_walks import BASE, Ram
from tests.worlds.nouns import process

SIZE = 256
MEMBERS = ("next", "prev", "thread_next", "pid", "tgid", "start_ns", "comm", "flags", "mm", "files", "cred", "parent",
           "signal", "nsproxy", "thread_pid", "cgroups", "fs", "exec_id")  # fmt: skip
RECORD = Record("task", [Field(8 * i, 8) for i in range(len(MEMBERS))])
HEAD = 248  # signal_struct.thread_head: here the signal is the task's own page


class Kernel:
    def __init__(self, ram):
        self.read, self.readv = ram.read, ram.readv

    def direct(self, va):
        return va

    def u32(self, va):
        return int.from_bytes(self.read(va, 4), "little")

    def u64(self, va):
        return int.from_bytes(self.read(va, 8), "little")


class Facts:
    def record(self, name):
        return RECORD

    def offset(self, name):
        return {"task.tasks": 0, "task.thread_node": 16, "signal.thread_head": HEAD}[name]

    def needed(self, name):
        return BASE


def write(ram, starts):
    """Tasks in a row, the first one being init_task; each one's start time."""
    vas = [BASE + SIZE * i for i in range(len(starts))]
    for i, va in enumerate(vas):
        values = dict.fromkeys(MEMBERS, 0) | {
            "next": vas[(i + 1) % len(vas)],
            "prev": vas[i - 1],
            "pid": 100 + i,
            "tgid": 100 + i,
            "start_ns": starts[i],
            "signal": va,
            "thread_next": va + HEAD,
        }
        struct.pack_into(f"<{len(MEMBERS)}Q", ram.data, va - BASE, *values.values())


def test_the_task_list_is_not_unchanged_when_its_last_task_is_another_one_at_the_same_place():
    ram = Ram(bytearray(4 * SIZE))
    write(ram, [1, 5, 7])
    tasks = TaskList(Kernel(ram), Facts())
    seen = tasks.walk()
    assert (seen.tail, seen.tail_start_ns) == (BASE + 2 * SIZE, 7)
    assert tasks.is_tail(seen, *ram.readv(tasks.tail_spans(seen)))
    write(ram, [1, 5, 9])  # the last one ended, and its child's child was given the same memory
    assert not tasks.is_tail(seen, *ram.readv(tasks.tail_spans(seen)))
    fresh = tasks.newcomers(seen)
    assert [task.start_ns for task in fresh.leaders] == [5, 9]
    assert tasks.is_tail(fresh, *ram.readv(tasks.tail_spans(fresh)))
    assert not tasks.is_tail(fresh, None, None)


def test_a_description_is_not_trusted_when_the_credentials_at_the_same_place_say_another_user():
    ram = Ram(bytearray(64))
    processes = Processes.__new__(Processes)
    processes._kernel = Kernel(ram)
    processes._uid = 8
    task = Task(BASE, *[1] * len(MEMBERS))._replace(cred=BASE + 16)
    known = process(1)
    assert known.uid == 0
    processes._cache = {(task.va, task.start_ns): (None, known, task.description)}
    assert processes.describe_quickly(task) is known
    struct.pack_into("<I", ram.data, 16 + 8, 33)
    assert processes.describe_quickly(task) is None
    assert processes.describe_quickly(task._replace(cred=BASE + 4096)) is None


def test_a_remembered_owner_is_not_confirmed_when_its_credentials_say_another_user():
    ram = Ram(bytearray(64))
    fast = FastPath.__new__(FastPath)
    fast._read = ram.read
    span, raw = (BASE, 8), bytes(8)
    known = _Known(
        socket=0, file=span, task=span, uid=(BASE + 16, 4), identity=(), links=((span, raw),), table=span, place=(0, 0),
        slot=slice(0), expected=b"", owner=Owner(process(1), (3,)), file_was=raw, task_was=raw,
    )  # fmt: skip
    assert fast._is_confirmed(known)
    struct.pack_into("<I", ram.data, 16, 33)
    assert not fast._is_confirmed(known)
