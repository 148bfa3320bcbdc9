"""Verbs that check: ``doctor`` and ``rules check|test|schema``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from appliance.cli.progress import tell, working
from appliance.cli.reach import find_guests, probe_libraries, probe_routes
from appliance.cli.render import Output, console, print_objects, safe
from appliance.evidence.volatility import probe as probe_volatility
from appliance.flow.community import community_id
from appliance.flow.table import FlowTable
from appliance.flow.tracking import TrackedTap
from appliance.hosts.probe import probe_host
from appliance.hosts.probe_xen import is_xen
from appliance.model import Availability, GuestId, GuestPort
from appliance.rules import load, schema
from appliance.tap.af_packet import PortSource
from appliance.tap.trial import probe_ports, probe_rungs

rules = typer.Typer(help="Check, test and describe rule files.", no_args_is_help=True, rich_markup_mode=None)

OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How to print the result.")]
PathsArgument = Annotated[list[Path], typer.Argument(metavar="PATH...", help="Rule files or folders of them.")]

MAX_REASON = 400  # characters: what a kernel or a library says can be long
_WORDS = {
    (True, True): "[green]PASS[/]",
    (False, True): "[bold red]FAIL[/]",
    (True, False): "[green]PASS[/]",
    (False, False): "[yellow]WARN[/]",
}


def doctor(output: OutputOption = Output.TABLE) -> None:
    """Check this host: what works, what is missing, and the command that mends it."""
    with working("looking at this host and its guests"):
        guests, troubles = find_guests()
        found = (
            *probe_host(guests, troubles),
            *probe_libraries(xen=is_xen()),
            probe_volatility(),
            *probe_rungs(time.time_ns, community_id, _open_packets),
            *probe_ports(guests),
            *probe_routes(guests),
        )
    bodies = [
        {"name": one.name, "ok": one.ok, "required": one.required, "reason": one.reason, "remedy": one.remedy}
        for one in found
    ]
    rows = [(_WORDS[one.ok, one.required], safe(one.name), _explain(one)) for one in found]
    print_objects(output, bodies, ("", "CHECK", "FOUND"), rows, folding=("FOUND",))
    raise typer.Exit(0 if all(one.ok or not one.required for one in found) else 1)


def _explain(one: Availability) -> str:
    """What was found, and below it what mends it."""
    reason = safe(one.reason, MAX_REASON)
    return reason if one.remedy is None else f"{reason}\n[cyan]\u2192 {safe(one.remedy, MAX_REASON)}[/]"


def _open_packets(port: GuestPort) -> TrackedTap:
    vm = GuestId(f"port:{port.ifname}")
    return TrackedTap(vm, PortSource(port), FlowTable(vm), time.time_ns)


@rules.command("check")
def rules_check(paths: PathsArgument, output: OutputOption = Output.TABLE) -> None:
    """Load rule files and report every mistake at once, each as path:line:column."""
    book = load(paths)
    for warning in book.warnings:
        tell(f"{warning} (warning)")
    body = {
        "ok": True,
        "version": book.version,
        "profiles": sum(len(one.profile_names) for one in book.sets),
        "warnings": [str(w) for w in book.warnings],
    }
    if output is Output.TABLE:
        console().print(f"[green]ok[/]  {body['profiles']} profiles, version {safe(book.version)}")
    else:
        print_objects(output, [body], (), ())


@rules.command("test")
def rules_test(paths: PathsArgument, output: OutputOption = Output.TABLE) -> None:
    """Run the tests inside rule files."""
    results = load(paths).test()
    bodies = [
        {"ok": one.ok, "name": one.name, "file": one.file, "line": one.line, "message": one.why} for one in results
    ]
    rows = [
        (
            "[green]ok[/]" if one.ok else "[bold red]FAILED[/]",
            f"{safe(one.file)}:{one.line}",
            safe(one.name),
            safe(one.why, 300),
        )
        for one in results
    ]
    print_objects(output, bodies, ("", "WHERE", "TEST", "WHY"), rows)
    failed = sum(not one.ok for one in results)
    tell(f"{len(results) - failed} passed, {failed} failed")
    raise typer.Exit(1 if failed else 0)


@rules.command("schema")
def rules_schema() -> None:
    """Print the JSON Schema of rule files, for editors."""
    typer.echo(json.dumps(schema(), indent=2))
