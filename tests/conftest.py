"""What all tiers share: the switch that says whether kernel and lab tests run."""

import os
import signal
import stat
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tracer.errors import LoadError
from tracer.kernel import ladder

SWITCH = "SRCIP_KERNEL_TESTS"
ROOT = Path(__file__).parents[1]

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


def pytest_terminal_summary(terminalreporter):
    """Say what was skipped and why, in a line for each folder and reason."""
    skipped = Counter(
        (str(Path(report.nodeid.partition("::")[0]).parent), report.longrepr[2])
        for report in terminalreporter.getreports("skipped")
    )
    if skipped:
        terminalreporter.section("skipped")
    for (folder, reason), count in sorted(skipped.items()):
        why = reason.removeprefix("Skipped: ")
        terminalreporter.write_line(f"{folder}: {count} skipped: {why}")


@pytest.fixture(scope="session")
def kernel():
    """
    Root and a kernel to test in.

    ``SRCIP_KERNEL_TESTS`` unset: skipped with the reason where they are missing; ``1``: their lack
    is an error; ``0``: always skipped.
    """
    _require(_why_not())


@pytest.fixture(scope="session")
def others():
    """Other users may read this checkout, as tests need that run srcip as one of them."""
    closed = [each for each in (ROOT, *ROOT.parents) if not each.stat().st_mode & stat.S_IXOTH]
    _require(f"only root may read {closed[0]}, where this checkout is" if closed else None)


@pytest.fixture(scope="session")
def own_mounts():
    """The root directory is a mount, as ``unshare --mount`` wants it; a plain chroot's is not."""
    points = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    _require(None if "/" in points else "the root directory is not a mount, as in a plain chroot")


def _require(reason):
    wish = os.environ.get(SWITCH, "")
    if wish == "0":
        pytest.skip(f"{SWITCH}=0")
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
