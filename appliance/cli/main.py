"""The verbs of ``parasight``.

Exit codes: 0 fine, 1 something was flagged or failed, 2 usage, 3 unusable file, 5 permission, 6 host or guest not
supported, 70 a defect of ours, 130 interrupted.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import sys
from collections.abc import Callable
from typing import Annotated, ParamSpec, TypeVar, cast

import typer

from appliance import __version__
from appliance.cli import check, conformance, hand, look, stop, suggest, watching
from appliance.errors import ConfigError, ParasightError, RuleError, UsageError

INTERRUPTED = 130
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
P = ParamSpec("P")
R = TypeVar("R")

# Typer keeps its copy of click to itself; the class of all mistakes in a command line is the base of one it shows.
_CommandLineError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="parasight",
    help="Binds every connection of a virtual machine to the guest process that owns it, and judges it.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"parasight {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Watch virtual machines from outside."""


class _ReaderLeft(Exception):
    """The reader of our output has left, as ``head`` does."""


def _quiet(verb: Callable[P, R]) -> Callable[P, R]:
    """Let a broken pipe pass Typer, which would end the program with 1: our word for "flagged"."""

    @functools.wraps(verb)
    def run_verb(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return verb(*args, **kwargs)
        except BrokenPipeError as error:
            raise _ReaderLeft from error

    return run_verb


app.command()(_quiet(look.guests))
app.command()(_quiet(look.processes))
app.command()(_quiet(look.connections))
app.command()(_quiet(watching.watch))
app.command()(_quiet(watching.replay))
app.command()(_quiet(watching.explain))
app.command()(_quiet(check.doctor))
app.command()(_quiet(conformance.conformance))
app.command()(_quiet(stop.stop))
app.command()(_quiet(hand.status))
app.command()(_quiet(hand.held))
app.command()(_quiet(hand.decide))
app.command()(_quiet(hand.block))
app.command()(_quiet(hand.release))
app.command()(_quiet(hand.ban))
app.command()(_quiet(hand.unban))
app.command()(_quiet(hand.bans))
check.rules.command("suggest")(suggest.suggest)
app.add_typer(check.rules, name="rules")


def run() -> None:
    """Run one command; every expected failure is one message and its exit code, never a traceback."""
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  as long as we run
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a guest's text that the terminal has no letters for
    try:
        code = app(standalone_mode=False)
    except ParasightError as error:
        _complain(error)
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except _CommandLineError as error:
        cast("typer.BadParameter", error).show()
        code = UsageError.exit_code
    except (_ReaderLeft, BrokenPipeError):
        _mute()
        code = 0
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        _mute()
        print(f"parasight: the output cannot be written: {error.strerror}", file=sys.stderr)
        code = ConfigError.exit_code
    sys.exit(code if isinstance(code, int) else 0)


def _mute() -> None:
    """What Python still wants to write when it ends goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(error: ParasightError) -> None:
    if isinstance(error, RuleError):
        print(error, file=sys.stderr)
        count = len(error.problems)
        print(f"parasight: {count} mistake{'s' if count > 1 else ''} in the rules; nothing was loaded", file=sys.stderr)
        return
    print(f"parasight: {error}", file=sys.stderr)
