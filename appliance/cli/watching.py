"""Verbs that judge: ``watch``, ``replay``, ``explain``."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections import OrderedDict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

import typer

from appliance import __version__, daemon
from appliance.assembly import Options
from appliance.cli import contract, story
from appliance.cli.duration import parse_duration
from appliance.cli.look import ChangesOption, RouteOption, SymbolsOption
from appliance.cli.progress import tell, working
from appliance.cli.render import Output, Printer
from appliance.errors import ConfigError, GuestGone, UsageError
from appliance.model import Decoy, GuestPort, Verdict
from appliance.respond.room import Words
from appliance.rules import RuleBook, load
from appliance.store.book import Book, default_path
from appliance.summary import Summary

SHIPPED_RULES = Path(__file__).resolve().parents[2] / "rules"
MAX_SHOWN = 1024  # rows of a table that are remembered, for those that are told again
DEFECT = 70  # as in sysexits.h: an error of the program itself

_DECOY = re.compile(r"(?P<name>[\w.-]+)=(?P<ifname>[^,/\s]{1,15}),(?P<mac>(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2})")


class Fail(StrEnum):
    """What becomes of an enforced guest's network without us."""

    OPEN = "open"
    CLOSED = "closed"


RulesOption = Annotated[
    list[Path] | None,
    typer.Option("--rules", metavar="PATH", help="Rule files or folders; the shipped sets if left out."),
]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How to print the verdicts.")]
AllOption = Annotated[bool, typer.Option("--all/--alerts", help="Show every verdict, or only those worth an alert.")]


def watch(
    targets: Annotated[
        list[str] | None,
        typer.Argument(metavar="TARGET...", help="Guests to watch; also port:IFNAME. Left out: all, also later ones."),
    ] = None,
    rules: RulesOption = None,
    duration: Annotated[str | None, typer.Option("--for", metavar="30s", help="Stop after this long.")] = None,
    enforce: Annotated[
        bool, typer.Option("--enforce", help="Let rules with mode: enforce act: hold, block, reset, redirect.")
    ] = False,
    fail: Annotated[
        Fail, typer.Option(help="What an enforced guest's new connections do when Parasight dies: pass, or stay out.")
    ] = Fail.OPEN,
    tap: Annotated[
        str | None, typer.Option(metavar="RUNG", help="The only tap to try, as doctor names it; the best if left out.")
    ] = None,
    decoy: Annotated[
        list[str] | None, typer.Option(metavar="NAME=IFNAME,MAC", help="Where on_deny: redirect:NAME leads to.")
    ] = None,
    never_ban: Annotated[Path | None, typer.Option(metavar="FILE", help="Networks that no ban may cover.")] = None,
    opt_in: Annotated[
        bool, typer.Option("--opt-in", help="Without TARGET: only guests whose metadata asks for a watch.")
    ] = False,
    route: RouteOption = None,
    changes: ChangesOption = False,
    symbols: SymbolsOption = None,
    second_opinion: Annotated[
        bool, typer.Option(help="Let Volatility, where it is installed, look at denied processes too.")
    ] = True,
    output: OutputOption = Output.TABLE,
    everything: AllOption = True,
) -> None:
    """Watch running guests: bind each new connection to its process, judge it, say what is wrong with it."""
    options = Options(
        enforce=enforce,
        fail_closed=fail is Fail.CLOSED,
        rung=tap,
        decoys=tuple(_parse_decoy(text) for text in decoy or ()),
        never_ban=never_ban,
        bans=default_path().with_name("bans.json"),
        symbols=tuple(symbols or ()),
        second_opinion=second_opinion,
        opt_in=opt_in,
        route=route,
        change_domain=changes,
    )
    if targets and opt_in:
        raise UsageError("--opt-in chooses among all guests: leave it out, or the names")
    seconds = parse_duration(duration)
    book = _rules(rules)
    if drafts := [one.file for one in book.sets if one.draft]:
        raise ConfigError(f"{drafts[0]} is a draft: read it, then write status: reviewed; parasight replay may use it")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with _Showing(output, everything=everything) as showing:
        until = None if seconds is None else time.monotonic() + seconds
        cpu_start_s = time.process_time()
        summaries = daemon.watch(
            targets or [],
            book,
            showing.verdict,
            stop=stop,
            ready=lambda: tell("ready"),
            idle=showing.idle,
            tell=tell,
            words=Words(contract.verdict, contract.iso),
            options=options,
            until=until,
            version=__version__,
        )
        showing.summary(summaries, time.process_time() - cpu_start_s)
    if any(one.defect for one in summaries):
        raise typer.Exit(DEFECT)
    if targets and not showing.exit_code and all(one.ended and not one.awaited for one in summaries):
        raise GuestGone("no guest is left to watch: " + "; ".join(f"{one.vm}: {one.ended}" for one in summaries))
    raise typer.Exit(showing.exit_code)


