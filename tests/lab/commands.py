"""Running srcip as its users do, for the tests of whole scenarios."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from lab.services import OBJECTS

SRCIP = [sys.executable, "-m", "tracer.cli"]
NETNS = Path("/run/netns")
OPTIONS = ["--cluster", str(OBJECTS)]
# Of a busy machine; nothing waits so long where all is well. An emulated one takes longer.
PATIENCE_S = float(os.environ.get("SRCIP_TEST_PATIENCE_S", "60"))


def srcip(*arguments, **options):
    return subprocess.run(
        [*SRCIP, *arguments], capture_output=True, text=True, check=False, timeout=120, **options
    )


def lines(printed):
    return [json.loads(line) for line in printed.splitlines()]


def namespaces():
    """The labs' namespaces."""
    return set(NETNS.glob("srcip-lab-*"))


def netns_options(lab, nodes=("node1", "node2")):
    return [f"--netns={lab.netns(node)}={node}" for node in nodes]


def wait_until(condition, patience_s=PATIENCE_S):
    end = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return value


@contextmanager
def tracing(lab, tmp_path, *arguments, cluster=OPTIONS, nodes=("node1", "node2")):
    """A 'srcip trace' beside the block; its standard output is in the file that is returned."""
    ready, output = tmp_path / "ready", tmp_path / "output"
    ready.unlink(missing_ok=True)
    with output.open("w") as stdout:
        process = subprocess.Popen(
            [
                *SRCIP,
                "trace",
                *cluster,
                *netns_options(lab, nodes),
                "--ready-file",
                str(ready),
                *arguments,
            ],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            wait_until(lambda: ready.exists() or process.poll() is not None)
            yield process, output
        finally:
            process.kill()
            process.communicate()
