"""Decode kernel records into model objects: bytes in, values out, no I/O."""

import ctypes
import sys
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address

from tracer.errors import DecodeError
from tracer.model import (
    Accept,
    AddressFlag,
    ClientClass,
    Connection,
    Drop,
    FiveTuple,
    Hook,
    Hop,
    IPAddress,
    PathKey,
    Status,
)
from tracer.proxy_headers import (
    CLIENT_TOKEN,
    ClientForm,
    Declared,
    DeclaredClient,
    Opening,
    ProxyHeader,
    Segment,
)
from tracer.wire import (
    HEADER_SIZE,
    RECORDS,
    WIRE_VERSION,
    ConnectionFlag,
    DeclaredFlag,
    DropFlag,
    HopFlag,
    Kind,
    PathFlag,
    SegmentFlag,
    WireAccept,
    WireClient,
    WireConnection,
    WireDeclared,
    WireDrop,
    WireHeader,
    WireHop,
    WirePathKey,
    WireSegment,
    WireTuple,
)

Record = Connection | Drop | Accept | Hop | Declared

AF_INET, AF_INET6 = 2, 10
# NF_CT_ZONE_DIR_ORIG, include/net/netfilter/nf_conntrack_zones.h
_ZONE_DIR_ORIG = 1
_KIND_AT = WireHeader.kind.offset
_KTIME = slice(WireHeader.ktime_ns.offset, WireHeader.ktime_ns.offset + WireHeader.ktime_ns.size)
_MAPPED = b"\0" * 10 + b"\xff\xff"
_ADDRESSES = 16_384


def kind_of(record: bytes) -> int:
    """Return the kind in a record's header, without decoding the rest; 0 if it is too short."""
    return record[_KIND_AT] if len(record) > _KIND_AT else 0


def ktime_of(record: bytes) -> int:
    """Return the time in a record's header, without decoding the rest."""
    return int.from_bytes(record[_KTIME], sys.byteorder)


def decode(record: bytes) -> Record:
    """
    Decode one record.

    Args:
        record: One record, exactly as the ring buffer delivered it.

    Raises:
        DecodeError: If it is too short, is of an unknown kind or another wire version, or holds a
            value that the wire format does not define.
    """
    kind = _kind(record)
    size = ctypes.sizeof(RECORDS[kind])
    if kind is Kind.DECLARED and len(record) > size:
        size += WireDeclared.from_buffer_copy(record).clients * ctypes.sizeof(WireClient)
    _check_size(record, kind, size)
    match kind:
        case Kind.CONNECTION:
            return _connection(WireConnection.from_buffer_copy(record))
        case Kind.DROP:
            return _drop(WireDrop.from_buffer_copy(record))
        case Kind.HOP:
            return _hop(WireHop.from_buffer_copy(record))
        case Kind.ACCEPT:
            return _accept(WireAccept.from_buffer_copy(record))
        case Kind.DECLARED:
            return _declared(record)
        case Kind.SEGMENT:
            raise DecodeError("segment record outside of its own ring")


def decode_segment(record: bytes) -> Segment:
    """
    Decode one record of the ring of segments; segments are never recorded.

    Raises:
        DecodeError: As `decode` does.
    """
    kind = _kind(record)
    size = ctypes.sizeof(WireSegment)
    if kind is not Kind.SEGMENT or len(record) < size:
        raise DecodeError(f"{kind.name.lower()} record of {len(record)} bytes is not a segment")
    wire = WireSegment.from_buffer_copy(record)
    _check_size(record, kind, size + wire.length)
    return Segment(
        ktime_ns=wire.header.ktime_ns,
        netns=wire.header.netns,
        flow=_five_tuple(wire.flow),
        offset=wire.offset,
        payload=record[size:],
        is_end=bool(wire.flags & SegmentFlag.IS_END),
        is_cut=bool(wire.flags & SegmentFlag.IS_CUT),
    )


