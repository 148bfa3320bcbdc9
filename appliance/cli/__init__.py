"""The command ``parasight``: what a person sees. One file per group of verbs."""

from __future__ import annotations


def main() -> None:
    """Entry point of the ``parasight`` command."""
    from appliance.cli.main import run  # noqa: PLC0415  imports of the verbs cost time, ``--version`` should not

    run()
