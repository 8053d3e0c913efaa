"""Model objects, records and strategies that several tests use."""

import struct
import sys
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address

from hypothesis import strategies as st

from tracer.cluster.match import PodRef, Via
from tracer.cluster.objects import Policy
from tracer.judge.cause import Cause
from tracer.judge.connection import judge_connection
from tracer.judge.drop import judge_drop
from tracer.judge.proxy_word import ProxyWord
from tracer.judge.verdict import JudgedConnection, JudgedDrop, Opinion, ServiceRef, Verdict
from tracer.judge.view import View
from tracer.model import Accept, ClientClass, Connection, Drop, FiveTuple, Hook, Hop, Status
from tracer.proxy_headers import (
    CLIENT_TOKEN,
    ClientForm,
    Declared,
    DeclaredClient,
    Opening,
    ProxyHeader,
)
from tracer.ruleset.rule import Action, Owner, Rule
from tracer.source import SourceInfo

NETNS = 4026532001
# 2026-01-01T00:00:00Z is 1767225600: an hour after the machine of these tests was started.
CLOCK_OFFSET_NS = 1_767_222_000_000_000_000
KTIME_NS = 3_600_123_456_789

CLIENT, NODE, BACKEND = "198.51.100.10", "10.240.0.5", "10.244.1.11"
CLIENT6, NODE6, BACKEND6 = "2001:db8:1::10", "fd00:240::5", "fd00:244:1::11"


def flow(src, sport, dst, dport, proto=6):
    return FiveTuple(
        src=ip_address(src), dst=ip_address(dst), sport=sport, dport=dport, proto=proto
    )


# The three shapes of a NodePort connection, and one without a Service.
SENT = flow(CLIENT, 46356, NODE, 30080)
REPLACED = (SENT, flow(BACKEND, 8080, NODE, 65241))
PRESERVED = (SENT, flow(BACKEND, 8080, CLIENT, 46356))
UNTOUCHED = (SENT, SENT.inverted)
SENT6 = flow(CLIENT6, 46356, NODE6, 30080)
REPLACED6 = (SENT6, flow(BACKEND6, 8080, NODE6, 65241))
PING = flow(CLIENT, 4660, BACKEND, 8 << 8, proto=1)


def connection(orig=SENT, reply=REPLACED[1], **changes):
    values = {
        "ktime_ns": KTIME_NS,
        "netns": NETNS,
        "hook": Hook.NF_POSTROUTING,
        "orig": orig,
        "reply": reply,
        "status": Status.SRC_NAT | Status.DST_NAT,
        "zone": 0,
        "mark": 0,
        "ct_mark": 0,
        "iif": 2,
        "oif": 3,
        "is_related": False,
    }
    return Connection(**values | changes)


def drop(**changes):
    values = {
        "ktime_ns": KTIME_NS,
        "netns": NETNS,
        "packet": SENT,
        "orig": SENT,
        "is_reply": False,
        "is_new": not changes.get("is_reply", False),
        "reason": 8,
        "location": 0xFFFF_FFFF_8100_0000,
        "dst_input": None,
        "mark": 0,
        "ifindex": 2,
        "iif": 2,
        "dst_ifindex": 0,
    }
    return Drop(**values | changes)


def accept(peer=None, **changes):
    peer = peer or flow(NODE, 65241, BACKEND, 8080)
    return Accept(**{"ktime_ns": KTIME_NS, "netns": NETNS, "peer": peer} | changes)


# Only the node's name is known around the connections of these tests.
ALONE = View(node="node2")


def judged(*tuples, view=ALONE, time_ns=CLOCK_OFFSET_NS + KTIME_NS, **changes):
    return judge_connection(connection(*tuples, **changes), view, time_ns=time_ns)


def judged_drop(dropped=None, view=ALONE, **changes):
    values = {
        "time_ns": CLOCK_OFFSET_NS + KTIME_NS,
        "reason": "NETFILTER_DROP",
        "place": "nf_hook_slow",
        "dst_input": None,
    }
    return judge_drop(dropped or drop(), view, **values | changes)


SERVICE = ServiceRef(
    namespace="default",
    name="nodeport",
    port="http",
    via=Via.NODE_PORT,
    policy=Policy.CLUSTER,
)
RULE = Rule(
    family="ipv4",
    table="nat",
    chain="KUBE-POSTROUTING",
    action=Action.MASQUERADE,
    text="-A KUBE-POSTROUTING -j MASQUERADE",
    owner=Owner.KUBE_PROXY,
    tool="iptables",
)


POD = PodRef("default", "p11", "node1")


def explained(*, backend_pod=POD, **changes):
    """Return a connection with every field known."""
    opinion = {
        "verdict": Verdict.REPLACED,
        "cause": Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER,
        "service": SERVICE,
        "client_class": ClientClass.EXTERNAL,
        "rule": RULE,
        "evidence": ("the packet was marked",),
        "advice": ("set externalTrafficPolicy: Local", "cost: some nodes drop"),
    }
    return JudgedConnection(
        connection=connection(),
        time_ns=CLOCK_OFFSET_NS + KTIME_NS,
        node="node2",
        opinion=Opinion(**opinion | changes),
        backend_pod=backend_pod,
    )


