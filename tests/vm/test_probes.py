"""
The rung of probes on kernel functions, on a kernel that has them: where they sit, what they leave
behind, and what comes between. test_kernels.py runs it in virtual machines.
"""

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from tests.conftest import SWITCH
from tests.kernel import box as boxes
from tests.kernel.box import NODE, SERVER, wait_until
from tests.vm.test_any_kernel import NAT, START_S
from tracer.decode import decode
from tracer.errors import LoadError
from tracer.filter import Filter
from tracer.kernel import kprobe, ladder, probing, sources
from tracer.kernel.ladder import Rung
from tracer.kernel.source import Settings
from tracer.model import UDP

COUNT = 5
PACKETS = 200
PORT = 8080
CONFIRM = "__nf_conntrack_confirm"
PROBES = Path("/sys/kernel/debug/kprobes/list")
ENABLED = Path("/sys/kernel/debug/kprobes/enabled")
STATISTICS = Path("/proc/sys/kernel/bpf_stats_enabled")
SRCIP = [sys.executable, "-m", "tracer.cli"]


@pytest.fixture
def box():
    """A client, a node and a server, where probes can be made."""
    if os.environ.get(SWITCH) == "0":
        pytest.skip(f"{SWITCH}=0")
    if os.geteuid():
        pytest.skip("not root; see CONTRIBUTING.md")
    try:
        kprobe.require()
    except LoadError as error:
        pytest.skip(str(error))
    with boxes.built() as built:
        yield built


@contextmanager
def knob(path, value):
    """Set a value of the machine's, and set it back."""
    before = path.read_text()
    path.write_text(value)
    try:
        yield
    finally:
        path.write_text(before)


def opened(box, **settings):
    return closing(ladder.open_programs([box.target()], Settings(**settings), Rung.PROBES))


def send(box, sport=0):
    with box.socket("client", 4, socket.SOCK_DGRAM) as sent:
        sent.bind(("", sport))
        sent.sendto(b"x", (NODE[4], PORT))


# The first of all tests: where NAT is a module, nobody has loaded it.
def test_nat_that_is_loaded_later(box):
    """A tracer that starts before NAT's module says what it will miss, or exits for a restart."""
    subprocess.run(["modprobe", "-r", "nft_chain_nat"], capture_output=True, check=False)
    if probing.find([box.target()]).nat:
        pytest.skip("NAT is loaded already, or no module")
    with opened(box) as tracing, opened(box, is_restarted=True) as serving:
        assert tracing.read(0) == []
        box.rules(NAT)

        def is_told():
            tracing.read(0)
            return any("nft_chain_nat" in line for line in tracing.info.not_seen)

        wait_until(is_told)
        with pytest.raises(LoadError, match=r"^not seen: marks where nft_chain_nat [^\n]+$"):
            wait_until(lambda: serving.read(0) is None)
        # It goes on, and does not guess.
        send(box)
        wait_until(lambda: tracing.read(0.05))
        assert tracing.lost()["mark_overtaken"] == 1


def test_packets_of_a_known_connection_hit_nothing(box):
    """A probe runs once for a connection, and not for its packets: what they cost is nothing."""
    box.rules(NAT)
    with knob(STATISTICS, "1"), opened(box) as source, ExitStack() as stack:
        server = stack.enter_context(box.socket("server", 4, socket.SOCK_DGRAM))
        server.bind(("", PORT))
        client = stack.enter_context(box.socket("client", 4, socket.SOCK_DGRAM))
        before = source.run_statistics()
        client.sendto(b"x", (NODE[4], PORT))
        for _ in range(PACKETS):
            data, peer = server.recvfrom(1)
            server.sendto(data, peer)
            client.recv(1)
            client.sendto(data, (NODE[4], PORT))
        after = source.run_statistics()
    runs = {name: after[name][1] - before[name][1] for name in ("srcip_confirm", "srcip_nat")}
    # Once in the node. Other connections, such as the namespaces' own ICMPv6, are few.
    assert 1 <= runs["srcip_confirm"] < 20
    assert 1 <= runs["srcip_nat"] < 20


def test_nothing_is_left_after_sigkill(box, tmp_path):
    """A tracer that is killed leaves no probe behind, nor a line in kprobe_events."""
    box.rules(NAT)
    ready, errors = tmp_path / "ready", tmp_path / "errors"
    where = ["--no-cluster", "--rung", "probes", f"--netns={box.names['node']}"]
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [*SRCIP, "trace", *where, "--ready-file", str(ready)],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        try:
            wait_until(lambda: ready.exists() or process.poll() is not None, START_S)
            assert process.poll() is None, errors.read_text()
            assert PROBES.read_text().count(CONFIRM) == 1
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    wait_until(lambda: CONFIRM not in PROBES.read_text())
    assert not Path("/sys/kernel/tracing/kprobe_events").read_text()


def test_probes_are_switched_off(box):
    """If an administrator has disabled them, one line says so, and events are used."""
    with knob(ENABLED, "0"):
        with pytest.raises(LoadError, match=r"^probes are switched off: [^\n]+ is 0$"):
            probing.find([box.target()])
        with closing(sources.live([box.target()], Filter(), asked=Rung.EVENTS)) as source:
            assert source.info.rung == "conntrack events"


def read_flows(source, count):
    """Read until so many UDP flows were reported; none may be lost."""
    found = []

    def are_all_here():
        records = map(decode, source.read(0.05))
        found.extend(each for each in records if each.orig.proto == UDP)
        return len(found) >= count

    wait_until(are_all_here)
    assert not any(source.lost().values())
    return found


@pytest.mark.parametrize("version", [4, 6])
def test_first_of_several_chains(box, version):
    """The mark is that before the first nat chain, whatever later ones see."""
    box.rules("""
table inet t {
  chain pre { type filter hook prerouting priority -150; meta l4proto udp meta mark set 0x4000; }
  chain first { type nat hook postrouting priority 100; meta l4proto udp meta mark set 1; }
  chain last { type nat hook postrouting priority 101; meta l4proto udp masquerade; }
}""")
    with opened(box) as source, box.socket("client", version, socket.SOCK_DGRAM) as client:
        for port in range(PORT, PORT + COUNT):
            client.sendto(b"x", (SERVER[version], port))
        found = read_flows(source, COUNT)
    assert [connection.mark for connection in found] == [0x4000] * COUNT
    assert all(connection.is_snat for connection in found)


@pytest.mark.parametrize("version", [4, 6])
def test_legacy_iptables(box, version):
    """Its nat table is no chain of nftables: the mark is seen all the same."""
    tool = "iptables-legacy" if version == 4 else "ip6tables-legacy"
    for rule in (
        "-t mangle -A PREROUTING -p udp -j MARK --set-mark 0x4000",
        "-t nat -A POSTROUTING -p udp -m mark --mark 0x4000 -j MARK --set-mark 0",
        "-t nat -A POSTROUTING -p udp -j MASQUERADE",
    ):
        box.run("node", tool, *rule.split())
    with opened(box) as source, box.socket("client", version, socket.SOCK_DGRAM) as client:
        for port in range(PORT, PORT + COUNT):
            client.sendto(b"x", (SERVER[version], port))
        found = read_flows(source, COUNT)
    assert [connection.mark for connection in found] == [0x4000] * COUNT
    assert all(connection.is_snat for connection in found)
