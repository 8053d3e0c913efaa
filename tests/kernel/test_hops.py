"""The hops of watched packets, beside what tcpdump captures and what the sockets see."""

import os
import re
import socket
import subprocess
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address, ip_network

import pytest

from tests.kernel.box import CLIENT, NODE, PATIENCE_S, SERVER, wait_until
from tests.kernel.test_bypasses import SCHED_CLS, program
from tests.kernel.test_connections import load_nat
from tests.kernel.trace import Trace
from tracer.filter import Filter
from tracer.kernel import bpf_syscall, privileges
from tracer.kernel.interfaces import InterfaceWatcher
from tracer.kernel.netns import inside
from tracer.model import TCP, UDP, Hook

PORT = 8080
# One less than the kernel's BPF_MPROG_MAX: that many programs fit.
MOST_AT_TC = 63
DEVICES = ("n0", "n1")
# "In  IP 198.51.100.10.4711 > 198.51.100.1.8080: ..." and the same with IP6.
CAPTURED = re.compile(r"(\S+) +(In|Out) +IP6? (\S+)\.(\d+) > (\S+)\.(\d+): ")
FORWARDED = [
    (Hook.TC_INGRESS, None),
    (Hook.NF_PREROUTING, False),
    (Hook.NF_PREROUTING, True),
    (Hook.NF_FORWARD, True),
    (Hook.NF_POSTROUTING, False),
    (Hook.NF_POSTROUTING, True),
    (Hook.TC_EGRESS, None),
]


