"""The program as a whole: what a guest's text must not do to it."""

import os
import subprocess
import sys
from dataclasses import replace

from appliance.cli import contract
from appliance.model import Binding, Match
from appliance.store.book import Book
from tests.respond.desks import verdict
from tests.worlds.command import ROOT, environment
from tests.worlds.nouns import owner


def test_a_name_that_the_terminal_has_no_letters_for_is_shown_by_its_numbers(tmp_path):
    one = replace(verdict(), binding=Binding(Match.EXACT, None, (owner(name="caf\u00e9"),), 1000))
    body = contract.verdict(one)
    (tmp_path / "state").mkdir()
    env = environment(tmp_path) | {"PYTHONIOENCODING": "ascii"}
    book = Book(tmp_path / "state" / "book.sqlite")
    book.write(body["id"], one.at_ns, body)
    book.close()
    command = [sys.executable, "-m", "appliance.cli", "explain", body["id"]]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"caf\xe9" in done.stdout
