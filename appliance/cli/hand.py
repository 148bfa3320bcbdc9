"""Verbs that speak to a running appliance: how it goes, a person's decisions, bans."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from appliance.cli import story
from appliance.cli.duration import duration_text, parse_duration
from appliance.cli.progress import tell
from appliance.cli.render import Output, console, print_objects, safe
from appliance.respond.client import ask

Json = dict[str, Any]

_YET = 1  # exit code: written down, but not in force everywhere; or too late

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The id of a verdict, or its first digits.")]
PeerArgument = Annotated[
    str, typer.Argument(metavar="PEER", help="An address or a network: 203.0.113.9, 2001:db8::/48.")
]
GuestOption = Annotated[str | None, typer.Option("--guest", metavar="TARGET", help="Only this guest; all if left out.")]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How to print the result.")]


class Choice(StrEnum):
    """A person's decision on a held connection."""

    ALLOW = "allow"
    BLOCK = "block"


def status(output: OutputOption = Output.TABLE) -> None:
    """Tell how each guest is watched right now by the appliance that runs here."""
    body = ask({"do": "status"})
    rows = [
        (
            safe(guest["vm"]),
            safe(guest["name"] or "-"),
            safe(guest["rung"] or "?"),
            "enforce" if guest["enforces"] else "?" if guest["enforces"] is None else "monitor",
            *(_count(guest[key]) for key in ("flows", "held", "blocked", "banned")),
            duration_text(guest["uptime_s"]),
            safe(guest["trouble"] or "", 160),
        )
        for guest in body["guests"]
    ]
    columns = ("VM", "NAME", "SEEN BY", "MODE", "FLOWS", "HELD", "BLOCKED", "BANS", "UP", "TROUBLE")
    print_objects(output, [body], columns, rows)
    if output is Output.TABLE:
        tell(f"appliance {body['version']}, pid {body['pid']}, up {duration_text(body['uptime_s'])}")


def held(output: OutputOption = Output.TABLE) -> None:
    """List the connections that wait for a person's decision, the most urgent first."""
    bodies = ask({"do": "held"})
    rows = [
        (
            body["id"],
            f"{duration_text(body['left_s'])}, then {body['default']}",
            safe(body["vm"]),
            story.process_text(body),
            story.connection_text(body["flow"]),
            safe(", ".join(body["flow"]["names"]), 60),
            safe(body["because"], 200),
        )
        for body in bodies
    ]
    print_objects(output, bodies, ("ID", "LEFT", "VM", "PROCESS", "CONNECTION", "NAMES", "WHY"), rows)
    if not bodies:
        tell("no connection waits for a decision")


def decide(
    verdict_id: IdArgument,
    choice: Annotated[Choice, typer.Argument(metavar="allow|block", help="What becomes of it.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Decide on one connection that waits: let it go on, or block it."""
    body = ask({"do": "decide", "id": verdict_id, "allow": choice is Choice.ALLOW})
    word = "allowed" if choice is Choice.ALLOW else "blocked"
    _print(output, body, f"{body['id']} of {safe(body['vm'])} is {word}")


def block(
    verdict_id: IdArgument,
    reset: Annotated[bool, typer.Option("--reset", help="Tell both ends of a TCP connection that it is over.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Stop one connection that was seen by the running watch; nothing else of its guest is touched."""
    _act("reset" if reset else "block", verdict_id, "is blocked", output)


def release(verdict_id: IdArgument, output: OutputOption = Output.TABLE) -> None:
    """Let one connection go on that was stopped."""
    _act("release", verdict_id, "goes on", output)


def ban(
    peer: PeerArgument,
    guest: GuestOption = None,
    duration: Annotated[
        str | None, typer.Option("--for", metavar="1h", help="How long; until it is lifted if left out.")
    ] = None,
    reason: Annotated[
        str | None, typer.Option("--reason", metavar="TEXT", help="Why, for those who read it later.")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Ban an address or a network: its packets, from and to the guests, are dropped; open connections too."""
    request: Json = {"do": "ban", "peer": peer, "guest": guest, "reason": reason}
    body = ask(request | {"seconds": parse_duration(duration)})
    _print(output, body, f"{_ban_text(body['ban'])}" + (", in place of an older ban" if body["replaced"] else ""))
    _not_yet(body)


def unban(peer: PeerArgument, guest: GuestOption = None, output: OutputOption = Output.TABLE) -> None:
    """Lift the ban of exactly this address or network."""
    body = ask({"do": "unban", "peer": peer, "guest": guest})
    lines = [
        f"{one['peer']} is not banned any more, for {safe(one['guest'] or 'all guests')}" for one in body["lifted"]
    ]
    lines += [f"but it is covered still: {_ban_text(one)}" for one in body["still"]]
    _print(output, body, "\n".join(lines))
    _not_yet(body)


def bans(output: OutputOption = Output.TABLE) -> None:
    """List the bans that stand."""
    bodies = ask({"do": "bans"})
    rows = [
        (
            safe(body["peer"]),
            safe(body["guest"] or "all"),
            duration_text(body["left_s"]),
            body["since"],
            safe(body["who"]),
            safe(body["reason"], 200),
        )
        for body in bodies
    ]
    print_objects(output, bodies, ("PEER", "GUEST", "LEFT", "SINCE", "BY", "REASON"), rows)
    if not bodies:
        tell("nobody is banned")


def _act(do: str, verdict_id: str, words: str, output: Output) -> None:
    body = ask({"do": do, "id": verdict_id})
    done = body["done"]
    outcome = words if done else "is over already, or the host refused: nothing was done"
    _print(output, body, f"{body['id']} of {safe(body['vm'])} {outcome}")
    if not done:
        raise typer.Exit(_YET)


def _print(output: Output, body: Json, words: str) -> None:
    """One object for machines, one sentence for people."""
    if output is Output.TABLE:
        console().print(words)
    else:
        print_objects(output, [body], (), ())


def _not_yet(body: Json) -> None:
    for one in body["not_yet"]:
        tell(f"not yet in force for {one['vm']}: {one['why']}")
    if body["not_yet"]:
        raise typer.Exit(_YET)


def _ban_text(one: Json) -> str:
    end = f"for {duration_text(one['left_s'])}" if one["until"] else "until it is lifted"
    return f"{one['peer']} is banned {end}, for {safe(one['guest'] or 'all guests')}"


def _count(value: int | None) -> str:
    return "?" if value is None else str(value)