@contextmanager
def capturing(box):
    """tcpdump on every interface of the node; gives a function that ends it and reads it."""
    command = ["tcpdump", "-i", "any", "-nn", "-l", "-U", "--immediate-mode", "tcp or udp"]
    process = subprocess.Popen(
        ["ip", "netns", "exec", box.names["node"], *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any("listening on" in line for line in process.stderr)

    def packets(count):
        """Wait for so many packets at the devices of the test."""
        found = []
        while len(found) < count and (line := process.stdout.readline()):
            match = CAPTURED.search(line)
            if match and match[1] in DEVICES:
                device, way, src, sport, dst, dport = match.groups()
                ends = (ip_address(src), int(sport), ip_address(dst), int(dport))
                found.append((device, way, *ends))
        return found

    # A reader that waits too long gets an end instead.
    watchdog = threading.Timer(PATIENCE_S, process.kill)
    watchdog.start()
    try:
        yield packets
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def crossed(hops, names):
    """What tc saw, in tcpdump's terms."""
    found = []
    for hop in hops:
        if hop.hook in (Hook.TC_INGRESS, Hook.TC_EGRESS):
            way = "In" if hop.hook is Hook.TC_INGRESS else "Out"
            flow = hop.packet
            found.append((names[hop.ifindex], way, flow.src, flow.sport, flow.dst, flow.dport))
    return found


def names_of(box):
    printed = box.run("node", "ip", "-o", "link")
    return {int(n): name for n, name in re.findall(r"^(\d+): (\w+)", printed, re.MULTILINE)}


def places(hops):
    return [(hop.hook, hop.is_after_nat) for hop in hops]


def packets_of(hops):
    """The hops of each packet, in the order in which packets came."""
    packets = {}
    for hop in hops:
        packets.setdefault(hop.packet_id, []).append(hop)
    return list(packets.values())


@pytest.fixture(autouse=True)
def neighbours(box):
    """
    Have all neighbours known: a packet that waits for one goes on without its slot, as
    test_waits_for_its_neighbour shows.
    """
    for version in (4, 6):
        exchange(box, version, socket.SOCK_DGRAM, SERVER[version])


def exchange(box, version, kind, address, *, datagrams=1):
    """A question and an answer; for UDP so many of each."""
    with ExitStack() as stack:
        server = stack.enter_context(box.socket("server", version, kind))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", PORT))
        client = stack.enter_context(box.socket("client", version, kind))
        if kind == socket.SOCK_STREAM:
            server.listen()
            client.connect((address, PORT))
            peer, seen = server.accept()
            with peer:
                peer.sendall(b"!")
                client.recv(1)
            return client.getsockname()[:2], seen[:2]
        client.connect((address, PORT))
        for _ in range(datagrams):
            client.send(b"?")
            _, seen = server.recvfrom(1)
            server.sendto(b"!", seen)
            client.recv(1)
        return client.getsockname()[:2], seen[:2]


@pytest.mark.parametrize("nat", ["neither", "dnat", "snat", "both"])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("version", [4, 6])
def test_forwarded(box, trace, version, kind, nat):
    """
    Of a connection that is forwarded, the first packets of both directions are seen at each place
    in turn, and at tc with the addresses and ports, and in the order, that tcpdump captures.
    """
    address = load_nat(box, nat)[version]
    proto = TCP if kind == socket.SOCK_STREAM else UDP
    tracer = trace(packets=1, wanted=Filter(proto=proto))

    with capturing(box) as captured:
        sent_from, seen = exchange(box, version, kind, address)
        tracer.flush()
        first, answer = packets_of(tracer.hops)
        there = crossed(tracer.hops, names_of(box))
        expected = captured(4)

    assert places(first) == FORWARDED
    assert places(answer) == FORWARDED
    assert there == expected
    assert not any(hop.is_reply for hop in first)
    assert all(hop.is_reply for hop in answer)
    assert (str(first[0].packet.src), first[0].packet.sport) == sent_from
    assert (str(first[-1].packet.src), first[-1].packet.sport) == seen
    assert first[-1].packet.dst == ip_address(SERVER[version])
    assert answer[0].packet == first[-1].packet.inverted
    assert answer[-1].packet == first[0].packet.inverted
    (connection,) = tracer.connections[-1:]
    assert {hop.orig for hop in tracer.hops if hop.orig} == {connection.orig}
    assert first[-1].reply == connection.reply
    assert first[0].tcp_flags == (2 if kind == socket.SOCK_STREAM else 0)
    assert answer[0].tcp_flags == (0x12 if kind == socket.SOCK_STREAM else 0)


def test_mark(box, trace):
    """The packet's mark is told at each hop: here it is set before NAT and cleared after it."""
    box.rules(
        """table ip m {
        chain a { type filter hook prerouting priority -150; meta mark set 0x4000; }
        chain b { type filter hook postrouting priority 101; meta mark set 0; }
        }"""
    )
    tracer = trace(packets=1, wanted=Filter(proto=UDP))
    exchange(box, 4, socket.SOCK_DGRAM, SERVER[4])
    tracer.flush()
    assert [hop.mark for hop in packets_of(tracer.hops)[0]] == [0, *(0x4000,) * 4, 0, 0]


def test_zones(box, trace):
    """
    Connections with one tuple in two zones are told apart, at each place where a packet has its
    entry and in its drop, by the zones that `conntrack -L` shows.
    """
    tracer = trace(packets=1, wanted=Filter(proto=UDP, port=PORT))
    for zone in (7, 8):
        box.rules(
            f"""table ip z {{
            chain a {{ type filter hook prerouting priority -300; ct zone set {zone}; }}
            chain b {{ type filter hook postrouting priority 0; meta length 29 drop; }}
            }}"""
        )
        with (
            box.socket("server", 4, socket.SOCK_DGRAM) as server,
            box.socket("client", 4, socket.SOCK_DGRAM) as client,
        ):
            server.bind(("", PORT))
            client.bind((CLIENT[4], PORT + 1))
            client.sendto(b"??", (SERVER[4], PORT))
            tracer.wait_for(lambda t, zone=zone: any(c.zone == zone for c in t.connections))
            client.sendto(b"?", (SERVER[4], PORT))
            tracer.wait_for(lambda t, zone=zone: any(drop.zone == zone for drop in t.drops))
        (entry,) = box.conntrack("-w", str(zone), "-p", "udp")
        assert entry["zone"] == zone
    tracer.flush()
    packets = packets_of(tracer.hops)
    assert len({hop.orig for hop in tracer.hops if hop.orig}) == 1
    assert [{hop.zone for hop in hops if hop.orig} for hops in packets] == [{7}, {8}]
    assert all(places(hops) == FORWARDED for hops in packets)
    assert [drop.zone for drop in tracer.drops if drop.orig] == [7, 8]


@pytest.mark.parametrize("version", [4, 6])
def test_local(box, trace, version):
    """A connection to the node's own socket ends at INPUT; its reply begins at OUTPUT."""
    load_nat(box, "neither")
    tracer = trace(packets=1, wanted=Filter(port=PORT))
    with ExitStack() as stack:
        server = stack.enter_context(box.socket("node", version, socket.SOCK_STREAM))
        server.bind(("", PORT))
        server.listen()
        client = stack.enter_context(box.socket("client", version, socket.SOCK_STREAM))
        client.connect((NODE[version], PORT))
        tracer.flush()
    first, answer = packets_of(tracer.hops)
    came = [*FORWARDED[:3], (Hook.NF_INPUT, False), (Hook.NF_INPUT, True)]
    went = [(Hook.NF_OUTPUT, False), (Hook.NF_OUTPUT, True), *FORWARDED[4:]]
    assert (places(first), places(answer)) == (came, went)


def test_loopback(box, trace):
    """A packet over loopback is one packet: out and in again."""
    load_nat(box, "neither")
    tracer = trace(packets=1, wanted=Filter(port=PORT))
    with ExitStack() as stack:
        server = stack.enter_context(box.socket("node", 4, socket.SOCK_DGRAM))
        server.bind(("127.0.0.1", PORT))
        client = stack.enter_context(box.socket("node", 4, socket.SOCK_DGRAM))
        client.sendto(b"x", ("127.0.0.1", PORT))
        server.recv(1)
        tracer.flush()
    (packet,) = packets_of(tracer.hops)
    assert [hop.hook for hop in packet] == [
        *(Hook.NF_OUTPUT,) * 2,
        *(Hook.NF_POSTROUTING,) * 2,
        Hook.TC_EGRESS,
        Hook.TC_INGRESS,
        *(Hook.NF_PREROUTING,) * 2,
        *(Hook.NF_INPUT,) * 2,
    ]
    assert {hop.number for hop in packet} == {1}


@pytest.mark.parametrize(
    ("chain", "last"),
    [
        ("prerouting priority -300", (Hook.TC_INGRESS, None)),
        ("prerouting priority -150", (Hook.TC_INGRESS, None)),
        ("prerouting priority -99", (Hook.NF_PREROUTING, False)),
        ("forward priority 0", (Hook.NF_PREROUTING, True)),
        ("postrouting priority 0", (Hook.NF_FORWARD, True)),
        ("postrouting priority 101", (Hook.NF_POSTROUTING, False)),
    ],
)
def test_dropped(box, trace, chain, last):
    """A packet that a rule drops is seen up to there, and then as a drop."""
    box.rules(f"table ip d {{ chain c {{ type filter hook {chain}; udp dport {PORT} drop; }} }}")
    tracer = trace(packets=1, wanted=Filter(client=ip_network(CLIENT[4])))
    with box.socket("client", 4, socket.SOCK_DGRAM) as client:
        client.sendto(b"x", (SERVER[4], PORT))
        tracer.wait_for(lambda t: t.drops)
    assert places(tracer.hops)[-1] == last
    assert tracer.hops[-1].ktime_ns < tracer.drops[0].ktime_ns
    assert len(packets_of(tracer.hops)) == 1


@pytest.mark.parametrize(
    "wanted",
    [
        Filter(client=ip_network(CLIENT[4]), proto=TCP),
        Filter(backend=ip_network(SERVER[4]), proto=TCP),
        Filter(port=PORT, proto=TCP),
        Filter(client=ip_network("198.51.100.0/24"), backend=ip_network("10.9.0.0/24"), port=PORT),
    ],
)
def test_filter(box, trace, wanted):
    """A filter finds a connection by either side of its NAT, with both directions from tc on."""
    load_nat(box, "both")
    tracer = trace(packets=1, wanted=wanted)
    exchange(box, 4, socket.SOCK_STREAM, NODE[4])
    tracer.flush()
    found = packets_of([hop for hop in tracer.hops if hop.packet.proto == TCP])
    assert [places(packet) for packet in found] == [FORWARDED, FORWARDED]


@pytest.mark.parametrize(
    "unwanted",
    [
        Filter(client=ip_network("198.51.100.11")),
        Filter(backend=ip_network("10.9.0.3")),
        Filter(port=PORT + 1),
        Filter(proto=UDP),
        Filter(client=ip_network("::/0")),
    ],
)
def test_filter_leaves_out(box, trace, unwanted):
    """Hops of connections that the filter does not want are not reported."""
    load_nat(box, "both")
    tracer = trace(packets=9, wanted=unwanted)
    exchange(box, 4, socket.SOCK_STREAM, NODE[4])
    tracer.flush()
    assert not [hop for hop in tracer.hops if hop.packet.proto == TCP]
    assert not tracer.lost()["over_limit"]


def test_limit(box, trace):
    """No more packets of a direction than requested; the rest is counted."""
    load_nat(box, "both")
    tracer = trace(packets=3, wanted=Filter(proto=UDP))
    exchange(box, 4, socket.SOCK_DGRAM, NODE[4], datagrams=10)
    tracer.flush()
    numbers = Counter((packet[0].is_reply, packet[0].number) for packet in packets_of(tracer.hops))
    assert numbers == {(way, n): 1 for way in (False, True) for n in (1, 2, 3)}
    assert tracer.lost()["over_limit"] == 14


def test_waits_for_its_neighbour(box, trace):
    """A packet that has to wait for a neighbour's address is not counted twice."""
    load_nat(box, "neither")
    box.run("node", "ip", "neigh", "flush", "all")
    tracer = trace(packets=1, wanted=Filter(proto=UDP))
    exchange(box, 4, socket.SOCK_DGRAM, SERVER[4])
    tracer.flush()
    there = [hop for hop in tracer.hops if not hop.is_reply]
    assert places(there) == FORWARDED
    assert not tracer.lost()["over_limit"]


def test_bridge(box, trace):
    """A packet that comes in by a bridge's port is seen there and at the bridge."""
    load_nat(box, "neither")
    for line in (
        "link add br0 type bridge stp_state 0 forward_delay 0",
        "link set n0 master br0",
        "link set br0 up",
        "addr flush dev n0",
        f"addr add {NODE[4]}/24 dev br0",
    ):
        box.run("node", "ip", *line.split())
    tracer = trace(packets=1, wanted=Filter(proto=UDP))
    wait_until(lambda: "state UP" in box.run("node", "ip", "link", "show", "br0"))
    exchange(box, 4, socket.SOCK_DGRAM, SERVER[4])
    tracer.flush()
    names = names_of(box)
    first, answer = packets_of(tracer.hops)
    # Where br_netfilter is on, the bridge calls PRE_ROUTING before the packet is its own.
    assert Counter(places(first)) == Counter([FORWARDED[0], *FORWARDED])
    assert places(first)[-4:] == FORWARDED[-4:]
    seen_at = [names[hop.ifindex] for hop in first if hop.hook is Hook.TC_INGRESS]
    assert seen_at == ["n0", "br0"]
    assert places(answer) == [*FORWARDED, FORWARDED[-1]]
    assert [names[hop.ifindex] for hop in answer[-2:]] == ["br0", "n0"]


def test_changed_by_others(box, trace):
    """An address that something other than NAT replaces still differs between two hops."""
    box.run(
        *("node", "nft", "-f", "-"),
        stdin=f"""table netdev x {{
          chain c {{
            type filter hook ingress device n0 priority 0;
            ip daddr {NODE[4]} udp dport {PORT} ip daddr set {SERVER[4]};
          }}
        }}""",
    )
    tracer = trace(packets=1, wanted=Filter(client=ip_network(CLIENT[4])))
    with ExitStack() as stack:
        server = stack.enter_context(box.socket("server", 4, socket.SOCK_DGRAM))
        server.bind(("", PORT))
        client = stack.enter_context(box.socket("client", 4, socket.SOCK_DGRAM))
        client.sendto(b"x", (NODE[4], PORT))
        server.recv(1)
    tracer.flush()
    (packet,) = packets_of(tracer.hops)
    assert packet[0].packet.dst == ip_address(NODE[4])
    assert {hop.packet.dst for hop in packet[1:]} == {ip_address(SERVER[4])}


def test_nothing_is_attached_unasked(trace):
    """Without paths no program for hops is attached, or even loaded."""
    source = trace().source
    assert {file for file, _ in source._loaded.functions} == {
        "connections.c", "accepts.c", "drops.c",
    }  # fmt: skip
    (links,) = source._attachment.by_namespace.values()
    # The three programs for connections, for IPv4 and IPv6.
    assert (len(links), source.devices) == (6, 0)


def test_interface_that_appears(box):
    """An interface that is made while tracing is picked up, though root was given up."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _watch_as_nobody(box, write)
    os.close(write)
    with os.fdopen(read, "rb") as told:
        assert told.read(1) == b"r"
        for line in (
            f"link add s1 netns {box.names['server']} type veth peer name n2",
            "addr add 10.8.0.1/24 dev n2",
            "link set n2 up",
        ):
            box.run("node", "ip", *line.split())
        for line in ("addr add 10.8.0.2/24 dev s1", "link set s1 up"):
            box.run("server", "ip", *line.split())
        assert told.read(1) == b"a"
        with ExitStack() as stack:
            server = stack.enter_context(box.socket("server", 4, socket.SOCK_DGRAM))
            server.bind(("10.8.0.2", PORT))
            client = stack.enter_context(box.socket("client", 4, socket.SOCK_DGRAM))
            client.sendto(b"x", ("10.8.0.2", PORT))
            server.recv(1)
            assert told.read(1) == b"s"
    assert os.waitpid(child, 0)[1] == 0


def _watch_as_nobody(box, write):
    """In a child: trace, become nobody, and say what is seen of the new interface n2."""
    status = 1
    try:
        tracer = Trace(box, packets=1, wanted=Filter(proto=UDP))
        devices = tracer.source.devices
        privileges.drop()
        os.write(write, b"r")
        wait_until(lambda: tracer.source.devices > devices)
        os.write(write, b"a")
        tracer.wait_for(lambda t: any(hop.hook is Hook.TC_EGRESS for hop in t.hops))
        assert tracer.hops[-1].packet.dst == ip_address("10.8.0.2")
        os.write(write, b"s")
        status = 0
    finally:
        os._exit(status)


def test_interface_that_gets_the_number_of_another(box, trace, monkeypatch):
    """If its number was another's when the tracer last looked, it is picked up all the same."""
    looking, look = threading.Lock(), InterfaceWatcher.snapshot

    def look_later(watcher):
        with looking:
            return look(watcher)

    def names_programs():
        with inside(box.path("node")):
            return bpf_syscall.tcx_programs(99, bpf_syscall.TCX_INGRESS)

    monkeypatch.setattr(InterfaceWatcher, "snapshot", look_later)
    box.run("node", "ip", "link", "add", "old", "index", "99", "type", "bridge")
    tracer = trace(packets=1, wanted=Filter(proto=UDP))
    devices = tracer.source.devices
    assert names_programs()
    with looking:
        box.run("node", "ip", "link", "del", "old")
        box.run("node", "ip", "link", "add", "new", "index", "99", "type", "bridge")
        assert not names_programs()
    wait_until(names_programs)
    wait_until(lambda: tracer.source.devices == devices)


def test_second_tracer(box, trace):
    """Two tracers on one node both see every hop."""
    load_nat(box, "both")
    tracers = [trace(packets=1, wanted=Filter(proto=UDP)) for _ in range(2)]
    exchange(box, 4, socket.SOCK_DGRAM, NODE[4])
    for tracer in tracers:
        tracer.flush()
        assert [places(packet) for packet in packets_of(tracer.hops)] == [FORWARDED, FORWARDED]


def test_untracked(box, trace):
    """A packet that conntrack is told to skip has hops without an entry."""
    box.rules("table ip r { chain c { type filter hook prerouting priority -300; notrack; } }")
    tracer = trace(packets=1, wanted=Filter(client=ip_network(CLIENT[4]), proto=UDP))
    exchange(box, 4, socket.SOCK_DGRAM, SERVER[4])
    tracer.flush()
    first, answer = packets_of(tracer.hops)
    assert places(first) == FORWARDED
    assert places(answer) == FORWARDED
    assert {hop.orig for hop in tracer.hops} == {None}


def test_interface_that_refuses(box, trace):
    """If a new interface has all its places at tc taken, it is listed under what is not seen."""
    tracer = trace(packets=1, wanted=Filter(proto=UDP))
    devices, before = tracer.source.devices, tracer.source.info.not_seen
    box.run("server", "ip", "link", "add", "n2", "type", "veth", "peer", "name", "s2")
    ifindex = int(box.run("server", "cat", "/sys/class/net/n2/ifindex"))
    with ExitStack() as stack:
        with inside(box.path("server")):
            for number in range(MOST_AT_TC):
                theirs = program(SCHED_CLS, b"somebodys%d" % number)
                stack.callback(os.close, theirs)
                link = bpf_syscall.create_tcx_link(theirs, ifindex, bpf_syscall.TCX_EGRESS)
                stack.callback(os.close, link)
        box.run("server", "ip", "link", "set", "n2", "netns", box.names["node"])
        box.run("server", "ip", "link", "set", "s2", "up")

        def refused(tracer):
            return set(tracer.source.info.not_seen) - set(before)

        (line,) = tracer.wait_for(refused)
    assert line == "tc of n2 of node, added after the start: Numerical result out of range"
    assert tracer.source.devices == devices
    # The others are attached to all the same.
    box.run("node", "ip", "link", "add", "n3", "type", "veth", "peer", "name", "n4")
    tracer.wait_for(lambda t: t.source.devices == devices + 2)
    assert refused(tracer) == {line}