def replay(
    pcap: Annotated[Path, typer.Option("--pcap", metavar="FILE", help="A pcap or pcapng capture of the guest's port.")],
    memory: Annotated[
        Path | None, typer.Option("--memory", metavar="FILE", help="Memory image of the guest: raw, LiME or ELF core.")
    ] = None,
    rules: RulesOption = None,
    local: Annotated[
        list[str] | None, typer.Option("--local", metavar="IP", help="An address of the guest; guessed if left out.")
    ] = None,
    symbols: SymbolsOption = None,
    output: OutputOption = Output.TABLE,
    everything: AllOption = True,
) -> None:
    """Judge a recorded capture against a memory image, exactly as a live watch would."""
    book = _rules(rules)
    with _Showing(output, everything=everything) as showing, working(f"replaying {pcap}"):
        cpu_start_s = time.process_time()
        summary = daemon.replay(
            pcap, memory, book, showing.verdict, tell=tell, local=frozenset(local or ()), symbols=symbols or ()
        )
        showing.summary([summary], time.process_time() - cpu_start_s)
    if summary.ended:
        raise ConfigError(summary.ended)
    raise typer.Exit(showing.exit_code)


def explain(
    verdict_id: Annotated[str, typer.Argument(metavar="ID", help="The id of a verdict, or its first digits.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Tell everything about one verdict: the flow, how its process was found, the rule and the evidence."""
    book = Book(default_path())
    found = book.find(verdict_id.lower())
    book.close()
    if not found:
        raise UsageError(
            f"no verdict {verdict_id!r} is in the book {default_path()}; ids are printed by watch and replay"
        )
    if len(found) > 1:
        raise UsageError(f"{verdict_id!r} begins several ids: give more of its digits")
    if output is Output.TABLE:
        story.print_story(found[0])
        return
    printer = Printer(output)
    printer.start()
    printer.add(found[0])
    printer.end()


def _parse_decoy(text: str) -> Decoy:
    """``NAME=IFNAME,MAC``. Raises UsageError."""
    match = _DECOY.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"--decoy {text!r}: say NAME=IFNAME,MAC, as in honeypot-1=veth-hp,52:54:00:aa:bb:cc")
    return Decoy(match["name"], GuestPort(match["ifname"]), match["mac"].lower())


class _Showing:
    """Prints verdicts as they come, writes them into the book, remembers whether anything was flagged."""

    def __init__(self, output: Output, *, everything: bool) -> None:
        self._output, self._everything = output, everything
        self._printer = Printer(output)
        self._book: Book | None = None
        self._shown: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._added: tuple[str, list[dict[str, Any]]] = "", []  # what the last verdict got that was told again
        self.unrecorded = 0
        self.exit_code = 0

    def __enter__(self) -> Self:
        try:
            self._book = Book(default_path())
        except ConfigError as error:
            tell(f"{error}; explain will not know these verdicts")
        self._printer.start()
        return self

    def verdict(self, one: Verdict) -> str:
        """Write down and show one verdict; its id."""
        body = contract.verdict(one)
        flagged = body["verdict"] == "deny" or body["alert"]
        self.exit_code |= int(flagged)
        if self._book is not None:
            self._record(self._book, body, one.at_ns)
        if flagged or self._everything:
            if self._output is Output.TABLE:
                self._print(body)
            else:
                self._printer.add(body)
        return str(body["id"])

    def _print(self, body: dict[str, Any]) -> None:
        before = self._shown.pop(body["id"], None)
        self._shown[body["id"]] = body
        if len(self._shown) > MAX_SHOWN:
            self._shown.popitem(last=False)
        if before is None:
            story.print_row(body)
            return
        new = [item for item in body["evidence"] if item not in before["evidence"]]
        same = bool(new) and self._added[1] == new
        story.print_more(body, before, new, same_as=self._added[0] if same else None)
        if not same:
            self._added = body["id"], new

    def idle(self) -> None:
        """Nothing waits to be shown: let ``explain`` see what was."""
        if self._book is not None:
            try:
                self._book.commit()
            except ConfigError as error:
                self._lose(error)

    def _record(self, book: Book, body: dict[str, Any], at_ns: int) -> None:
        try:
            book.write(body["id"], at_ns, body)
        except ConfigError as error:
            self._lose(error)

    def _lose(self, error: ConfigError) -> None:
        if not self.unrecorded:
            tell(f"{error}; explain will not know these verdicts")
        self.unrecorded += 1

    def summary(self, summaries: list[Summary], cpu_s: float) -> None:
        """Show what was seen and what it cost."""
        body = contract.summary(summaries, cpu_s)
        if self._output is Output.TABLE:
            story.print_summary(body)
        else:
            self._printer.add(body)

    def __exit__(self, *_: object) -> None:
        self._printer.end()
        if self._book is not None:
            try:
                self._book.close()
            except ConfigError as error:
                self._lose(error)


def _rules(paths: list[Path] | None) -> RuleBook:
    return load(paths or [SHIPPED_RULES])
