"""True of every kernel, with netfilter links or without; test_kernels.py runs it on others."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, closing
from ipaddress import ip_address
from itertools import product

import pytest

from tests.conftest import SWITCH
from tests.kernel import box as boxes
from tests.kernel.box import NODE, SERVER, flat, wait_until
from tests.kernel.test_privileges import NOBODY, serving, statuses
from tracer.decode import decode
from tracer.errors import ConntrackError
from tracer.kernel import privileges
from tracer.kernel.conntrack import ConntrackSource
from tracer.kernel.privileges import Capability

SRCIP = [sys.executable, "-m", "tracer.cli"]
COUNT = 5
PORT = 8080
BURST = 1500
# In a virtual machine the compiler takes its time.
START_S = 90
NAT = f"""
table inet test-dnat {{ chain pre {{ type nat hook prerouting priority -100
  ip daddr {NODE[4]} dnat ip to {SERVER[4]}
  ip6 daddr {NODE[6]} dnat ip6 to {SERVER[6]}
}} }}
table inet test-snat {{ chain post {{ type nat hook postrouting priority 100; masquerade; }} }}
"""


@pytest.fixture
def box():
    """A client, a node that replaces both addresses, and a server; needs no netfilter links."""
    if os.environ.get(SWITCH) == "0":
        pytest.skip(f"{SWITCH}=0")
    if os.geteuid():
        pytest.skip("not root; see CONTRIBUTING.md")
    with boxes.built() as built:
        built.rules(NAT)
        yield built


def talk(box, version, count=COUNT):
    """Make TCP connections and UDP flows through the node; return the sources the server saw."""
    seen = set()
    with ExitStack() as stack:
        listener = stack.enter_context(box.socket("server", version, socket.SOCK_STREAM))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", PORT))
        listener.listen(count)
        server = stack.enter_context(box.socket("server", version, socket.SOCK_DGRAM))
        server.bind(("", PORT))
        for _ in range(count):
            client = stack.enter_context(box.socket("client", version, socket.SOCK_STREAM))
            client.connect((NODE[version], PORT))
            accepted, peer = listener.accept()
            stack.enter_context(accepted)
            seen.add(("tcp", *peer[:2]))
            client = stack.enter_context(box.socket("client", version, socket.SOCK_DGRAM))
            client.sendto(b"x", (NODE[version], PORT))
            seen.add(("udp", *server.recvfrom(16)[1][:2]))
    return seen


def of_table(box):
    """What conntrack -L says, without ICMP of the hosts' own."""
    entries = [entry for entry in box.conntrack() if entry["proto"] in ("tcp", "udp")]
    return {(entry["proto"], entry["orig"], entry["reply"]) for entry in entries}


def of_output(printed):
    """What srcip says of connections, in the form of of_table(), and the sources seen."""
    rows = [json.loads(line) for line in printed.splitlines()]
    rows = [row for row in rows if row["kind"] == "connection" and row["proto"] in ("tcp", "udp")]

    def side(row, name):
        told = row[name]
        return (ip_address(told["src"]), ip_address(told["dst"]), told["sport"], told["dport"])

    tuples = {(row["proto"], side(row, "orig"), side(row, "reply")) for row in rows}
    seen = {(row["proto"], row["seen_source"], row["reply"]["dport"]) for row in rows}
    return tuples, seen


@pytest.mark.parametrize("rung", [None, "events"])
@pytest.mark.parametrize("version", [4, 6])
def test_trace_and_flows_equal_the_table(box, tmp_path, version, rung):
    """
    'srcip trace' and 'srcip flows' show each connection once, as conntrack -L does, and with the
    source that the server saw; by the highest rung, and by the lowest.
    """
    ready, output, errors = (tmp_path / name for name in ("ready", "output", "errors"))
    where = ["--no-cluster", f"--netns={box.names['node']}=node", "-o", "json"]
    asked = ["--rung", rung] if rung else []
    with output.open("w") as stdout, errors.open("w") as stderr:
        process = subprocess.Popen(
            [*SRCIP, "trace", *where, *asked, "--ready-file", str(ready)],
            stdout=stdout,
            stderr=stderr,
        )
        try:
            end = time.monotonic() + START_S
            while not ready.exists():
                assert process.poll() is None, errors.read_text()
                assert time.monotonic() < end, "waited in vain"
                time.sleep(0.1)
            seen = talk(box, version)
            wait_until(lambda: output.read_text().count('"connection"') >= 2 * COUNT)
            process.terminate()
            assert process.wait(timeout=30) == 0, errors.read_text()
        finally:
            process.kill()
            process.wait()
    table = of_table(box)
    assert len(table) == 2 * COUNT
    assert of_output(output.read_text()) == (table, seen)
    assert "Traceback" not in errors.read_text()

    flows = subprocess.run([*SRCIP, "flows", *where], capture_output=True, text=True, check=True)
    assert of_output(flows.stdout) == (table, seen)


