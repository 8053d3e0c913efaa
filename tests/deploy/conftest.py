"""What the tests of `deploy/` need beside Python: `make test` installs it."""

import os
import shutil

import pytest

from tests.conftest import SWITCH


def _missing(reason):
    if os.environ.get(SWITCH) == "1":
        pytest.fail(f"{SWITCH}=1, but {reason}")
    pytest.skip(f"{reason}; 'make setup-deploy' installs it")


def _tool(name):
    found = shutil.which(name)
    if found is None:
        _missing(f"{name} is not installed")
    return found


@pytest.fixture(scope="session")
def promtool():
    """Prometheus' own checker."""
    return _tool("promtool")
