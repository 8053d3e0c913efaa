"""What the tests of `deploy/` need beside Python: `make test` installs it."""

import importlib
import os
import shutil

import pytest

from tests.conftest import SWITCH


def _missing(reason):
    if os.environ.get(SWITCH) == "1":
        pytest.fail(f"{SWITCH}=1, but {reason}")
    pytest.skip(f"{reason}; 'make setup-deploy' installs it")


def tool(name):
    """Return where a program is that only these tests need."""
    found = shutil.which(name)
    if found is None:
        _missing(f"{name} is not installed")
    return found


def library(name):
    """Import a module that only these tests need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get(SWITCH) == "1":
            raise
        pytest.skip(f"{error}; 'make setup-deploy' installs it", allow_module_level=True)


@pytest.fixture(scope="session")
def promtool():
    """Prometheus' own checker."""
    return tool("promtool")
