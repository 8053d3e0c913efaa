"""What the kernel reports, in its own terms: connections, drops, accepts, hops."""

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

TCP, UDP, ICMP, ICMPV6, SCTP = 6, 17, 1, 58, 132
PROTOCOLS = {"tcp": TCP, "udp": UDP, "icmp": ICMP, "icmpv6": ICMPV6, "sctp": SCTP}
_PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}


# ICMP types of queries and their answers: invmap[] of nf_conntrack_proto_icmp.c and _icmpv6.c.
_ICMP_PAIRS = {
    ICMP: ((8, 0), (13, 14), (15, 16), (17, 18)),
    ICMPV6: ((128, 129), (139, 140)),
}
_ICMP_ANSWERS = {
    (proto, here): there
    for proto, pairs in _ICMP_PAIRS.items()
    for pair in pairs
    for here, there in (pair, pair[::-1])
}


def protocol_name(number: int) -> str:
    """Return an IP protocol's name as ``conntrack -L`` prints it, or its number."""
    return _PROTOCOL_NAMES.get(number, str(number))


class Hook(IntEnum):
    """Where in the kernel something was seen. Values are ``enum srcip_hook``."""

    NF_PREROUTING = 1
    NF_INPUT = 2
    NF_FORWARD = 3
    NF_OUTPUT = 4
    NF_POSTROUTING = 5
    CONNTRACK = 6
    TC_INGRESS = 7
    TC_EGRESS = 8

    @property
    def label(self) -> str:
        """The name used in output: netfilter hooks as iptables spells them, in lower case."""
        return self.name.lower().removeprefix("nf_")


class Status(IntFlag):
    """Bits of ``nf_conn.status``: ``enum ip_conntrack_status`` of the kernel's uapi."""

    EXPECTED = 1 << 0
    SEEN_REPLY = 1 << 1
    ASSURED = 1 << 2
    CONFIRMED = 1 << 3
    SRC_NAT = 1 << 4
    DST_NAT = 1 << 5
    SEQ_ADJUST = 1 << 6
    SRC_NAT_DONE = 1 << 7
    DST_NAT_DONE = 1 << 8
    DYING = 1 << 9
    FIXED_TIMEOUT = 1 << 10
    TEMPLATE = 1 << 11
    UNTRACKED = 1 << 12
    HELPER = 1 << 13
    OFFLOAD = 1 << 14
    HW_OFFLOAD = 1 << 15


class ClientClass(IntEnum):
    """What an address is in the cluster. Values are ``enum srcip_client_class``."""

    EXTERNAL = 0
    POD = 1
    NODE = 2
    LOADBALANCER = 3
    LOOPBACK = 4


class AddressFlag(IntFlag):
    """
    Further properties of an address. Values are ``enum srcip_address_flag``.

    ``HERE``: the traced node's own; ``CLUSTER``: in a range that kube-proxy takes for pods
    (``--cluster-cidr``).
    """

    HERE = 1
    CLUSTER = 2


