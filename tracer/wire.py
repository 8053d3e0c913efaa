"""ctypes mirror of ``bpf/wire.h``: layouts and constants only."""

import ctypes
from enum import IntEnum, IntFlag

WIRE_VERSION = 1
# How many low bits of a path's value on one CPU are its count of connections.
COUNT_BITS = 48
CLASS_BITS = 4

_ADDRESS = ctypes.c_uint8 * 16


class Kind(IntEnum):
    """``enum srcip_kind``: the kind of a record."""

    CONNECTION = 1
    DROP = 2
    ACCEPT = 3
    HOP = 4
    SEGMENT = 5
    DECLARED = 6


# The reason of the only drops reported by a kernel without drop reasons.
REASON_NETFILTER_DROP = 1


class Lost(IntEnum):
    """``enum srcip_lost``: slots of each program's counters of what it could not report."""

    RING_FULL = 0
    PATHS_FULL = 1
    MARK_OVERTAKEN = 2
    UNREADABLE = 3
    UNTRACKED = 4
    HOP_OVERTAKEN = 5
    OVER_LIMIT = 6
    SEGMENT_LIMIT = 7


class ConnectionFlag(IntFlag):
    """``enum srcip_connection_flag``."""

    HAS_MARK = 1
    RELATED = 2


class DropFlag(IntFlag):
    """``enum srcip_drop_flag``."""

    HAS_TUPLE = 1
    HAS_ORIG = 2
    HAS_DST = 4
    IS_REPLY = 8
    IS_NEW = 16


class HopFlag(IntFlag):
    """``enum srcip_hop_flag``."""

    HAS_ENTRY = 1
    IS_REPLY = 2
    IS_NEW = 4
    AFTER_NAT = 8
    IS_FRAGMENT = 16


class SegmentFlag(IntFlag):
    """``enum srcip_segment_flag``."""

    IS_END = 1
    IS_CUT = 2


class DeclaredFlag(IntFlag):
    """``enum srcip_declared_flag``."""

    HAS_MORE = 1


class PathFlag(IntFlag):
    """``enum srcip_path_flag``."""

    SNAT = 1
    DNAT = 2
    MARKED = 4
    INPUT = 8
    HAS_MARK = 16
    HAIRPIN = 32
    SRC_NAT = 64


class WireTuple(ctypes.Structure):
    """``struct srcip_tuple``."""

    _fields_ = (
        ("src", _ADDRESS),
        ("dst", _ADDRESS),
        ("sport", ctypes.c_uint16),
        ("dport", ctypes.c_uint16),
        ("proto", ctypes.c_uint8),
        ("family", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 2),
    )


class WireHeader(ctypes.Structure):
    """``struct srcip_header``."""

    _fields_ = (
        ("ktime_ns", ctypes.c_uint64),
        ("netns", ctypes.c_uint32),
        ("size", ctypes.c_uint16),
        ("version", ctypes.c_uint8),
        ("kind", ctypes.c_uint8),
    )


class WireConnection(ctypes.Structure):
    """``struct srcip_connection``."""

    _fields_ = (
        ("header", WireHeader),
        ("orig", WireTuple),
        ("reply", WireTuple),
        ("status", ctypes.c_uint32),
        ("mark", ctypes.c_uint32),
        ("ct_mark", ctypes.c_uint32),
        ("iif", ctypes.c_uint32),
        ("oif", ctypes.c_uint32),
        ("zone", ctypes.c_uint16),
        ("zone_dir", ctypes.c_uint8),
        ("hook", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 7),
    )


class WireDrop(ctypes.Structure):
    """``struct srcip_drop``."""

    _fields_ = (
        ("header", WireHeader),
        ("packet", WireTuple),
        ("orig", WireTuple),
        ("location", ctypes.c_uint64),
        ("dst_input", ctypes.c_uint64),
        ("reason", ctypes.c_uint32),
        ("mark", ctypes.c_uint32),
        ("ifindex", ctypes.c_uint32),
        ("iif", ctypes.c_uint32),
        ("dst_ifindex", ctypes.c_uint32),
        ("flags", ctypes.c_uint8),
        ("zone_dir", ctypes.c_uint8),
        ("zone", ctypes.c_uint16),
    )


class WireAccept(ctypes.Structure):
    """``struct srcip_accept``."""

    _fields_ = (("header", WireHeader), ("peer", WireTuple))


