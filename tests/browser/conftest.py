"""What the tests in a browser need beside Python: `make test` installs it."""

import os
from pathlib import Path

import pytest

from tests.browser import driver
from tests.conftest import SWITCH

_NEEDED = ("/usr/bin/chromium", "/usr/bin/chromedriver")


@pytest.fixture(scope="session")
def browser():
    """A browser; skipped where there is none, an error if ``SRCIP_KERNEL_TESTS=1``."""
    missing = [each for each in _NEEDED if not Path(each).exists()]
    if missing:
        reason = f"{missing[0]} is not installed"
        if os.environ.get(SWITCH) == "1":
            pytest.fail(f"{SWITCH}=1, but {reason}")
        pytest.skip(f"{reason}; 'make setup-browser' installs it")
    with driver.browser() as found:
        yield found
