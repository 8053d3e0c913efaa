"""
kube-proxy's IPVS mode, under a kernel that has IPVS: 'make vm', and docs/kernels.md.

Only with SRCIP_VM_TESTS=1. What such a kernel did is recorded in tests/data/ipvs, and
tests/unit/test_ipvs.py judges it without one.
"""

import json
import shutil

import pytest

from tests.vm.test_kernels import PYTHON, TESTS, assert_well, why_not
from tests.vm.test_kernels import run_in_vm as _run_in_vm

# Debian's kernels have IPVS; one of those with netfilter links.
run_in_vm = pytest.fixture(scope="module", params=["6.12"])(_run_in_vm.__wrapped__)
SRCIP = (PYTHON, "-m", "tracer.cli")


@pytest.fixture(autouse=True)
def tools():
    """What sets IPVS up; 'make vm' installs it."""
    if why_not() is None and (missing := [t for t in ("ipvsadm", "ipset") if not shutil.which(t)]):
        pytest.skip(f"not installed: {', '.join(missing)}")


# Whole paths beside tcpdump; the tests take IPVS mode where its module is there before.
PATHS = (
    *("sh", "-c", 'modprobe ip_vs && exec "$@"', "sh", "env", "SRCIP_TEST_PATIENCE_S=200"),
    *(*TESTS, "-x", "tests/lab/test_paths.py", "-k", "ipvs and not replay"),
)


def test_paths(run_in_vm):
    """Hops are those that tcpdump captures; DNAT, SNAT and what is undone are where they are."""
    assert_well(run_in_vm(*PATHS))


def test_demo(run_in_vm):
    """Every scenario is answered as the backend saw it, in both families, over TCP and UDP."""
    done = run_in_vm(*SRCIP, "demo", "--mode", "ipvs", "-o", "json")
    assert_well(done)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    rows = [row for row in rows if row["kind"] == "scenario"]
    assert [row for row in rows if not row["agrees"]] == []
    assert len(rows) == 112