class WireHop(ctypes.Structure):
    """``struct srcip_hop``."""

    _fields_ = (
        ("header", WireHeader),
        ("packet", WireTuple),
        ("orig", WireTuple),
        ("reply", WireTuple),
        ("packet_id", ctypes.c_uint64),
        ("mark", ctypes.c_uint32),
        ("iif", ctypes.c_uint32),
        ("oif", ctypes.c_uint32),
        ("length", ctypes.c_uint32),
        ("number", ctypes.c_uint16),
        ("hook", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("tcp_flags", ctypes.c_uint8),
        ("zone_dir", ctypes.c_uint8),
        ("zone", ctypes.c_uint16),
    )


class WireSegment(ctypes.Structure):
    """``struct srcip_segment``; ``length`` bytes follow."""

    _fields_ = (
        ("header", WireHeader),
        ("flow", WireTuple),
        ("offset", ctypes.c_uint32),
        ("length", ctypes.c_uint16),
        ("flags", ctypes.c_uint8),
        ("pad", ctypes.c_uint8),
    )


class WireClient(ctypes.Structure):
    """``struct srcip_client``."""

    _fields_ = (
        ("header", ctypes.c_uint8),
        ("form", ctypes.c_uint8),
        ("port", ctypes.c_uint16),
        ("value", ctypes.c_uint8 * 32),
    )


class WireDeclared(ctypes.Structure):
    """``struct srcip_declared``; ``clients`` times ``WireClient`` follow."""

    _fields_ = (
        ("header", WireHeader),
        ("flow", WireTuple),
        ("opening", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("clients", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 5),
    )


class WirePrefix(ctypes.Structure):
    """``struct srcip_prefix``."""

    _fields_ = (("length", ctypes.c_uint32), ("netns", ctypes.c_uint32), ("address", _ADDRESS))


class WireFilter(ctypes.Structure):
    """``struct srcip_filter``."""

    _fields_ = (
        ("client", _ADDRESS),
        ("client_mask", _ADDRESS),
        ("backend", _ADDRESS),
        ("backend_mask", _ADDRESS),
        ("port", ctypes.c_uint16),
        ("proto", ctypes.c_uint8),
        ("family", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 4),
    )


class WireConfig(ctypes.Structure):
    """``struct srcip_config``."""

    _fields_ = (
        ("filter", WireFilter),
        ("reasons", ctypes.c_uint64 * 4),
        ("wakeup_records", ctypes.c_uint32),
        ("masquerade_mark", ctypes.c_uint32),
        ("is_streaming", ctypes.c_uint8),
        ("is_counting", ctypes.c_uint8),
        ("is_filtered", ctypes.c_uint8),
        ("active_paths", ctypes.c_uint8),
        ("is_broad", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 1),
        ("packets", ctypes.c_uint16),
        ("sample_round", ctypes.c_uint16),
        ("pad2", ctypes.c_uint8 * 2),
        ("classes_round", ctypes.c_uint32),
    )


class WirePathKey(ctypes.Structure):
    """``struct srcip_path_key``."""

    _fields_ = (
        ("dst", _ADDRESS),
        ("backend", _ADDRESS),
        ("seen", _ADDRESS),
        ("netns", ctypes.c_uint32),
        ("dport", ctypes.c_uint16),
        ("backend_port", ctypes.c_uint16),
        ("zone", ctypes.c_uint16),
        ("proto", ctypes.c_uint8),
        ("family", ctypes.c_uint8),
        ("client_class", ctypes.c_uint8),
        ("dst_class", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("client_flags", ctypes.c_uint8),
    )


class WireStreamKey(ctypes.Structure):
    """``struct srcip_stream_key``."""

    _fields_ = (("flow", WireTuple), ("netns", ctypes.c_uint32), ("pad", ctypes.c_uint8 * 4))


HEADER_SIZE = ctypes.sizeof(WireHeader)
RECORDS: dict[Kind, type[ctypes.Structure]] = {
    Kind.CONNECTION: WireConnection,
    Kind.DROP: WireDrop,
    Kind.ACCEPT: WireAccept,
    Kind.HOP: WireHop,
    Kind.SEGMENT: WireSegment,
    Kind.DECLARED: WireDeclared,
}
