"""``conformance``: a memory image with known answers, and whether we give them. For people with public images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from appliance.cli import contract
from appliance.cli.look import OutputOption, SymbolsOption, tell_gaps
from appliance.cli.progress import tell, working
from appliance.cli.render import Output, print_objects, safe
from appliance.errors import ConfigError, GuestError, UsageError
from appliance.hosts.targets import resolve
from appliance.model import Evidence, GuestProcess
from appliance.opening import open_eye
from appliance.ports import GuestEye

ANSWERS = Path(__file__).resolve().parents[2] / "vm-images" / "public"
MAX_FILE = 4 << 20
CHUNK = 4 << 20


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class End(_Block):
    """One end of a connection; what is left out fits everything."""

    ip: str | None = None
    port: int | None = None


class ExpectedConnection(_Block):
    """One row that ``connections`` must have; what is left out fits everything."""

    protocol: str | None = None
    state: str | None = None
    local: End | None = None
    remote: End | None = None
    pid: int | None = None
    name: str | None = Field(None, description="Of the owner, in either case, maybe cut short")
    flags: list[str] = []


class ExpectedProcess(_Block):
    """One row that ``processes`` must have, and the kinds of evidence that its look-through must find."""

    pid: int
    name: str | None = None
    flags: list[str] = []
    evidence: list[str] = []


class AtLeast(_Block):
    """How many rows there must be."""

    processes: int = 0
    connections: int = 0


class Image(_Block):
    """Which image this is about."""

    name: str
    os: str
    source: str
    sha256: str | None = None
    note: str | None = None


class Answers(_Block):
    """The known answers of one image. Keys that begin with an underscore are not allowed; use ``note``."""

    image: Image
    at_least: AtLeast = AtLeast()
    processes: list[ExpectedProcess] = []
    connections: list[ExpectedConnection] = []


@dataclass(frozen=True, slots=True)
class Check:
    """One answer compared."""

    ok: bool
    check: str
    expected: str
    found: str


def conformance(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A memory image: raw, LiME, ELF core or crash dump.")],
    expect: Annotated[
        str, typer.Option("--expect", metavar="FILE", help="Known answers: a JSON file, or the name of a shipped one.")
    ],
    symbols: SymbolsOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare the image's SHA-256 first.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Compare what is read from a memory image with its known answers. Exit code 1 if one is not given."""
    answers = _load(expect)
    info = resolve(f"file:{image}")
    checks = [_hash(image, answers.image.sha256)] if verify and answers.image.sha256 else []
    with working(f"reading {image}"):
        eye = open_eye(info, symbols or ())
        try:
            tell(eye.describe)
            checks += compare(eye, info.id.target, answers)
        finally:
            eye.close()
    bodies = [{"ok": one.ok, "check": one.check, "expected": one.expected, "found": one.found} for one in checks]
    rows = [
        ("[green]ok[/]" if one.ok else "[bold red]MISSING[/]", one.check, safe(one.expected, 200), safe(one.found, 200))
        for one in checks
    ]
    print_objects(output, bodies, ("", "CHECK", "EXPECTED", "FOUND"), rows)
    failed = sum(not one.ok for one in checks)
    tell(f"{len(checks) - failed} of {len(checks)} known answers given")
    raise typer.Exit(1 if failed else 0)


def compare(eye: GuestEye, vm: str, answers: Answers) -> list[Check]:
    """Look once, and compare with every answer."""
    snapshot = eye.read_snapshot()
    tell_gaps(snapshot)
    processes = {process.pid: process for process in snapshot.processes}
    rows = [contract.connection(vm, socket) for socket in snapshot.sockets]
    checks = [
        _count("processes", answers.at_least.processes, len(processes)),
        _count("connections", answers.at_least.connections, len(rows)),
    ]
    checks += [_process(wanted, processes.get(wanted.pid)) for wanted in answers.processes]
    checks += [_connection(wanted, rows) for wanted in answers.connections]
    for wanted in answers.processes:
        if wanted.evidence:
            checks.append(_evidence(wanted, eye, processes.get(wanted.pid)))
    return [check for check in checks if check.expected]


def _count(what: str, least: int, found: int) -> Check:
    return Check(found >= least, f"number of {what}", f"at least {least}" if least else "", str(found))