def _kind(record: bytes) -> Kind:
    if len(record) < HEADER_SIZE:
        raise DecodeError(f"record has {len(record)} bytes, fewer than its header's {HEADER_SIZE}")
    header = WireHeader.from_buffer_copy(record)
    if header.version != WIRE_VERSION:
        raise DecodeError(f"record has wire version {header.version}, expected {WIRE_VERSION}")
    try:
        return Kind(header.kind)
    except ValueError as error:
        raise DecodeError(f"record has unknown kind {header.kind}") from error


def _check_size(record: bytes, kind: Kind, size: int) -> None:
    stated = WireHeader.from_buffer_copy(record).size
    if len(record) != size or stated != size:
        raise DecodeError(
            f"{kind.name.lower()} record has {len(record)} bytes and states {stated}, "
            f"expected {size}"
        )


def decode_path_key(key: bytes) -> PathKey:
    """
    Decode one key of the map of counted paths.

    Raises:
        DecodeError: If it holds a value that the wire format does not define.
    """
    wire = WirePathKey.from_buffer_copy(key)
    flags = PathFlag(wire.flags)
    has_dst = bool(wire.dport) or any(wire.dst)
    return PathKey(
        netns=wire.netns,
        zone=wire.zone,
        family=_family_name(wire.family),
        proto=wire.proto,
        client_class=_client_class(wire.client_class),
        dst=_address(wire.dst, wire.family) if has_dst else None,
        dst_class=_client_class(wire.dst_class),
        dport=wire.dport,
        backend=_address(wire.backend, wire.family) if flags & PathFlag.DNAT else None,
        backend_port=wire.backend_port,
        seen_source=_address(wire.seen, wire.family) if flags & PathFlag.SNAT else None,
        is_marked=bool(flags & PathFlag.MARKED) if flags & PathFlag.HAS_MARK else None,
        is_input=bool(flags & PathFlag.INPUT),
        is_hairpin=bool(flags & PathFlag.HAIRPIN),
        has_snat_status=bool(flags & PathFlag.SRC_NAT),
        client_flags=AddressFlag(wire.client_flags),
    )


def _connection(wire: WireConnection) -> Connection:
    return Connection(
        ktime_ns=wire.header.ktime_ns,
        netns=wire.header.netns,
        hook=_hook(wire.hook, "connection"),
        orig=_five_tuple(wire.orig),
        reply=_five_tuple(wire.reply),
        status=Status(wire.status),
        zone=_zone(wire),
        mark=wire.mark if wire.flags & ConnectionFlag.HAS_MARK else None,
        ct_mark=wire.ct_mark,
        iif=wire.iif,
        oif=wire.oif,
        is_related=bool(wire.flags & ConnectionFlag.RELATED),
    )


def _drop(wire: WireDrop) -> Drop:
    return Drop(
        ktime_ns=wire.header.ktime_ns,
        netns=wire.header.netns,
        packet=_five_tuple(wire.packet) if wire.flags & DropFlag.HAS_TUPLE else None,
        orig=_five_tuple(wire.orig) if wire.flags & DropFlag.HAS_ORIG else None,
        is_reply=bool(wire.flags & DropFlag.IS_REPLY),
        is_new=bool(wire.flags & DropFlag.IS_NEW),
        reason=wire.reason,
        location=wire.location,
        dst_input=wire.dst_input if wire.flags & DropFlag.HAS_DST else None,
        mark=wire.mark,
        ifindex=wire.ifindex,
        iif=wire.iif,
        dst_ifindex=wire.dst_ifindex,
        zone=_zone(wire),
    )


def _accept(wire: WireAccept) -> Accept:
    return Accept(
        ktime_ns=wire.header.ktime_ns,
        netns=wire.header.netns,
        peer=_five_tuple(wire.peer),
    )


