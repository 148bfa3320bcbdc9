"""Verbs that look once: ``guests``, ``processes``, ``connections``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from appliance.cli import contract
from appliance.cli.progress import tell, working
from appliance.cli.render import Output, endpoint_text, print_lines, print_objects, safe
from appliance.errors import UnsupportedGuest
from appliance.hosts.inventory import Inventory
from appliance.hosts.targets import resolve
from appliance.model import NO_NETWORK, GuestInfo, Snapshot
from appliance.opening import open_eye

MAX_GAPS = 20  # told one by one
MAX_NOTE = 400  # characters

TargetArgument = Annotated[str, typer.Argument(metavar="TARGET", help="A libvirt name or UUID, qemu:PID or file:PATH.")]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How to print the result.")]
SymbolsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--symbols",
        metavar="DIR",
        exists=True,
        file_okay=False,
        help="Windows: a folder that holds windows/PDB/GUID-AGE.json.xz; may be given several times.",
    ),
]
RouteOption = Annotated[
    str | None,
    typer.Option(
        "--route",
        metavar="ROUTE",
        help="Read memory this way instead of the best one: qemu, xen, libvirt, qmp, file or libvmi; `guests` lists "
        "what each guest has.",
    ),
]
ChangesOption = Annotated[
    bool,
    typer.Option(
        "--libvmi-allow-domain-changes",
        help="LibVMI on Xen raises the domain's memory limit while it is open; it is put back afterwards.",
    ),
]
Column = Callable[[dict[str, Any]], str]


def guests(output: OutputOption = Output.TABLE) -> None:
    """List the guests that run here and how each can be seen."""
    with Inventory.of_this_host() as inventory:
        bodies = [contract.guest(one) for one in inventory.find_guests()]
        troubles = inventory.troubles
    print_guests(output, bodies)
    for trouble in troubles:
        tell(trouble)
    if not bodies:
        tell("no running guest was found here; qemu:PID, file:PATH and port:IFNAME can be named all the same")


def print_guests(output: Output, bodies: Sequence[dict[str, Any]]) -> None:
    """Print guests; in a table each has its UUID below its name, and what cannot be seen stands below all of them."""
    rows = [
        (
            body["vm"],
            "\n".join(safe(text) for text in (body["name"], body["uuid"]) if text not in {None, "", body["vm"]}) or "-",
            body["state"],
            f"{body['memory_bytes'] >> 20} MiB" if body["memory_bytes"] else "?",
            ", ".join(safe(port["ifname"]) for port in body["ports"]) or "none",
            ", ".join(body["routes"]) or "none",
        )
        for body in bodies
    ]
    columns = ("VM", "NAME, UUID", "STATE", "MEMORY", "PORTS", "ROUTES")
    print_objects(output, bodies, columns, rows, folding=("PORTS", "ROUTES"))
    if output is Output.TABLE:
        print_lines(f"{body['vm']}: {safe(note, MAX_NOTE)}" for body in bodies for note in body["notes"])


def processes(
    target: TargetArgument,
    symbols: SymbolsOption = None,
    route: RouteOption = None,
    changes: ChangesOption = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """List the processes of one guest, as its kernel's own memory tells them."""
    _, os, snapshot = _look(target, symbols, route, changes)
    bodies = [contract.process(one) or {} for one in snapshot.processes]
    windows = os == "windows"
    columns: dict[str, Column] = {
        "PID": lambda body: str(body["pid"]),
        "PPID": lambda body: str(body["parent_pid"]),
        **({"SESSION": lambda body: "" if body["session"] is None else str(body["session"])} if windows else {}),
        "USER": _user,
        "NAME": lambda body: safe(body["name"], 32 if windows else 16),
        "COMMAND": lambda body: safe(body["command"] or body["path"] or "[kernel]"),
        **({} if windows else {"CONTAINER": lambda body: safe(body["container"] or "", 14)}),
    }
    _print(output, bodies, columns)


def connections(
    target: TargetArgument,
    symbols: SymbolsOption = None,
    route: RouteOption = None,
    changes: ChangesOption = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """List every socket of one guest with the processes that hold it, like ss -tuanp run from outside."""
    info, os, snapshot = _look(target, symbols, route, changes)
    bodies = [contract.connection(info.id.target, one) for one in snapshot.sockets]
    windows = os == "windows"
    several = len({body["netns"] for body in bodies}) > 1  # Windows: compartments; usually there is one
    width = 32 if windows else 16
    columns: dict[str, Column] = {
        "PROTO": lambda body: str(body["protocol"]),
        "STATE": lambda body: str(body["state"]),
        "LOCAL": lambda body: safe(endpoint_text(body["local"])),
        "REMOTE": lambda body: safe(endpoint_text(body["remote"])),
        "OWNERS": lambda body: (
            ", ".join(f"{safe(owner['name'], width)}[{owner['pid']}]" for owner in body["owners"]) or "-"
        ),
        "PATH": lambda body: safe(body["owners"][0]["path"] or "") if body["owners"] else "",
        "USER": lambda body: _user(body["owners"][0]) if body["owners"] else "",
        **({"COMPARTMENT" if windows else "NETNS": lambda body: str(body["netns"])} if several or not windows else {}),
    }
    _print(output, bodies, columns)
    if not bodies and any(gap.what == NO_NETWORK for gap in snapshot.gaps):
        raise typer.Exit(UnsupportedGuest.exit_code)  # why was said; an empty list alone would say something else


def _print(output: Output, bodies: list[dict[str, Any]], columns: dict[str, Column]) -> None:
    """Print objects; flags have a column where there are any."""
    if any(body["flags"] for body in bodies):
        columns["FLAGS"] = lambda body: " ".join(body["flags"])
    rows = [[cell(body) for cell in columns.values()] for body in bodies]
    print_objects(output, bodies, tuple(columns), rows, folding=("PATH", "USER", "NAME", "COMMAND"))


def _look(target: str, symbols: list[Path] | None, route: str | None, changes: bool) -> tuple[GuestInfo, str, Snapshot]:
    info = resolve(target)
    with working(f"attaching to {info.id.target}"):
        eye = open_eye(info, symbols or (), thorough=True, route=route, change_domain=changes)
        try:
            snapshot = eye.read_snapshot()
        finally:
            eye.close()
    tell_gaps(snapshot)
    return info, eye.os, snapshot


def tell_gaps(snapshot: Snapshot) -> None:
    """Say what a look could not see."""
    for gap in snapshot.gaps[:MAX_GAPS]:
        where = f" at {gap.address:#x}" if gap.address else ""
        tell(f"not seen: {gap.what}{where}: {gap.why}")
    if len(snapshot.gaps) > MAX_GAPS:
        tell(f"not seen: {len(snapshot.gaps) - MAX_GAPS} more gaps")


def _user(owner: dict[str, Any]) -> str:
    """The user's name; without one the uid of Linux or the SID of Windows."""
    known = next((owner[key] for key in ("user", "uid", "sid") if owner[key] is not None), "")
    return safe(str(known).removeprefix("NT AUTHORITY\\"), 48)
