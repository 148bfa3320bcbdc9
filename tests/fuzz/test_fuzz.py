"""A thousand damaged guests: looking at them ends, and raises nothing but GuestError."""

import pytest

from tests.fuzz.fuzzer import fuzz
from tests.fuzz.targets import NAMES, open_target

ROUNDS = -(-1000 // len(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_a_guest_with_damaged_bytes_is_looked_at_or_refused(name, tmp_path):
    with open_target(name, tmp_path) as target:
        result = fuzz(target, ROUNDS, seed=2026, fresh=48)
    assert result.failures == []
    assert result.rounds == ROUNDS
    assert result.outcomes["looked"] > ROUNDS // 4, result.outcomes  # else the damage never gets past the attach
    assert result.outcomes["looked"] < ROUNDS or result.gaps, result.outcomes  # else it damages nothing
