"""
srcip under other kernels, each in a virtual machine: 'make vm', and docs/kernels.md.

Only with SRCIP_VM_TESTS=1: it downloads kernels, and takes minutes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SWITCH = "SRCIP_VM_TESTS"
VMRUN = Path(__file__).with_name("vmrun.sh")
FOREIGN_ROOT = Path(__file__).with_name("foreign_root.sh")
ROOT = Path(__file__).parents[2]
PYTHON = sys.executable
CACHE = Path(os.environ.get("VMRUN_CACHE") or Path.home() / ".cache/vmrun")
# Debian's newest kernel of each series, and which rung srcip finds there.
RUNGS = {
    "5.10": "probes in conntrack",
    "6.1": "probes in conntrack",
    "6.12": "BPF netfilter links",
    "7.3": "BPF netfilter links",
    "6.1 arm64": "probes in conntrack",
    "6.12 arm64": "BPF netfilter links",
}
NEEDED = ("qemu-system-x86_64", "busybox", "cpio", "depmod", "modprobe", "xz", "zstd")
LIMIT_S = 900
PATIENCE_S = 120
TESTS = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# Drops with reason, place and hook, accepts from the socket's tracepoint, NAT in both families.
KERNEL_TESTS = (
    "tests/kernel/test_connections.py::test_23_connections[4-tcp-both]",
    "tests/kernel/test_connections.py::test_23_connections[6-udp-both]",
    "tests/kernel/test_connections.py::test_accepts_are_the_servers_peers[6-both]",
    "tests/kernel/test_connections.py::test_interfaces_and_namespace",
    "tests/kernel/test_connections.py::test_delivered_here",
    "tests/kernel/test_connections.py::test_a_connection_over_loopback_is_one",
    "tests/kernel/test_connections.py::test_mark_before_snat",
    "tests/kernel/test_counters.py::test_counts_by_path",
    "tests/kernel/test_drops.py::test_dropped_by_a_rule[forward-client-address2-3-4]",
    "tests/kernel/test_drops.py::test_dropped_by_a_rule[output-node-address4-4-6]",
    "tests/kernel/test_drops.py::test_original_tuple_behind_dnat",
)
HOP_TESTS = (
    "tests/kernel/test_hops.py::test_forwarded[4-1-both]",
    "tests/kernel/test_hops.py::test_forwarded[6-2-both]",
    "tests/kernel/test_hops.py::test_bridge",
    "tests/kernel/test_hops.py::test_interface_that_appears",
    "tests/vm/test_stacked.py",
)


def why_not():
    """What is missing to run a virtual machine, None if nothing is."""
    if os.environ.get(SWITCH) != "1":
        return f"{SWITCH} is not 1; see docs/kernels.md"
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)}; see docs/kernels.md"
    return "not root" if os.geteuid() else None


@pytest.fixture(scope="module", params=RUNGS)
def run_in_vm(request):
    """Run a command under one kernel."""
    if reason := why_not():
        pytest.skip(reason)
    kernel, _, arch = request.param.partition(" ")
    options = foreign_options(arch) if arch else []
    fetched = subprocess.run(
        [VMRUN, *options, "--fetch-only", kernel], capture_output=True, text=True, check=False
    )
    if fetched.returncode:
        pytest.skip(f"no kernel {request.param}: {fetched.stderr.strip()}")
    options += ["--timeout", str(LIMIT_S), "--mem", "3G", "--env", "SRCIP_KERNEL_TESTS=1"]
    options += ["--env", f"SRCIP_TEST_PATIENCE_S={PATIENCE_S}"]

    def run(*command):
        return subprocess.run(
            [VMRUN, *options, kernel, "--", *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    run.kernel = kernel
    run.rung = RUNGS[request.param]
    run.has_links = run.rung == "BPF netfilter links"
    return run


def foreign_options(arch):
    """
    What vmrun.sh takes for a machine of another architecture.

    This checkout's interpreter is a link to /usr/bin/python3, and so is theirs there; theirs finds
    compiled packages in /opt/python first.
    """
    if shutil.which("qemu-system-aarch64") is None or shutil.which("mmdebstrap") is None:
        pytest.skip("not installed: qemu-system-arm or mmdebstrap; see docs/kernels.md")
    root = CACHE / f"root-{arch}"
    made = subprocess.run(
        [FOREIGN_ROOT, arch, root, PYTHON], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no root file system for {arch}: {made.stderr.strip()[-500:]}")
    shared = ["--arch", arch, "--root", str(root), "--share", str(ROOT)]
    return [*shared, "--env", "PYTHONPATH=/opt/python"]


def assert_well(done):
    """vmrun.sh also fails on a BUG, a WARNING or an Oops in the kernel's log."""
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_doctor(run_in_vm):
    """
    doctor names the way of looking, and fails nothing. No module is loaded before: not conntrack's.
    """
    done = run_in_vm(PYTHON, "-m", "tracer.cli", "doctor", "--no-cluster", "-o", "json")
    assert_well(done)
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert report["rung"] == run_in_vm.rung
    assert [check for check in checks.values() if check["needed"] and not check["ok"]] == []
    for name in ("netfilter programs", "TCX programs"):
        assert checks[name]["ok"] == run_in_vm.has_links
    assert checks["probes"]["ok"]
    # 6.4 and 5.17: not_seen names what the kernel lacks.
    assert any("not to track" in line for line in report["not_seen"]) != run_in_vm.has_links
    has_reasons = not any(
        line.startswith("drops other than netfilter's") for line in report["not_seen"]
    )
    assert has_reasons == (run_in_vm.kernel != "5.10")


def test_what_holds_on_every_kernel(run_in_vm):
    """Trace, flows, events and the agent's totals equal conntrack's table."""
    assert_well(run_in_vm(*TESTS, "tests/vm/test_any_kernel.py"))


def test_demo(run_in_vm):
    """Every scenario is answered as the backend saw it; what the kernel cannot show is named."""
    command = ("demo", "--mode", "nftables", "--family", "ipv4", "-o", "json")
    done = run_in_vm(PYTHON, "-m", "tracer.cli", *command)
    assert_well(done)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    agreements = [row["agrees"] for row in rows if row["kind"] == "scenario"]
    assert len(agreements) >= 50
    assert all(agreements)
    assert ("without S14e: drops other than" in done.stderr) == (run_in_vm.kernel == "5.10")


def test_probes(run_in_vm):
    """Where probes sit, what they leave behind, what comes between: also where there are links."""
    assert_well(run_in_vm(*TESTS, "tests/vm/test_probes.py"))


def test_kernel_tests(run_in_vm):
    """Connections, accepts and drops of the kernel tests."""
    hops = HOP_TESTS if run_in_vm.has_links else ()
    assert_well(run_in_vm(*TESTS, *KERNEL_TESTS, *hops))


def test_the_clock_is_set(run_in_vm):
    """The agent and a trace stay exact while the clock is set by a day and back."""
    done = run_in_vm(*TESTS, "tests/vm/test_set_clock.py")
    assert_well(done)
    assert "1 passed" in done.stdout
