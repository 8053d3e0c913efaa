"""What all tiers share: the switch that says whether kernel and lab tests run."""

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

from tracer.errors import LoadError
from tracer.kernel import ladder

SWITCH = "SRCIP_KERNEL_TESTS"

# How long an example takes says something about the machine, not about the code.
settings.register_profile("srcip", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("srcip")


def pytest_configure():
    """
    End on SIGTERM as on Ctrl-C, so that fixtures remove their namespaces.

    A shell without job control makes what it starts in the background deaf to Ctrl-C, with all its
    children, to which tests send it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def kernel():
    """
    Root and a kernel to test in.

    ``SRCIP_KERNEL_TESTS`` unset: skipped with the reason where they are missing; ``1``: their lack
    is an error; ``0``: always skipped.
    """
    wish = os.environ.get(SWITCH, "")
    if wish == "0":
        pytest.skip(f"{SWITCH}=0")
    reason = _why_not()
    if reason is None:
        return
    if wish == "1":
        pytest.fail(f"{SWITCH}=1, but {reason}")
    pytest.skip(f"{reason}; see CONTRIBUTING.md")


def _why_not():
    """Return what is missing to test in the kernel, None if nothing is."""
    if os.geteuid():
        return "not root"
    try:
        ladder.require_programs(None)
    except LoadError as error:
        return str(error)
    return None
