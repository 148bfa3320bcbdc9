"""Machines that several tests of Windows look into."""

import pytest

from tests.guest.windows.machines import ALICE, SOME, make
from tests.worlds.windows import Machine
from tests.worlds.windows.xp import XpMachine


@pytest.fixture(params=SOME)
def machine(request):
    made = make(request.param, standard=False)
    yield made
    made.close()


@pytest.fixture
def bare():
    """A server without the processes that every Windows has."""
    with Machine("20348", standard=False) as made:
        yield made


@pytest.fixture
def server():
    with Machine("20348") as made:
        yield made


@pytest.fixture
def xp():
    made = XpMachine("xp-sp3")
    yield made
    made.close()


@pytest.fixture
def notepad(machine):
    """Any person's program."""
    return machine.process("notepad.exe", sid=ALICE, session=1)
