"""The verbs of ``parasight``.

Exit codes: 0 fine, 1 something was flagged or failed, 2 usage, 3 unusable file, 5 permission, 6 host or guest not
supported, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from appliance import __version__
from appliance.cli import check, look, watching
from appliance.errors import ParasightError, RuleError

INTERRUPTED = 130

app = typer.Typer(
    name="parasight",
    help="Binds every connection of a virtual machine to the guest process that owns it, and judges it. Read-only.",
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


app.command()(look.guests)
app.command()(look.processes)
app.command()(look.connections)
app.command()(watching.watch)
app.command()(watching.replay)
app.command()(watching.explain)
app.command()(check.doctor)
app.add_typer(check.rules, name="rules")


def run() -> None:
    """Run one command; every expected failure is one message and its exit code, never a traceback."""
    try:
        code = app(standalone_mode=False)
    except ParasightError as error:
        _complain(error)
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as ``head`` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def _complain(error: ParasightError) -> None:
    if isinstance(error, RuleError):
        for problem in error.problems:
            print(problem, file=sys.stderr)
        count = len(error.problems)
        print(f"parasight: {count} mistake{'s' if count > 1 else ''} in the rules; nothing was loaded", file=sys.stderr)
        return
    print(f"parasight: {error}", file=sys.stderr)