def test_the_agents_totals_are_the_table(box):
    """
    'srcip serve' counts in the kernel as many connections as conntrack -L shows, as nobody, and
    with no capability but the one that reading counts may take.
    """

    def totals(served):
        found = Counter()
        for line in served.samples("srcip_connections_total{"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            key = (labels["family"], labels["proto"], labels["verdict"])
            # Who asks for /metrics is on the node itself.
            if labels["client_class"] != "loopback" and labels["proto"] in ("tcp", "udp"):
                found[key] += int(float(line.rsplit(" ", 1)[1]))
        return found

    with serving(box) as served:
        wait_until(lambda: served.get("/readyz"))
        for version in (4, 6):
            talk(box, version)
        asked = {entry for entry in of_table(box) if not entry[1][0].is_loopback}
        assert len(asked) == 4 * COUNT
        families, protos = ("ipv4", "ipv6"), ("tcp", "udp")
        expected = {
            (family, proto, "replaced"): COUNT for family, proto in product(families, protos)
        }
        wait_until(lambda: totals(served) == expected)
        threads = list(statuses(served.process.pid))
    kept = 1 << Capability.CAP_BPF if privileges.maps_take_bpf() else 0
    assert {status["Uid"].split()[1] for status in threads} == {NOBODY}
    assert {int(status[kind], 16) for status in threads for kind in ("CapEff", "CapPrm")} <= {
        0,
        kept,
    }


def test_listeners_of_the_agent_hear_of_accepts(box, tmp_path):
    """
    What backends' sockets accepted reaches each listener that comes, and after the one before left:
    the program for it is attached for them, though the agent has given up root by then.
    """
    path = tmp_path / "agent.sock"
    with serving(box, "--stream-socket", path) as served:
        wait_until(lambda: served.get("/readyz"))
        for turn in range(2):
            ready = tmp_path / f"ready{turn}"
            command = [*SRCIP, "trace", "--agent", path, "-o", "json", "--ready-file", ready]
            command += ["--timeout", str(START_S)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listener:
                wait_until(lambda is_ready=ready.exists: is_ready() or listener.poll() is not None)
                missing = {port for proto, _, port in talk(box, 4) if proto == "tcp"}
                for row in map(json.loads, listener.stdout):
                    if row["kind"] == "accept":
                        missing.discard(row["peer"]["port"])
                    if not missing:
                        break
                listener.terminate()
            assert not missing


def read_all(source, count):
    records = []

    def is_complete():
        records.extend(source.read(0.05))
        return len(records) >= count

    wait_until(is_complete)
    return [decode(record) for record in records]


@pytest.mark.parametrize("version", [4, 6])
def test_events_equal_the_table(box, version):
    """Conntrack's events make one record for each connection, equal to its entry."""
    with closing(ConntrackSource([box.target()], 0)) as source:
        talk(box, version)
        records = read_all(source, 2 * COUNT)
        table = {(orig, reply) for _, orig, reply in of_table(box)}
        records = [r for r in records if (flat(r.orig), flat(r.reply)) in table]
        assert len(records) == len(table) == 2 * COUNT
        assert all(r.is_snat and r.is_dnat and r.mark is None for r in records)
        assert not any(source.lost().values())


def test_burst_of_events_beside_a_silent_namespace(box):
    """More events than net.core.rmem_max holds are kept, and read in a few calls."""
    with (
        closing(ConntrackSource([box.target("client"), box.target()], 0)) as source,
        box.socket("client", 4, socket.SOCK_DGRAM) as client,
    ):
        for port in range(10_000, 10_000 + BURST):
            client.sendto(b"x", (SERVER[4], port))
        wait_until(lambda: len(box.conntrack("-p", "udp")) >= BURST)
        records = [record for _ in range(10) for record in source.read(0.05)]
        assert len(records) >= BURST
        assert not any(source.lost().values())


def test_events_are_switched_off(box):
    """If conntrack would stay silent, one line says so, and what to set."""
    box.run("node", "sysctl", "-qw", "net.netfilter.nf_conntrack_events=0")
    with pytest.raises(ConntrackError, match=r"^conntrack of node sends no events: set [^\n]+$"):
        ConntrackSource([box.target()], 0)
