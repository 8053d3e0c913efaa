"""Encode model values as wire bytes: configuration for the programs, and records."""

import ctypes
from collections.abc import Iterable

from tracer.filter import Filter
from tracer.model import Connection, FiveTuple, IPAddress, IPNetwork
from tracer.proxy_headers import Declared, DeclaredClient
from tracer.wire import (
    RECORDS,
    WIRE_VERSION,
    ConnectionFlag,
    DeclaredFlag,
    Kind,
    WireClient,
    WireConfig,
    WireConnection,
    WireDeclared,
    WireFilter,
    WireHeader,
    WirePrefix,
    WireTuple,
)

AF_INET, AF_INET6 = 2, 10
_BOTH_DIRECTIONS = 3
_NO_FAMILY = 255
_REASON_BITS = 256


def encode_config(
    *,
    wanted: Filter,
    reasons: Iterable[int],
    wakeup_records: int,
    masquerade_mark: int,
    is_streaming: bool,
    is_counting: bool,
    active_paths: int = 0,
    sample_round: int = 1,
    classes_round: int = 0,
    packets: int = 0,
    is_broad: bool = False,
) -> bytes:
    """
    Encode ``struct srcip_config``.

    Args:
        wanted: What to stream; the kernel filters before it writes a record.
        reasons: Drop reasons to report for every flow, as the running kernel's numbers below 256.
        wakeup_records: A CPU wakes the reader once per this many records.
        masquerade_mark: kube-proxy's masquerade bit.
        is_streaming: Whether to write records at all.
        is_counting: Whether to count connections by path.
        active_paths: The index of the map of paths that counts.
        sample_round: Not 0; change it to make the programs look up each path's sample again.
        classes_round: Below 2^24; change it when classes of addresses changed. 0 to cache no
            classes, because the cache does not distinguish namespaces.
        packets: Number of packets per direction whose hops to report.
        is_broad: Whether to also report what a wanted connection becomes on other nodes, where the
            filter does not match it: user space then filters connections and drops.
    """
    config = WireConfig(
        filter=_filter(wanted),
        wakeup_records=wakeup_records,
        masquerade_mark=masquerade_mark,
        is_streaming=is_streaming,
        is_counting=is_counting,
        is_filtered=not wanted.is_empty,
        active_paths=active_paths,
        sample_round=sample_round,
        classes_round=classes_round,
        packets=packets,
        is_broad=is_broad,
    )
    for reason in reasons:
        if 0 <= reason < _REASON_BITS:
            config.reasons[reason // 64] |= 1 << (reason % 64)
    return bytes(config)


def encode_prefix(netns: int, network: IPNetwork) -> bytes:
    """Encode ``struct srcip_prefix``, the key of the map of address classes."""
    length = 32 + network.prefixlen + (96 if network.version == 4 else 0)
    address = _octets(mapped(network.network_address))
    return bytes(WirePrefix(length=length, netns=netns, address=address))


def encode_connection(connection: Connection) -> bytes:
    """Encode a connection as the kernel does: the inverse of `decode`."""
    return bytes(
        WireConnection(
            header=_header(connection, Kind.CONNECTION),
            orig=encode_tuple(connection.orig),
            reply=encode_tuple(connection.reply),
            status=connection.status,
            mark=connection.mark or 0,
            ct_mark=connection.ct_mark,
            iif=connection.iif,
            oif=connection.oif,
            zone=connection.zone,
            zone_dir=_BOTH_DIRECTIONS,
            hook=connection.hook,
            flags=_flags(
                (ConnectionFlag.HAS_MARK, connection.mark is not None),
                (ConnectionFlag.RELATED, connection.is_related),
            ),
        )
    )


def encode_declared(declared: Declared) -> bytes:
    """Encode what a connection's first bytes declare: a fixed part, then its clients."""
    clients = b"".join(map(_client, declared.clients))
    head = WireDeclared(
        header=_header(declared, Kind.DECLARED, more=len(clients)),
        flow=encode_tuple(declared.flow),
        opening=declared.opening,
        flags=_flags((DeclaredFlag.HAS_MORE, declared.has_more)),
        clients=len(declared.clients),
    )
    return bytes(head) + clients


def _header(record: Connection | Declared, kind: Kind, *, more: int = 0) -> WireHeader:
    """Return a record's header; ``more`` bytes follow its fixed part."""
    return WireHeader(
        ktime_ns=record.ktime_ns,
        netns=record.netns,
        size=ctypes.sizeof(RECORDS[kind]) + more,
        version=WIRE_VERSION,
        kind=kind,
    )


def _flags(*flags: tuple[int, bool]) -> int:
    return sum(flag for flag, is_set in flags if is_set)


def _client(client: DeclaredClient) -> bytes:
    value = mapped(client.address) if client.address else (client.token or "").encode()
    wire = WireClient(header=client.header, form=client.form, port=client.port or 0)
    wire.value[: len(value)] = value
    return bytes(wire)


def encode_tuple(flow: FiveTuple) -> WireTuple:
    """Encode ``struct srcip_tuple``."""
    return WireTuple(
        src=_octets(mapped(flow.src)),
        dst=_octets(mapped(flow.dst)),
        sport=flow.sport,
        dport=flow.dport,
        proto=flow.proto,
        family=_family(flow.src),
    )


def mapped(address: IPAddress) -> bytes:
    """Return an address as 16 bytes in network order, IPv4 as ``::ffff:a.b.c.d``."""
    if address.version == 4:
        return b"\0" * 10 + b"\xff\xff" + address.packed
    return address.packed


def _filter(wanted: Filter) -> WireFilter:
    wire = WireFilter(port=wanted.port or 0, proto=wanted.proto or 0)
    families = {_family(each) for each in (wanted.client, wanted.backend) if each is not None}
    if families:
        # Client and backend are always of one family: prefixes of both match nothing.
        wire.family = families.pop() if len(families) == 1 else _NO_FAMILY
    if wanted.client:
        wire.client, wire.client_mask = _prefix_and_mask(wanted.client)
    if wanted.backend:
        wire.backend, wire.backend_mask = _prefix_and_mask(wanted.backend)
    return wire


def _family(what: IPAddress | IPNetwork) -> int:
    return AF_INET if what.version == 4 else AF_INET6


def _prefix_and_mask(
    network: IPNetwork,
) -> tuple[ctypes.Array[ctypes.c_uint8], ctypes.Array[ctypes.c_uint8]]:
    mask = network.netmask.packed.rjust(16, b"\xff")
    return _octets(mapped(network.network_address)), _octets(mask)


def _octets(raw: bytes) -> ctypes.Array[ctypes.c_uint8]:
    return (ctypes.c_uint8 * 16).from_buffer_copy(raw)
