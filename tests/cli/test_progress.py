"""What goes to stderr."""

import os

from appliance.cli.progress import tell


def test_a_log_that_nobody_reads_any_more_does_not_end_the_watch(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", buffering=0) as raw:
        monkeypatch.setattr("sys.stderr", open(raw.fileno(), "w", closefd=False))  # noqa: SIM115
        tell("ready")
        tell("ready")