def named(header=ProxyHeader.PROXY_V2, address="198.51.100.7", port=56324, **changes):
    """Return a client that a header names."""
    values = {"header": header, "form": ClientForm.ADDRESS, "port": port}
    return DeclaredClient(**values | {"address": address and ip_address(address)} | changes)


def word(*clients, peer=CLIENT, **changes):
    """Return what a trusted proxy says: the first of these clients counts."""
    clients = clients or (named(),)
    told = Declared(
        ktime_ns=KTIME_NS, netns=NETNS, flow=SENT, opening=Opening.OTHER, clients=clients
    )
    values = {"declared": told, "peer": ip_address(peer), "is_trusted": True}
    return ProxyWord(**values | {"client": clients[0], "by": ip_address(peer)} | changes)


def proxied(told=None, **changes):
    """Return a connection of a proxy that names its client."""
    opinion = {"verdict": Verdict.PROXIED, "cause": Cause.LOAD_BALANCER_PROXY, "rule": None}
    return replace(explained(**opinion | changes), word=told or word())


def explained_drop(dropped=None, *, hook=Hook.NF_INPUT, reason="NETFILTER_DROP", **changes):
    """Return a drop with every field known."""
    opinion = {
        "verdict": Verdict.DROPPED,
        "cause": Cause.NO_LOCAL_ENDPOINT,
        "service": SERVICE,
        "client_class": ClientClass.EXTERNAL,
        "evidence": ("there is none",),
        "advice": ("run an endpoint",),
    }
    return JudgedDrop(
        drop=dropped or drop(),
        time_ns=CLOCK_OFFSET_NS + KTIME_NS,
        node="node2",
        reason=reason,
        place="nf_hook_slow",
        hook=hook,
        opinion=Opinion(**opinion | changes),
    )


INFO = SourceInfo(
    clock_offset_ns=CLOCK_OFFSET_NS,
    nodes={NETNS: "node2"},
    drop_reasons={8: "NETFILTER_DROP", 3: "NO_SOCKET"},
    rung="a test",
    not_seen=("what the test leaves out",),
)


# AF_INET and AF_INET6 by the version of an address.
FAMILIES = {4: 2, 6: 10}

# Records as the kernel writes them, by the layout of wire.h and not by its mirror.


def tuple_bytes(five_tuple):
    if five_tuple is None:
        return bytes(40)
    return (
        _octets(five_tuple.src)
        + _octets(five_tuple.dst)
        + struct.pack(
            "=HHBB2x",
            five_tuple.sport,
            five_tuple.dport,
            five_tuple.proto,
            FAMILIES[five_tuple.src.version],
        )
    )


def header_bytes(record, size, kind, version=1):
    return struct.pack("=QIHBB", record.ktime_ns, record.netns, size, version, kind)


def connection_bytes(value):
    flags = (value.mark is not None) | value.is_related << 1
    return (
        header_bytes(value, 128, 1)
        + tuple_bytes(value.orig)
        + tuple_bytes(value.reply)
        + struct.pack("=5I", value.status, value.mark or 0, value.ct_mark, value.iif, value.oif)
        + struct.pack("=HBBB7x", value.zone, 3, value.hook, flags)
    )


def drop_bytes(value):
    flags = (
        (value.packet is not None)
        | (value.orig is not None) << 1
        | (value.dst_input is not None) << 2
        | value.is_reply << 3
        | value.is_new << 4
    )
    return (
        header_bytes(value, 136, 2)
        + tuple_bytes(value.packet)
        + tuple_bytes(value.orig)
        + struct.pack("=QQ", value.location, value.dst_input or 0)
        + struct.pack("=II", value.reason, value.mark)
        + struct.pack("=IIIBBH", value.ifindex, value.iif, value.dst_ifindex, flags, *_zone(value))
    )


def _zone(value):
    """Its direction, which is both where there is an entry, and its number."""
    return 3 * (value.orig is not None), value.zone


def hop_bytes(value):
    flags = (
        (value.orig is not None)
        | value.is_reply << 1
        | value.is_new << 2
        | bool(value.is_after_nat) << 3
        | value.is_fragment << 4
    )
    return (
        header_bytes(value, 168, 4)
        + tuple_bytes(value.packet)
        + tuple_bytes(value.orig)
        + tuple_bytes(value.reply)
        + struct.pack("=QII", value.packet_id, value.mark, value.iif)
        + struct.pack("=IIH", value.oif, value.length, value.number)
        + struct.pack("=BBBBH", value.hook, flags, value.tcp_flags, *_zone(value))
    )


def accept_bytes(value):
    return header_bytes(value, 56, 3) + tuple_bytes(value.peer)


