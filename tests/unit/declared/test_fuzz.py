"""A part of what 'make fuzz' does at length."""

import random

from tests.fuzz.__main__ import check, damaged


def test_damaged_headers():
    """Damaged headers are decided without an error; nothing but addresses and tokens is kept."""
    chance = random.Random(7)
    found = {check(damaged(chance), chance).opening for _ in range(20_000)}
    assert len(found) == 4
