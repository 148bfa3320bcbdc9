"""From a ``task_struct`` to a GuestProcess: everything a person wants to know about it.

The fields that tell whether a description is still true (executable, credentials, namespaces, control group) are read
anew each time, in one batch; the walks behind them (path, command line, group path) are repeated only when one of
those changed. A pointer alone is never the key: its object may be freed and reused (exec, setuid), so what it points to
is compared as well.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from appliance.errors import UnreadableMemory
from appliance.guest.kernel import Kernel
from appliance.guest.linux.facts import Facts
from appliance.guest.linux.passwd import Passwd
from appliance.guest.linux.paths import Path, Paths, text_of
from appliance.guest.linux.record import is_object
from appliance.guest.linux.tasks import Task
from appliance.guest.paging import PAGE
from appliance.model import GuestProcess, Missing, ProcessKey

MAX_COMMAND = 4096  # bytes of argv that we keep
MAX_CACHE = 8192
MAX_NAMESPACES = 32  # include/linux/pid_namespace.h: MAX_PID_NS_LEVEL
MAX_SUBSYSTEMS = 16  # CGROUP_SUBSYS_COUNT; only read where css_set is laid out for it
PLAUSIBLE_BOOT_NS = range(946_684_800 * 10**9, 4_102_444_800 * 10**9)  # years 2000 to 2100
CONTAINER = re.compile(
    r"(?:docker|libpod|cri-containerd|crio|containerd|nerdctl)-([0-9a-f]{8,64})(?:\.scope)?(?:/|$)"  # systemd driver
    r"|/(?:docker|libpod|nerdctl|actions_job)/([0-9a-f]{8,64})(?:/|$)"  # cgroupfs driver
    r"|/kubepods[^/]*(?:/[^/]+)*/(?:[a-z-]+-)?([0-9a-f]{64})(?:\.scope)?(?:/|$)"
    r"|/lxc(?:\.payload)?[./]([^/]+)"
    r"|/machine\.slice/(?:machine-([^/]+?)\.scope|systemd-nspawn@([^/]+?)\.service)"
)


class Vitals(NamedTuple):
    """What must be unchanged for a description to hold."""

    comm: bytes
    mm: int
    exe: int
    arg_start: int
    arg_end: int
    pgd: int
    uid: int
    net: int
    cgroup: int
    parent: int


class Processes:
    """Describes processes of one guest."""

    def __init__(self, kernel: Kernel, facts: Facts) -> None:
        self._kernel = kernel
        self._facts = facts
        self._paths = Paths(kernel, facts)
        self._mm = facts.record("mm")
        self._uid = facts.offset("cred.uid")
        self._net_ns = facts.offset("nsproxy.net_ns")
        self._dfl = facts.find("css_set.dfl_cgrp")
        self._tgid = facts.offset("task.tgid")
        self._net = facts.record("net")
        self._level, self._numbers = facts.offset("pid.level"), facts.offset("pid.numbers")
        self._upid = facts.size("upid")
        self._cache: dict[tuple[int, int], tuple[Vitals, GuestProcess, tuple[object, ...]]] = {}
        self._group_paths: dict[int, str | Missing] = {}
        self._legacy: dict[int, list[int]] = {}
        self._boot_ns: int | None = None
        self._passwd = Passwd(kernel, facts)
        self.users: dict[int, str] = {}

    def describe(self, tasks: Sequence[Task], parents: dict[int, int] | None = None) -> list[GuestProcess]:
        """Describe processes by their leaders; ``parents`` maps known tasks to their thread-group ids."""
        known = parents or {}
        vitals = self._vitals(tasks, known)
        self._group_paths.clear()
        fresh = [task for task, vital in zip(tasks, vitals, strict=True) if self._is_new(task, vital)]
        self._legacy = self._legacy_cgroups(fresh)
        return [self._describe(task, vital) for task, vital in zip(tasks, vitals, strict=True)]

    def describe_quickly(self, task: Task) -> GuestProcess | None:
        """The description made before, if nothing that points to what it came from has changed."""
        cached = self._cache.get((task.va, task.start_ns))
        if cached is None or cached[2] != task.description or not task.exec_id:
            return None
        try:
            uid = self._kernel.u32(task.cred + self._uid)  # the credentials before last may lie at the same place
        except UnreadableMemory:
            return None
        return cached[1] if uid == cached[1].uid else None

    def read_clock(self) -> None:
        """Read the guest's own idea of when it booted (timekeeper.offs_real - offs_boot), which it may change."""
        self._boot_ns = self._read_boot_ns()

    def read_users(self, tasks: Sequence[Task]) -> None:
        """Read the names of users as process 1 sees them."""
        first = next((task for task in tasks if task.tgid == 1), None)
        users = self._passwd.read(first.fs) if first is not None else {}
        if users and users != self.users:
            self.users = users
            self._cache.clear()

    def forget(self) -> None:
        """Describe everything afresh next time."""
        self._cache.clear()

    def _vitals(self, tasks: Sequence[Task], parents: dict[int, int]) -> list[Vitals]:
        spans: list[tuple[int, int]] = []
        for task in tasks:
            spans.append(self._mm.span(task.mm) if is_object(task.mm) else (0, 1))
            spans.append((task.cred + self._uid, 4))
            spans.append((task.nsproxy + self._net_ns, 8) if is_object(task.nsproxy) else (0, 1))
            spans.append((task.cgroups + self._dfl, 8) if self._dfl is not None and is_object(task.cgroups) else (0, 1))
            if task.parent not in parents:
                spans.append((task.parent + self._tgid, 4))
        present = [(va, size) for va, size in spans if is_object(va & ~7)]
        found = iter(self._kernel.readv(present))
        values = iter([next(found) if is_object(va & ~7) else None for va, _ in spans])
        result = []
        for task in tasks:
            mm, uid, net, cgroup = next(values), next(values), next(values), next(values)
            parent = parents.get(task.parent)
            if parent is None:
                parent = _number(next(values))
            exe, start, end, pgd = self._mm.parse(mm) if mm is not None else (0, 0, 0, 0)
            numbers = _number(uid, -1), _number(net), _number(cgroup)
            result.append(Vitals(task.comm, task.mm, exe, start, end, pgd, *numbers, parent))
        return result

    def _is_new(self, task: Task, vitals: Vitals) -> bool:
        cached = self._cache.get((task.va, task.start_ns))
        return cached is None or cached[0] != vitals or cached[1].key.pid != task.tgid

    def _describe(self, task: Task, vitals: Vitals) -> GuestProcess:
        key = (task.va, task.start_ns)
        cached = self._cache.get(key)
        if cached is not None and cached[0] == vitals and cached[1].key.pid == task.tgid:
            if cached[2] != task.description:
                self._cache[key] = vitals, cached[1], task.description
            return cached[1]
        process = self._read(task, vitals)
        if len(self._cache) >= MAX_CACHE:
            self._cache.clear()
        self._cache[key] = vitals, process, task.description
        return process

    def _read(self, task: Task, vitals: Vitals) -> GuestProcess:
        if self._boot_ns is None:
            self.read_clock()
        path = self._path(task, vitals)
        cgroup = self._cgroup(task, vitals)
        return GuestProcess(
            key=ProcessKey(task.tgid, task.start_ns),
            name=text_of(task.comm.split(b"\0", 1)[0]),
            path=path if isinstance(path, Missing) else path.text,
            command=self._command(task, vitals),
            parent_pid=vitals.parent,
            uid=vitals.uid,
            user=self.users.get(vitals.uid),
            deleted=isinstance(path, Path) and path.deleted,
            started_wall_ns=None if self._boot_ns is None else self._boot_ns + task.start_ns,
            container=self._container(task, cgroup),
            cgroup=cgroup,
            netns=self._netns(vitals.net),
            pid_in_namespace=self._inner_pid(task),
            task_va=task.va,
        )

    def _path(self, task: Task, vitals: Vitals) -> Path | Missing:
        if task.kernel_thread:
            return Missing.NOT_APPLICABLE
        return self._paths.of_file(vitals.exe) if is_object(vitals.exe) else Missing.UNREADABLE

    def _command(self, task: Task, vitals: Vitals) -> str | Missing:
        """``argv``, which lies in the process's own memory and is its to change (fs/proc/base.c, get_mm_cmdline)."""
        if task.kernel_thread:
            return Missing.NOT_APPLICABLE
        size = vitals.arg_end - vitals.arg_start
        if size <= 0 or not vitals.pgd:
            return Missing.UNREADABLE if not vitals.pgd or size < 0 else ""
        try:
            raw = self._kernel.read_user(vitals.pgd, vitals.arg_start, min(size, MAX_COMMAND))
        except UnreadableMemory:
            return Missing.UNREADABLE
        if size <= MAX_COMMAND and raw[-1]:
            return text_of(self._title(vitals))
        return text_of(raw.rstrip(b"\0").replace(b"\0", b" "))

    def _title(self, vitals: Vitals) -> bytes:
        """What a process has written over its arguments, perhaps beyond their end (get_mm_proctitle)."""
        title = b""
        with suppress(UnreadableMemory):
            while len(title) < MAX_COMMAND and b"\0" not in title:
                at = vitals.arg_start + len(title)
                title += self._kernel.read_user(vitals.pgd, at, PAGE - at % PAGE)
        return title[:MAX_COMMAND].partition(b"\0")[0]

    def _cgroup(self, task: Task, vitals: Vitals) -> str | Missing:
        return self._group_path(vitals.cgroup) if is_object(vitals.cgroup) else Missing.UNKNOWN

    def _group_path(self, group: int) -> str | Missing:
        """A control group's path, walked once for all processes that are described together."""
        if group not in self._group_paths:
            self._group_paths[group] = self._paths.of_cgroup(group)
        return self._group_paths[group]

    def _container(self, task: Task, cgroup: str | Missing) -> str | None:
        if isinstance(cgroup, str) and cgroup != "/":
            return container_of(cgroup)
        for group in self._legacy.get(task.cgroups, ()):
            path = self._group_path(group)
            if isinstance(path, str) and (found := container_of(path)):
                return found
        return None

    def _legacy_cgroups(self, tasks: Sequence[Task]) -> dict[int, list[int]]:
        """By ``css_set``, its groups in v1 hierarchies (``subsys[] -> cgroup``), for when the unified one is mute."""
        subsys, cgroup = self._facts.find("css_set.subsys"), self._facts.find("css.cgroup")
        sets = list({task.cgroups: None for task in tasks if is_object(task.cgroups)})
        if subsys is None or cgroup is None or not sets:
            return {}
        count = min(self._facts.length("css_set.subsys"), MAX_SUBSYSTEMS)
        raws = self._kernel.readv([(va + subsys, 8 * count) for va in sets])
        states = [[state for state in array("Q", raw or b"") if is_object(state)] for raw in raws]
        distinct = list({state: None for each in states for state in each})
        found = self._kernel.readv([(self._kernel.direct(state + cgroup), 8) for state in distinct])
        group_of = dict(zip(distinct, map(_number, found), strict=True))
        return {
            va: [group for group in dict.fromkeys(group_of[state] for state in each) if is_object(group)]
            for va, each in zip(sets, states, strict=True)
        }

    def _netns(self, net: int) -> int | Missing:
        if not net:
            return Missing.NOT_APPLICABLE
        if not is_object(net):
            return Missing.IMPLAUSIBLE
        try:
            return int(self._net.parse(self._kernel.read(*self._net.span(net)))[1])
        except UnreadableMemory:
            return Missing.UNREADABLE

    def _inner_pid(self, task: Task) -> int:
        """Its pid in its innermost pid namespace: ``pid->numbers[pid->level].nr`` (include/linux/pid.h)."""
        if not is_object(task.thread_pid):
            return 0
        try:
            level = self._kernel.u32(task.thread_pid + self._level)
            if level > MAX_NAMESPACES:
                return 0
            return self._kernel.u32(task.thread_pid + self._numbers + level * self._upid)
        except UnreadableMemory:
            return 0

    def _read_boot_ns(self) -> int | None:
        record = self._facts.record("timekeeper")
        base = self._facts.symbol("tk_core") or self._facts.symbol("timekeeper_data")
        if base is None:
            return None
        start = base + (self._facts.find("tk_data.timekeeper") or -(-self._facts.size("seqcount") // 8) * 8)
        try:
            real, boot = record.parse(self._kernel.read(*record.span(start)))
        except UnreadableMemory:
            return None
        return real - boot if real - boot in PLAUSIBLE_BOOT_NS else None


def container_of(cgroup: str) -> str | None:
    """Container id or name in a control group's path; the innermost one, None when there is none."""
    found = list(CONTAINER.finditer(cgroup))
    return next((group for group in found[-1].groups() if group), None) if found else None


def _number(raw: bytes | None, default: int = 0) -> int:
    return default if raw is None else int.from_bytes(raw, "little")
