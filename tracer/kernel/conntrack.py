"""
Conntrack over netlink, read-only: the current table, and new entries as they are created.

Written by hand, because the alternatives use more memory than the tracer itself: see
docs/decisions/0003-conntrack-netlink.md.
"""

import errno
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from itertools import chain, islice
from pathlib import Path

from tracer.encode import encode_connection
from tracer.errors import ConntrackError
from tracer.kernel import netlink
from tracer.kernel.netlink import Attributes, attributes, messages
from tracer.kernel.netns import Netns, inside
from tracer.model import ICMP, ICMPV6, Connection, FiveTuple, Hook, IPAddress, Status
from tracer.source import SourceInfo

# include/uapi/linux/netlink.h, netfilter/nfnetlink.h, netfilter/nfnetlink_conntrack.h
_NETLINK_NETFILTER = 12
_CT_NEW, _CT_GET = 0x100, 0x101  # NFNL_SUBSYS_CTNETLINK << 8
_GROUP_NEW = 1
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_STATUS, _CTA_MARK, _CTA_ZONE = 1, 2, 3, 8, 18
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO, _CTA_TUPLE_ZONE = 1, 2, 3
_CTA_IP_V4_SRC, _CTA_IP_V4_DST, _CTA_IP_V6_SRC, _CTA_IP_V6_DST = 1, 2, 3, 4
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
_CTA_PROTO_ICMP_ID, _CTA_PROTO_ICMP_TYPE, _CTA_PROTO_ICMP_CODE = 4, 5, 6
_CTA_PROTO_ICMPV6_ID, _CTA_PROTO_ICMPV6_TYPE, _CTA_PROTO_ICMPV6_CODE = 7, 8, 9

_NFGENMSG_SIZE = 4
_EVENT_BUFFER = 4 << 20
_SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h; Python does not name it


def dump(netns: Netns) -> Iterator[Connection]:
    """
    Yield the connections that one namespace's conntrack table holds now.

    Entries have no timestamp; they get the time of reading. An entry that moves within the table
    meanwhile may be seen twice or not at all, as with ``conntrack -L``.

    Raises:
        ConntrackError: If the kernel refuses: no CAP_NET_ADMIN, or no conntrack netlink.
        NetnsError: If the namespace is gone or cannot be entered.
    """
    with _open(netns) as channel:
        request = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)
        try:
            for _, payload in netlink.dump(channel, _CT_GET, request):
                connection = parse(payload, netns.inode, time.monotonic_ns())
                if connection is not None:
                    yield connection
        except OSError as error:
            raise _refused(error.errno or 0, netns) from error


class DumpSource:
    """A source that reads conntrack's table once and ends."""

    RUNG = "conntrack dump"
    NOT_SEEN = ("the packet mark, so not kube-proxy's masquerade bit", "dropped packets")
    _BATCH = 1024

    def __init__(self, namespaces: Sequence[Netns], clock_offset_ns: int) -> None:
        self.info = SourceInfo(
            clock_offset_ns=clock_offset_ns,
            nodes={netns.inode: netns.node for netns in namespaces},
            rung=self.RUNG,
            not_seen=self.NOT_SEEN,
        )
        self._connections: Iterator[Connection] = chain.from_iterable(map(dump, namespaces))

    def read(self, timeout_s: float) -> list[bytes] | None:  # noqa: ARG002 - the protocol's
        """Return the next entries, None after the last."""
        batch = list(islice(self._connections, self._BATCH))
        return [encode_connection(connection) for connection in batch] or None

    def lost(self) -> Mapping[str, int]:
        """Return nothing: a dump loses nothing, because the kernel waits for its reader."""
        return {}

    def symbol(self, address: int) -> str | None:  # noqa: ARG002 - the protocol's
        """Return None: conntrack reports no function addresses."""
        return None

    def close(self) -> None:
        """Drop what was not read."""
        self._connections = iter(())


class ConntrackSource:
    """
    New connections from conntrack's own events: no BPF, no mark, no drops, no accepts.

    The last rung, for kernels with neither BPF netfilter links nor probes.
    """

    RUNG = "conntrack events"
    NOT_SEEN = (
        "the packet mark, so not kube-proxy's masquerade bit",
        "dropped packets",
        "what backends' sockets accepted",
    )
    _BATCH = 1024

    def __init__(self, namespaces: Sequence[Netns], clock_offset_ns: int) -> None:
        self.info = SourceInfo(
            clock_offset_ns=clock_offset_ns,
            nodes={netns.inode: netns.node for netns in namespaces},
            rung=self.RUNG,
            not_seen=self.NOT_SEEN,
        )
        self._lost = {"conntrack_overrun": 0, "undecodable": 0}
        self._channels: list[tuple[Netns, socket.socket]] = []
        self._poll = select.poll()
        try:
            for netns in namespaces:
                _require_events(netns)
                channel = _open(netns, groups=_GROUP_NEW)
                self._channels.append((netns, channel))
                self._poll.register(channel, select.POLLIN)
                channel.setblocking(False)
                _enlarge(channel)
        except BaseException:
            self.close()
            raise

    def read(self, timeout_s: float) -> list[bytes] | None:
        """Return the connections made since the last call."""
        records: list[bytes] = []
        self._poll.poll(timeout_s * 1000)
        for netns, channel in self._channels:
            # One datagram per event. Bounded, so that results are shown even under load.
            for _ in range(self._BATCH):
                found = self._receive(netns, channel)
                if found is None:
                    break
                records += found
        return records

    def lost(self) -> Mapping[str, int]:
        """Count how often the kernel discarded events because the socket's buffer was full."""
        return self._lost

    def symbol(self, address: int) -> str | None:  # noqa: ARG002 - the protocol's
        """Return None: conntrack reports no function addresses."""
        return None

    def close(self) -> None:
        """Close the sockets."""
        for _, channel in self._channels:
            channel.close()
        self._channels.clear()

    def _receive(self, netns: Netns, channel: socket.socket) -> list[bytes] | None:
        """Return the connections of one datagram, None if there is none."""
        try:
            data = channel.recv(netlink.RECEIVE)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise ConntrackError(f"conntrack events of {netns.node}: {error}") from error
            self._lost["conntrack_overrun"] += 1
            return []
        records = []
        for kind, payload in messages(data):
            if kind != _CT_NEW:
                continue
            connection = parse(payload, netns.inode, time.monotonic_ns())
            if connection is None:
                self._lost["undecodable"] += 1
            else:
                records.append(encode_connection(connection))
        return records


