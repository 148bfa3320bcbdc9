"""Verbs that look once: ``guests``, ``processes``, ``connections``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from appliance.cli import contract
from appliance.cli.progress import tell, working
from appliance.cli.render import Output, endpoint_text, print_objects, safe
from appliance.hosts.qemu import find_guests
from appliance.hosts.targets import resolve
from appliance.model import GuestInfo, Snapshot
from appliance.opening import open_eye

TargetArgument = Annotated[str, typer.Argument(metavar="TARGET", help="A libvirt name or UUID, qemu:PID or file:PATH.")]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How to print the result.")]


def guests(output: OutputOption = Output.TABLE) -> None:
    """List the guests that run here and how each can be seen."""
    bodies = [contract.guest(one) for one in find_guests()]
    rows = [
        (
            body["vm"],
            safe(body["name"] or "-"),
            body["uuid"] or "-",
            f"{body['memory_bytes'] >> 20} MiB" if body["memory_bytes"] else "?",
            ", ".join(port["ifname"] for port in body["ports"]) or "none",
            safe("; ".join(body["notes"])),
        )
        for body in bodies
    ]
    print_objects(output, bodies, ("VM", "NAME", "UUID", "MEMORY", "PORTS", "NOTES"), rows)
    if not bodies:
        tell("no running guest was found here; qemu:PID, file:PATH and port:IFNAME can be named all the same")


def processes(target: TargetArgument, output: OutputOption = Output.TABLE) -> None:
    """List the processes of one guest, as its kernel's own memory tells them."""
    _, snapshot = _look(target)
    bodies = [contract.process(one) or {} for one in snapshot.processes]
    rows = [
        (
            str(body["pid"]),
            str(body["parent_pid"]),
            _user(body),
            safe(body["name"], 16),
            safe(body["command"] or body["path"] or "[kernel]"),
            safe(body["container"] or "", 14),
        )
        for body in bodies
    ]
    print_objects(output, bodies, ("PID", "PPID", "USER", "NAME", "COMMAND", "CONTAINER"), rows)


def connections(target: TargetArgument, output: OutputOption = Output.TABLE) -> None:
    """List every socket of one guest with the processes that hold it, like ss -tuanp run from outside."""
    info, snapshot = _look(target)
    bodies = [contract.connection(info.id.target, one) for one in snapshot.sockets]
    rows = [
        (
            body["protocol"],
            body["state"],
            safe(endpoint_text(body["local"])),
            safe(endpoint_text(body["remote"])),
            ", ".join(f"{safe(owner['name'], 16)}[{owner['pid']}]" for owner in body["owners"]) or "-",
            safe(body["owners"][0]["path"] or "") if body["owners"] else "",
            _user(body["owners"][0]) if body["owners"] else "",
            str(body["netns"]),
        )
        for body in bodies
    ]
    print_objects(output, bodies, ("PROTO", "STATE", "LOCAL", "REMOTE", "OWNERS", "PATH", "USER", "NETNS"), rows)


def _look(target: str) -> tuple[GuestInfo, Snapshot]:
    info = resolve(target)
    with working(f"attaching to {info.id.target}"):
        eye = open_eye(info)
        try:
            snapshot = eye.read_snapshot()
        finally:
            eye.close()
    for gap in snapshot.gaps[:20]:
        tell(f"not seen: {safe(gap.what)} at {gap.address:#x}: {safe(gap.why)}")
    if len(snapshot.gaps) > 20:
        tell(f"not seen: {len(snapshot.gaps) - 20} more gaps")
    return info, snapshot


def _user(owner: dict[str, Any]) -> str:
    return safe(owner["user"] or owner["uid"], 16)
