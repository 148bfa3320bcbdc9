r"""From an ``_EPROCESS`` to a GuestProcess: everything a person wants to know about it.

The kernel's own view comes first: the name and the path are those that it noted when it made the process
(SeAuditProcessCreationInfo), the user is that of its token. From the process's own memory, which is the process's to
change, come its command line and the names of accounts (USERDOMAIN\USERNAME of a process of that very SID). Its own
idea of its path only serves to learn which drive a volume is. What cannot be read in it now (paged out, or a process
that has just begun) is tried again with later looks; all else is read once.
Sources: _SE_AUDIT_PROCESS_CREATION_INFO, _PS_PROTECTION, enum _PS_PROTECTED_SIGNER of ntkrnlmp.pdb; SE_SIGNING_LEVEL_*
(winnt.h); svchost.exe -k GROUP -s SERVICE.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from appliance.errors import UnreadableMemory, UnsupportedGuest
from appliance.guest.windows.drives import Drives
from appliance.guest.windows.eprocess import RawProcess
from appliance.guest.windows.files import Files
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.objects import Objects
from appliance.guest.windows.params import ParameterReader, Parameters
from appliance.guest.windows.text import MAX_PATH, file_name, wide_texts
from appliance.guest.windows.tokens import Token, Tokens, is_account, well_known_name
from appliance.guest.windows.vads import Vads
from appliance.model import Flag, GuestProcess, Missing

MAX_CACHE: Final = 8192
SHORT_NAME: Final = 14  # characters of ImageFileName
MAX_PAUSE: Final = 64  # looks between two tries to read what was unreadable
WITNESSES: Final = 4  # processes that are asked for the name of one account, in one look
# SE_SIGNING_LEVEL_*: 0 unchecked, 1 unsigned; 5, 9, 10 and 15 have no fixed meaning
LEVELS: Final = {
    2: "Enterprise",
    3: "Developer",
    4: "Authenticode",
    6: "Store",
    7: "Antimalware",
    8: "Microsoft",
    11: "CodeGen",
    12: "Windows",
    13: "Windows",
    14: "WinTcb",
}
SIGNERS: Final = ("", "Authenticode", "CodeGen", "Antimalware", "Lsa", "Windows", "WinTcb", "WinSystem", "App")
SERVICE: Final = re.compile(r'\s[-/]s\s+"?([^\s"]{1,256})', re.IGNORECASE)
POOL: Final = re.compile(r'\s-ap\s+(?:"([^"]{1,256})"|(\S{1,256}))', re.IGNORECASE)


class _Portrait(NamedTuple):
    vitals: tuple[int, ...]  # what must be unchanged for it to hold
    process: GuestProcess
    failures: int  # how often something of it could not be read; 0: all of it is there
    due: int  # the look from which on it is worth another try


class Portraits:
    """Describes processes of one guest. ``read`` reads one ``_EPROCESS`` again, to see whether it is still the same."""

    def __init__(self, kernel: WindowsKernel, read: Callable[[int], RawProcess]) -> None:
        self._kernel, self._read = kernel, read
        self.objects = Objects(kernel)
        self.drives = Drives(kernel, self.objects)
        self._files = Files(kernel, self.objects)
        self._tokens = Tokens(kernel)
        self._parameters = ParameterReader(kernel)
        self._vads = Vads(kernel, self._files)
        self._signers = self._read_signers()
        self._audit_name = (
            kernel.types.offset("_OBJECT_NAME_INFORMATION.Name")
            if kernel.types.has("_OBJECT_NAME_INFORMATION.Name")
            else 0
        )
        self._cache: dict[tuple[int, int, int], _Portrait] = {}
        self._accounts: dict[str, str] = {}
        self._asked_drives = False
        self._looks = 0

    def describe(self, raws: Sequence[RawProcess], flags: tuple[Flag, ...] = ()) -> list[GuestProcess]:
        """Describe processes, the ones not seen before together in few batches."""
        self._looks += 1
        fresh = [raw for raw in raws if not self._holds(raw)]
        if len(self._cache) + len(fresh) > MAX_CACHE:
            self._cache.clear()
            fresh = list(raws)
        if fresh:
            self._describe_fresh(fresh)
        found = [self._cache[raw.va, raw.pid, raw.created].process for raw in raws]
        if not flags:
            return found
        return [replace(process, flags=tuple(dict.fromkeys((*flags, *process.flags)))) for process in found]

    def forget(self) -> None:
        """Describe everything afresh next time."""
        self._cache.clear()
        self._accounts.clear()
        self._files.forget()

    def _holds(self, raw: RawProcess) -> bool:
        cached = self._cache.get((raw.va, raw.pid, raw.created))
        if cached is None or cached.vitals != self._vitals(raw):
            return False
        return not cached.failures or self._looks < cached.due

    def _vitals(self, raw: RawProcess) -> tuple[int, ...]:
        token = self._tokens.pointer(raw.token)
        return token, raw.peb, raw.ppid, raw.exited, raw.audit, raw.file, raw.signature_level, raw.protection

    def _describe_fresh(self, raws: list[RawProcess]) -> None:
        if not self._asked_drives:
            self._asked_drives = True
            self.drives.read(raws[0].va)
        paths = self._kernel_paths(raws)
        files = self._files.read([raw.file for raw in raws if raw.file])
        tokens = self._tokens.read([raw.token for raw in raws])
        own = [self._parameters.read(raw) if not raw.exited else Parameters() for raw in raws]
        for number, raw in enumerate(raws):
            if self._is_same(raw):
                continue
            # What was read may be another process's by now: the path is kept if it has this one's name
            tokens[number], own[number] = None, Parameters()
            files.pop(raw.file, None)
            if not self._agrees(raw, paths[number] or ""):
                paths[number] = None
        for raw, path, parameters in zip(raws, paths, own, strict=True):
            if path and isinstance(parameters.image, str):
                self.drives.learn(path, parameters.image, raw.created)
        self._learn_accounts(raws, tokens, own)
        for raw, path, token, parameters in zip(raws, paths, tokens, own, strict=True):
            file = files.get(raw.file)
            where = path or (file.path if file else "") or (self._image_path(raw) if path == "" else "")
            process = self._portray(raw, where, token, parameters)
            if file is not None and file.delete_pending:
                process = replace(process, deleted=True)
            readable = raw.exited != 0 or process.command is not Missing.UNREADABLE
            complete = readable and token is not None and path is not None
            self._keep(raw, process, complete=complete)

    def _keep(self, raw: RawProcess, process: GuestProcess, *, complete: bool) -> None:
        """Remember a description; the more often something of it was unreadable, the later it is tried again."""
        key = raw.va, raw.pid, raw.created
        before = self._cache.get(key)
        failures = 0 if complete else 1 + (before.failures if before is not None else 0)
        due = self._looks + min(1 << failures - 1, MAX_PAUSE) if failures else 0
        self._cache[key] = _Portrait(self._vitals(raw), process, failures, due)

    def _portray(self, raw: RawProcess, path: str, token: Token | None, own: Parameters) -> GuestProcess:
        minimal = not self._parameters.is_user(raw.peb)  # System, Registry, MemCompression: no user mode, no PEB
        name, where = self._name(raw, path), self._path(path, minimal=minimal)
        command = Missing.NOT_APPLICABLE if minimal and raw.exited == 0 else own.command
        services = self._services(name, command)
        session = own.session
        if session is None and token is not None:
            session = token.session
        sid = token.sid if token is not None else None
        return GuestProcess(
            key=raw.key,
            name=name,
            path=where,
            command=command,
            parent_pid=raw.ppid & 0xFFFF_FFFF,
            uid=None,
            user=self._user(sid, name, command, services),
            started_wall_ns=raw.created or None,
            netns=Missing.NOT_APPLICABLE,
            cgroup=Missing.NOT_APPLICABLE,
            task_va=raw.va,
            sid=sid,
            session=session,
            services=services,
            signer=self._signer(raw),
            flags=(Flag.STALE,) if raw.exited else (),
        )

    # -- the kernel's view --

    def _kernel_paths(self, raws: Sequence[RawProcess]) -> list[str | None]:
        """The path that the kernel noted when it made each process; empty where it did not, None: unreadable now."""
        noted = [self._kernel.is_kernel(raw.audit) for raw in raws]
        vas = [raw.audit + self._audit_name for raw, there in zip(raws, noted, strict=True) if there]
        texts = iter(wide_texts(self._kernel.space, vas, MAX_PATH))
        return [next(texts) if there else "" for there in noted]

    def _image_path(self, raw: RawProcess) -> str:
        """The path of the file that is mapped where the kernel mapped the program: for kernels that note no path."""
        if raw.exited or not self._parameters.is_user(raw.section_base):
            return ""
        try:
            program = self._vads.find(raw.va, raw.section_base)
        except UnreadableMemory:
            return ""
        return program.path or "" if program is not None else ""

    def _name(self, raw: RawProcess, path: str) -> str:
        """The image's whole file name, where the kernel's short one agrees; else the short one."""
        return file_name(path) if self._agrees(raw, path) else raw.name

    def _agrees(self, raw: RawProcess, path: str) -> bool:
        """Whether a path has the name that the kernel noted in short: the lower bytes of its characters."""
        low = file_name(path).encode("utf-16-le", "replace")[::2].split(b"\0", 1)[0].decode("latin-1")
        return low.casefold()[:SHORT_NAME] == raw.name.casefold()[:SHORT_NAME]

    def _path(self, path: str, *, minimal: bool) -> str | Missing:
        """The kernel's path with a drive letter. The process's own word for it is not taken."""
        if path.startswith("\\"):
            return self.drives.to_dos(path)
        return Missing.NOT_APPLICABLE if minimal else Missing.UNREADABLE

    def _signer(self, raw: RawProcess) -> str | None:
        """Who signed it: of a protected process the signer that protects it, else the level its image reached."""
        by = raw.protection >> 4
        return self._signers.get(by) or LEVELS.get(raw.signature_level & 15)

    def _read_signers(self) -> dict[int, str]:
        prefix = "PsProtectedSigner"
        if not self._kernel.types.has("_PS_PROTECTION.Signer"):
            return dict(enumerate(SIGNERS))
        try:
            found = self._kernel.types.enum("_PS_PROTECTED_SIGNER")
        except UnsupportedGuest:
            return dict(enumerate(SIGNERS))
        return {value: name.removeprefix(prefix) for name, value in found.items() if value and name != f"{prefix}Max"}

    # -- its own view --

    def _is_same(self, raw: RawProcess) -> bool:
        """Whether a process is still what it was: so what was read through its pointers and page tables was its own."""
        try:
            now = self._read(raw.va)
        except UnreadableMemory:
            return False
        return (now.key, now.dtb, self._vitals(now)) == (raw.key, raw.dtb, self._vitals(raw))

    def _services(self, name: str, command: str | Missing) -> tuple[str, ...]:
        if name.casefold() != "svchost.exe" or not isinstance(command, str):
            return ()
        return tuple(SERVICE.findall(command)[:1])

    def _user(self, sid: str | None, name: str, command: str | Missing, services: tuple[str, ...]) -> str | None:
        if sid is None:
            return None
        pools = POOL.findall(command) if isinstance(command, str) else []
        candidates = (*services, name.removesuffix(".exe"), *(part for pair in pools for part in pair if part))
        return well_known_name(sid, candidates) or self._accounts.get(sid)

    def _learn_accounts(
        self, raws: Sequence[RawProcess], tokens: Sequence[Token | None], own: Sequence[Parameters]
    ) -> None:
        """Ask for each unknown account a few of its processes, the earliest first: USERDOMAIN and USERNAME."""
        asked: dict[str, int] = {}
        known = zip(raws, tokens, own, strict=True)
        for raw, token, parameters in sorted(known, key=lambda each: each[0].created):
            if token is None or not is_account(token.sid) or token.sid in self._accounts or not parameters.environment:
                continue
            asked[token.sid] = asked.get(token.sid, 0) + 1
            if asked[token.sid] > WITNESSES:
                continue
            names = ("USERDOMAIN", "USERNAME")
            found = self._parameters.read_environment(raw, parameters.environment, names)
            if found.get("USERNAME") and self._is_same(raw):
                domain = found.get("USERDOMAIN")
                self._name_account(token.sid, f"{domain}\\{found['USERNAME']}" if domain else found["USERNAME"])

    def _name_account(self, sid: str, name: str) -> None:
        """Remember an account's name, also for those that were described before it was known."""
        self._accounts[sid] = name
        for key, portrait in self._cache.items():
            if portrait.process.sid == sid and portrait.process.user is None:
                self._cache[key] = portrait._replace(process=replace(portrait.process, user=name))