def parse(payload: bytes, netns: int, ktime_ns: int) -> Connection | None:
    """
    Read one conntrack netlink message, without its netlink header; None if it is incomplete.

    Source: include/uapi/linux/netfilter/nfnetlink_conntrack.h.
    """
    try:
        found = attributes(payload[_NFGENMSG_SIZE:])
        orig = attributes(found[_CTA_TUPLE_ORIG])
        zone = found.get(_CTA_ZONE) or orig.get(_CTA_TUPLE_ZONE) or b"\0\0"
        return Connection(
            ktime_ns=ktime_ns,
            netns=netns,
            hook=Hook.CONNTRACK,
            orig=_tuple(orig),
            reply=_tuple(attributes(found[_CTA_TUPLE_REPLY])),
            status=Status(int.from_bytes(found.get(_CTA_STATUS, b""), "big")),
            zone=int.from_bytes(zone, "big"),
            mark=None,
            ct_mark=int.from_bytes(found.get(_CTA_MARK, b""), "big"),
            iif=0,
            oif=0,
            is_related=False,
        )
    except (LookupError, ValueError, struct.error):
        return None


@dataclass(frozen=True, slots=True)
class _IcmpKeys:
    id: int
    type: int
    code: int


_ICMP_KEYS = {
    ICMP: _IcmpKeys(_CTA_PROTO_ICMP_ID, _CTA_PROTO_ICMP_TYPE, _CTA_PROTO_ICMP_CODE),
    ICMPV6: _IcmpKeys(_CTA_PROTO_ICMPV6_ID, _CTA_PROTO_ICMPV6_TYPE, _CTA_PROTO_ICMPV6_CODE),
}


def _tuple(found: Attributes) -> FiveTuple:
    addresses = attributes(found[_CTA_TUPLE_IP])
    ports = attributes(found[_CTA_TUPLE_PROTO])
    proto = ports[_CTA_PROTO_NUM][0]
    icmp = _ICMP_KEYS.get(proto)
    if icmp:
        sport = int.from_bytes(ports.get(icmp.id, b""), "big")
        dport = ports.get(icmp.type, b"\0")[0] << 8 | ports.get(icmp.code, b"\0")[0]
    else:
        # Protocols without ports have neither attribute.
        sport = int.from_bytes(ports.get(_CTA_PROTO_SRC_PORT, b""), "big")
        dport = int.from_bytes(ports.get(_CTA_PROTO_DST_PORT, b""), "big")
    src, dst = _addresses(addresses)
    return FiveTuple(src=src, dst=dst, sport=sport, dport=dport, proto=proto)


def _addresses(attributes: Attributes) -> tuple[IPAddress, IPAddress]:
    if _CTA_IP_V4_SRC in attributes:
        return IPv4Address(attributes[_CTA_IP_V4_SRC]), IPv4Address(attributes[_CTA_IP_V4_DST])
    return IPv6Address(attributes[_CTA_IP_V6_SRC]), IPv6Address(attributes[_CTA_IP_V6_DST])


def _open(netns: Netns, groups: int = 0) -> socket.socket:
    with inside(netns.path):
        try:
            channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        except OSError as error:
            raise ConntrackError(
                f"this kernel ({os.uname().release}) has no netfilter netlink: {error.strerror}"
            ) from error
    try:
        channel.bind((0, groups))
    except OSError as error:
        channel.close()
        raise _refused(error.errno or 0, netns) from error
    return channel


def setting(netns: Netns, name: str) -> int:
    """
    Return a namespace's sysctl ``net.netfilter.nf_conntrack_<name>``.

    Raises:
        OSError: If there is no such sysctl, or conntrack is not loaded.
        NetnsError: If the namespace is gone or cannot be entered.
    """
    with inside(netns.path):
        directory = Path("/proc/thread-self/root/proc/sys/net/netfilter")
        return int((directory / f"nf_conntrack_{name}").read_text())


def _require_events(netns: Netns) -> None:
    """Load conntrack netlink, and fail if events are switched off."""
    # A dump makes the kernel load the modules and waits for it; joining a group does not.
    next(dump(netns), None)
    with suppress(OSError):
        if not setting(netns, "events"):
            raise ConntrackError(
                f"conntrack of {netns.node} sends no events: "
                "set the sysctl net.netfilter.nf_conntrack_events to 1"
            )


def _enlarge(channel: socket.socket) -> None:
    """Enlarge the buffer for bursts, with CAP_NET_ADMIN beyond ``net.core.rmem_max``."""
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _EVENT_BUFFER)
    with suppress(PermissionError):
        channel.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _EVENT_BUFFER)


def _refused(number: int, netns: Netns) -> ConntrackError:
    hint = "; this needs root (CAP_NET_ADMIN)" if number == errno.EPERM else ""
    return ConntrackError(f"cannot read conntrack of {netns.node}: {os.strerror(number)}{hint}")