def segment_bytes(flow, offset, payload, *, ktime_ns=KTIME_NS, flags=0):
    return (
        struct.pack("=QIHBB", ktime_ns, NETNS, 64 + len(payload), 1, 5)
        + tuple_bytes(flow)
        + struct.pack("=IHBx", offset, len(payload), flags)
        + payload
    )


def declared_bytes(value):
    return (
        header_bytes(value, 64 + 36 * len(value.clients), 6)
        + tuple_bytes(value.flow)
        + struct.pack("=BBB5x", value.opening, value.has_more, len(value.clients))
        + b"".join(map(client_bytes, value.clients))
    )


def client_bytes(value):
    told = _octets(value.address) if value.address else (value.token or "").encode()
    return struct.pack("=BBH32s", value.header, value.form, value.port or 0, told)


def _octets(address):
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


OTHER_ORDER = {"little": "big", "big": "little"}[sys.byteorder]


# Strategies.

_u8 = st.integers(0, 0xFF)
_u16 = st.integers(0, 0xFFFF)
_u32 = st.integers(0, 0xFFFF_FFFF)
_u64 = st.integers(0, 0xFFFF_FFFF_FFFF_FFFF)
ipv4 = st.integers(0, 2**32 - 1).map(IPv4Address)
ipv6 = st.integers(0, 2**128 - 1).map(IPv6Address)


def _tuples_of(addresses):
    return st.builds(FiveTuple, src=addresses, dst=addresses, sport=_u16, dport=_u16, proto=_u8)


# Both addresses of a tuple are of one family.
tuples = st.one_of(_tuples_of(ipv4), _tuples_of(ipv6))


def _connections_of(addresses):
    return st.builds(
        Connection,
        ktime_ns=_u64,
        netns=_u32,
        hook=st.sampled_from(Hook),
        orig=_tuples_of(addresses),
        reply=_tuples_of(addresses),
        status=st.integers(0, 0xFFFF).map(Status),
        zone=_u16,
        mark=st.none() | _u32,
        ct_mark=_u32,
        iif=_u32,
        oif=_u32,
        is_related=st.booleans(),
    )


connections = st.one_of(_connections_of(ipv4), _connections_of(ipv6))
drops = st.builds(
    Drop,
    ktime_ns=_u64,
    netns=_u32,
    packet=st.none() | tuples,
    orig=st.none() | tuples,
    is_reply=st.booleans(),
    is_new=st.booleans(),
    reason=_u32,
    location=_u64,
    dst_input=st.none() | _u64,
    mark=_u32,
    ifindex=_u32,
    iif=_u32,
    dst_ifindex=_u32,
    zone=_u16,
).map(lambda drop: drop if drop.orig else replace(drop, zone=0))
_TC = (Hook.TC_INGRESS, Hook.TC_EGRESS)


@st.composite
def hops(draw):
    hook = draw(st.sampled_from(Hook))
    has_entry = draw(st.booleans())
    return Hop(
        ktime_ns=draw(_u64),
        netns=draw(_u32),
        hook=hook,
        packet=draw(tuples),
        orig=draw(tuples) if has_entry else None,
        reply=draw(tuples) if has_entry else None,
        is_reply=draw(st.booleans()),
        is_new=draw(st.booleans()),
        is_after_nat=None if hook in _TC else draw(st.booleans()),
        packet_id=draw(_u64),
        number=draw(_u16),
        mark=draw(_u32),
        iif=draw(_u32),
        oif=draw(_u32),
        length=draw(_u32),
        tcp_flags=draw(_u8),
        is_fragment=draw(st.booleans()),
        zone=draw(_u16) if has_entry else 0,
    )


_ports = st.none() | st.integers(1, 0xFFFF)
# IPv4 in IPv6's clothes is IPv4: a header's reader undresses it.
_bare_ipv6 = ipv6.filter(lambda address: address.ipv4_mapped is None)
clients = st.one_of(
    st.builds(
        DeclaredClient,
        header=st.sampled_from(ProxyHeader),
        form=st.just(ClientForm.ADDRESS),
        address=ipv4 | _bare_ipv6,
        port=_ports,
    ),
    st.builds(
        DeclaredClient,
        header=st.sampled_from(ProxyHeader),
        form=st.just(ClientForm.TOKEN),
        token=st.from_regex(CLIENT_TOKEN, fullmatch=True),
        port=_ports,
    ),
    st.builds(
        DeclaredClient,
        header=st.sampled_from(ProxyHeader),
        form=st.sampled_from((ClientForm.UNKNOWN, ClientForm.LOCAL, ClientForm.INVALID)),
        port=_ports,
    ),
)
declared = st.builds(
    Declared,
    ktime_ns=_u64,
    netns=_u32,
    flow=tuples,
    opening=st.sampled_from(Opening),
    clients=st.lists(clients, max_size=17).map(tuple),
    has_more=st.booleans(),
)
accepts = st.builds(Accept, ktime_ns=_u64, netns=_u32, peer=tuples)