def _hop(wire: WireHop) -> Hop:
    hook = _hook(wire.hook, "hop")
    has_entry = wire.flags & HopFlag.HAS_ENTRY
    is_tc = hook in (Hook.TC_INGRESS, Hook.TC_EGRESS)
    return Hop(
        ktime_ns=wire.header.ktime_ns,
        netns=wire.header.netns,
        hook=hook,
        packet=_five_tuple(wire.packet),
        orig=_five_tuple(wire.orig) if has_entry else None,
        reply=_five_tuple(wire.reply) if has_entry else None,
        is_reply=bool(wire.flags & HopFlag.IS_REPLY),
        is_new=bool(wire.flags & HopFlag.IS_NEW),
        is_after_nat=None if is_tc else bool(wire.flags & HopFlag.AFTER_NAT),
        packet_id=wire.packet_id,
        number=wire.number,
        mark=wire.mark,
        iif=wire.iif,
        oif=wire.oif,
        length=wire.length,
        tcp_flags=wire.tcp_flags,
        is_fragment=bool(wire.flags & HopFlag.IS_FRAGMENT),
        zone=_zone(wire),
    )


def _zone(wire: WireConnection | WireDrop | WireHop) -> int:
    """Return an entry's zone. It may apply to one direction only: the original one counts."""
    return int(wire.zone) if wire.zone_dir & _ZONE_DIR_ORIG else 0


def _declared(record: bytes) -> Declared:
    wire = WireDeclared.from_buffer_copy(record)
    begin, size = ctypes.sizeof(WireDeclared), ctypes.sizeof(WireClient)
    places = range(begin, begin + wire.clients * size, size)
    try:
        return Declared(
            ktime_ns=wire.header.ktime_ns,
            netns=wire.header.netns,
            flow=_five_tuple(wire.flow),
            opening=Opening(wire.opening),
            clients=tuple(_client(WireClient.from_buffer_copy(record, at)) for at in places),
            has_more=bool(wire.flags & DeclaredFlag.HAS_MORE),
        )
    except ValueError as error:
        raise DecodeError(f"declared record: {error}") from error


def _client(wire: WireClient) -> DeclaredClient:
    form, value = ClientForm(wire.form), bytes(wire.value)
    address = token = None
    if form is ClientForm.ADDRESS:
        family = AF_INET if value.startswith(_MAPPED) else AF_INET6
        address = _address(wire.value, family)
    elif form is ClientForm.TOKEN:
        token = value.rstrip(b"\0").decode("ascii", "replace")
        if not CLIENT_TOKEN.fullmatch(token):
            raise DecodeError("declared record has an invalid client name")
    return DeclaredClient(
        header=ProxyHeader(wire.header),
        form=form,
        address=address,
        port=wire.port or None,
        token=token,
    )


def _hook(number: int, kind: str) -> Hook:
    try:
        return Hook(number)
    except ValueError as error:
        raise DecodeError(f"{kind} record has unknown hook {number}") from error


def _five_tuple(wire: WireTuple) -> FiveTuple:
    return FiveTuple(
        src=_address(wire.src, wire.family),
        dst=_address(wire.dst, wire.family),
        sport=wire.sport,
        dport=wire.dport,
        proto=wire.proto,
    )


# The same addresses occur again and again: share one object for each.
@lru_cache(maxsize=_ADDRESSES)
def _address_of(raw: bytes, family: int) -> IPAddress:
    if family == AF_INET:
        if not raw.startswith(_MAPPED):
            raise DecodeError(f"IPv4 address is not in mapped form: {raw.hex()}")
        return IPv4Address(raw[12:])
    if family == AF_INET6:
        return IPv6Address(raw)
    raise DecodeError(f"record has unknown address family {family}")


def _address(octets: ctypes.Array[ctypes.c_uint8], family: int) -> IPAddress:
    return _address_of(bytes(octets)[:16], family)


def _family_name(family: int) -> str:
    if family not in (AF_INET, AF_INET6):
        raise DecodeError(f"path has unknown address family {family}")
    return "ipv4" if family == AF_INET else "ipv6"


def _client_class(number: int) -> ClientClass:
    try:
        return ClientClass(number)
    except ValueError as error:
        raise DecodeError(f"path has unknown client class {number}") from error