NO_FLAGS = AddressFlag(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FiveTuple:
    """
    One direction of a flow. Field names are those of ``conntrack -L``.

    ICMP has no ports: ``sport`` is its id, ``dport`` its ``type << 8 | code``.
    """

    src: IPAddress
    dst: IPAddress
    sport: int
    dport: int
    proto: int

    @property
    def inverted(self) -> "FiveTuple":
        """The tuple of the answer, as conntrack inverts it; for an echo request, an echo reply."""
        sport, dport = self.dport, self.sport
        if self.is_icmp:
            sport, dport = self.sport, _answer(self.proto, self.dport >> 8) << 8 | self.dport & 0xFF
        return FiveTuple(src=self.dst, dst=self.src, sport=sport, dport=dport, proto=self.proto)

    @property
    def numbers(self) -> tuple[int, int, int, int, int, int]:
        """The tuple as a fast dictionary key: numbers hash faster than addresses."""
        src = self.src
        return src.version, int(src), int(self.dst), self.sport, self.dport, self.proto

    @property
    def family(self) -> str:
        """``ipv4`` or ``ipv6``."""
        return f"ipv{self.src.version}"

    @property
    def is_icmp(self) -> bool:
        """Whether the ports hold an ICMP id, type and code."""
        return self.proto in (ICMP, ICMPV6)

    def has_destination_of(self, other: "FiveTuple") -> bool:
        """Whether both go to the same address and port."""
        return self.dst == other.dst and (self.is_icmp or self.dport == other.dport)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """
    A conntrack entry: the tuple that the client sent, and the reply expected for it.

    Without NAT the reply is the original reversed; an address that differs means SNAT or DNAT.
    A change of ports alone does not count: it does not hide the client.

    ``mark`` is the packet's mark before SNAT, None if it was not seen there; ``ct_mark`` is the
    entry's. ``iif`` and ``oif`` are 0 if there is no interface.
    """

    ktime_ns: int
    netns: int
    hook: Hook
    orig: FiveTuple
    reply: FiveTuple
    status: Status
    zone: int
    mark: int | None
    ct_mark: int
    iif: int
    oif: int
    is_related: bool

    @property
    def is_snat(self) -> bool:
        """Whether the backend sees another source address than the client's."""
        return self.reply.dst != self.orig.src

    @property
    def is_dnat(self) -> bool:
        """Whether the destination address was replaced."""
        return self.reply.src != self.orig.dst

    @property
    def is_translated(self) -> bool:
        """Whether the destination's address or port was replaced."""
        return not self.orig.has_destination_of(self.reply.inverted)

    @property
    def seen_source(self) -> IPAddress:
        """The source address with which packets leave this node for the backend."""
        return self.reply.dst


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """
    A packet that the kernel discarded.

    ``packet`` is its tuple at that moment, ``orig`` the original tuple of its conntrack entry;
    either is None if the kernel had none. ``zone`` is the entry's, 0 if there is none. ``is_new``
    says that conntrack had not seen an answer yet. ``reason``, ``location`` and ``dst_input`` are
    numbers and addresses of the running kernel; a source knows their names.
    """

    ktime_ns: int
    netns: int
    packet: FiveTuple | None
    orig: FiveTuple | None
    is_reply: bool
    is_new: bool
    reason: int
    location: int
    dst_input: int | None
    mark: int
    ifindex: int
    iif: int
    dst_ifindex: int
    zone: int = 0

    @property
    def flow(self) -> FiveTuple | None:
        """
        What the client sent: the entry's original tuple, else the packet's own.

        An ICMP error has the conntrack entry of the flow that it is about, but is not part of it.
        """
        if self.orig is None or (self.packet is not None and self.packet.proto != self.orig.proto):
            return self.packet
        return self.orig

    @property
    def is_translated(self) -> bool:
        """Whether its destination was replaced before it was discarded."""
        packet, orig = self.packet, self.orig
        if packet is None or orig is None or packet.proto != orig.proto or self.is_reply:
            return False
        return not packet.has_destination_of(orig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accept:
    """A TCP connection that a listening socket accepted: ``peer.src`` is the source it sees."""

    ktime_ns: int
    netns: int
    peer: FiveTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """
    A packet of a watched connection at one place on its way through a node.

    ``packet`` is its tuple at that place. ``orig`` and ``reply`` are those of its conntrack entry
    at that moment (before DNAT of a first packet, ``reply`` is ``orig`` inverted); None if it had
    none, as at tc ingress. ``zone`` is the entry's, 0 if there is none; a packet may pass several.
    ``packet_id`` is the same for all hops of a packet on one node; ``number`` counts the packets of
    a direction from 1. ``is_after_nat`` distinguishes the two places at a netfilter hook; None at
    tc. ``is_fragment`` marks fragments other than the first, which have no ports. ``length`` is in
    bytes, of what the kernel handles as one packet: it may be several segments.
    """

    ktime_ns: int
    netns: int
    hook: Hook
    packet: FiveTuple
    orig: FiveTuple | None
    reply: FiveTuple | None
    is_reply: bool
    is_new: bool
    is_after_nat: bool | None
    packet_id: int
    number: int
    mark: int
    iif: int
    oif: int
    length: int
    tcp_flags: int
    is_fragment: bool = False
    zone: int = 0

    @property
    def ifindex(self) -> int:
        """The packet's device: the outgoing one if already known, else the incoming one."""
        return self.oif or self.iif


@dataclass(frozen=True, slots=True, kw_only=True)
class PathKey:
    """
    The key by which connections are counted: a path through the node, never who used it.

    ``dst`` is None if the destination is an external address without DNAT; ``backend`` is None
    without DNAT, ``seen_source`` without SNAT. ``is_marked`` is None if the mark was not seen;
    ``is_hairpin`` says that the client is the backend; ``has_snat_status`` is IPS_SRC_NAT of
    conntrack's status; ``client_flags`` are those of the client's address.
    """

    netns: int
    zone: int
    family: str
    proto: int
    client_class: ClientClass
    dst: IPAddress | None
    dst_class: ClientClass
    dport: int
    backend: IPAddress | None
    backend_port: int
    seen_source: IPAddress | None
    is_marked: bool | None
    is_input: bool
    is_hairpin: bool = False
    has_snat_status: bool = False
    client_flags: AddressFlag = NO_FLAGS


def _answer(proto: int, icmp_type: int) -> int:
    return _ICMP_ANSWERS.get((proto, icmp_type), icmp_type)