def _process(wanted: ExpectedProcess, found: GuestProcess | None) -> Check:
    flags = {flag.value for flag in found.flags} if found else set()
    ok = found is not None and _same_name(wanted.name, found.name) and flags.issuperset(wanted.flags)
    expected = " ".join([f"{wanted.pid} {wanted.name or ''}".strip(), *wanted.flags])
    return Check(
        ok, "process", expected, f"{found.pid} {found.name} {' '.join(sorted(flags))}".strip() if found else "-"
    )


def _same_name(wanted: str | None, found: str) -> bool:
    """Names are compared in either case; the kernel cuts them to 14 or 15 characters, and so do lists of answers."""
    if wanted is None:
        return True
    short, long = sorted((wanted.lower(), found.lower()), key=len)
    return short == long or (len(short) >= 14 and long.startswith(short))


def _same_ip(wanted: str | None, found: str | None) -> bool:
    """Addresses are compared as such: IPv6 has many ways to write one."""
    if wanted is None or wanted == found:
        return True
    try:
        return found is not None and ip_address(wanted) == ip_address(found)
    except ValueError:
        return False


def _connection(wanted: ExpectedConnection, rows: list[dict[str, Any]]) -> Check:
    near = sorted(rows, key=lambda row: -sum(_fits(wanted, row)))[:1]
    ok = bool(near) and all(_fits(wanted, near[0]))
    return Check(ok, "connection", _connection_text(wanted.model_dump()), _row_text(near[0]) if near else "-")


def _fits(wanted: ExpectedConnection, row: dict[str, Any]) -> Iterator[bool]:
    """Whether each thing that is asked for is so."""
    for key in ("protocol", "state"):
        yield getattr(wanted, key) in (None, row[key])
    for key in ("local", "remote"):
        end, found = getattr(wanted, key), row[key] or {}
        yield end is None or (_same_ip(end.ip, found.get("ip")) and end.port in (None, found.get("port")))
    owners = row["owners"]
    yield wanted.pid is None or any(owner["pid"] == wanted.pid for owner in owners)
    yield wanted.name is None or any(_same_name(wanted.name, owner["name"]) for owner in owners)
    yield set(row["flags"]).issuperset(wanted.flags)


def _connection_text(row: dict[str, Any]) -> str:
    owner = " ".join(str(word) for word in (row["pid"], row["name"]) if word is not None)
    return _text(row, owner)


def _row_text(row: dict[str, Any]) -> str:
    return _text(row, ", ".join(f"{owner['pid']} {owner['name']}" for owner in row["owners"]))


def _text(row: dict[str, Any], owner: str) -> str:
    ends = [f"{end.get('ip') or '*'}:{end.get('port') or '*'}" if end else "*" for end in (row["local"], row["remote"])]
    words = (row["protocol"], row["state"], ends[0], ends[1], owner, *row["flags"])
    return " ".join(str(word) for word in words if word)


def _evidence(wanted: ExpectedProcess, eye: GuestEye, process: GuestProcess | None) -> Check:
    expected = f"{wanted.pid}: {', '.join(wanted.evidence)}"
    if process is None:
        return Check(False, "evidence", expected, "no such process")
    try:
        found: Iterable[Evidence] = eye.find_foreign(process)
    except GuestError as error:
        return Check(False, "evidence", expected, str(error))
    kinds = dict.fromkeys(item.kind for item in found)
    return Check(kinds.keys() >= set(wanted.evidence), "evidence", expected, ", ".join(kinds) or "none")


def _hash(image: Path, expected: str) -> Check:
    digest = hashlib.sha256()
    with image.open("rb") as file, working(f"hashing {image}"):
        while part := file.read(CHUNK):
            digest.update(part)
    return Check(digest.hexdigest() == expected, "sha256", expected, digest.hexdigest())


def _load(name: str) -> Answers:
    """Read a file of answers. Raises UsageError (no such file), ConfigError (each mistake named)."""
    shipped = {path.stem: path for path in sorted(ANSWERS.glob("*.json"))}
    path = shipped.get(name, Path(name))
    try:
        text = path.read_text(encoding="utf-8")[:MAX_FILE]
    except FileNotFoundError:
        raise UsageError(f"there is no file {name}; shipped answers: {', '.join(shipped) or 'none'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    try:
        return Answers.model_validate(json.loads(text))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:20])
        raise ConfigError(f"{path}: {wrong}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
