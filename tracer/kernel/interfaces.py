"""The interfaces of a namespace: names by index, and all addresses."""

import socket
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import ip_address

from tracer.errors import NetnsError
from tracer.kernel import netlink
from tracer.kernel.netns import Netns, inside
from tracer.model import IPAddress
from tracer.ruleset.model import IPVS_DEVICE

# include/uapi/linux/rtnetlink.h, if_link.h, if_addr.h
_NETLINK_ROUTE = 0
_RTM_GETLINK, _RTM_GETADDR = 18, 22
_GROUPS = 0x1 | 0x10 | 0x100  # links, IPv4 addresses, IPv6 addresses
_IFINFOMSG, _IFADDRMSG = struct.Struct("=BBHiII"), struct.Struct("=BBBBI")
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_INFO_KIND = 3, 18, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Interfaces:
    """
    A snapshot: names by index, and every address of every interface.

    ``kinds`` holds the kernel's name for the kind of virtual interfaces: veth, bridge, vxlan.
    ``service_addresses`` are those that kube-proxy in IPVS mode bound to its dummy device.
    """

    names: Mapping[int, str] = field(default_factory=dict)
    kinds: Mapping[int, str] = field(default_factory=dict)
    addresses: frozenset[IPAddress] = frozenset()
    service_addresses: frozenset[IPAddress] = frozenset()


class InterfaceWatcher:
    """
    Keeps a snapshot of one namespace's interfaces up to date.

    Its sockets stay in the namespace, so it keeps working after root was dropped.

    Raises:
        NetnsError: If the namespace cannot be entered or queried.
    """

    def __init__(self, netns: Netns) -> None:
        self._netns = netns
        with ExitStack() as stack:
            try:
                with inside(netns.path):
                    self._events, self._channel = (stack.enter_context(_open()) for _ in range(2))
                self._events.bind((0, _GROUPS))
            except OSError as error:
                raise NetnsError(
                    f"cannot watch the interfaces of {netns.node}: {error.strerror}"
                ) from error
            self._events.setblocking(False)
            self._channel.settimeout(5)
            self._snapshot = self._read()
            stack.pop_all()
        self._is_stale = False

    def snapshot(self) -> Interfaces:
        """
        Return the current interfaces; reads them again only if the kernel reported a change.

        Raises:
            NetnsError: If the kernel does not answer. The next call tries again.
        """
        self._is_stale |= self._has_changed()
        if self._is_stale:
            self._snapshot = self._read()
            self._is_stale = False
        return self._snapshot

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when something changes."""
        return self._events.fileno()

    def close(self) -> None:
        """Close the sockets."""
        self._events.close()
        self._channel.close()

    def _has_changed(self) -> bool:
        has_changed = False
        try:
            while self._events.recv(netlink.RECEIVE):
                has_changed = True
        except BlockingIOError:
            return has_changed
        except OSError:
            # ENOBUFS: the kernel dropped notifications because the buffer was full.
            return True
        return has_changed

    def _read(self) -> Interfaces:
        try:
            names, kinds = self._links()
            addresses = self._addresses()
            here = {index for index, name in names.items() if name == IPVS_DEVICE}
            return Interfaces(
                names=names,
                kinds=kinds,
                addresses=frozenset(address for _, address in addresses),
                service_addresses=frozenset(
                    address for index, address in addresses if index in here
                ),
            )
        except OSError as error:
            raise NetnsError(
                f"cannot read the interfaces of {self._netns.node}: {error.strerror}"
            ) from error

    def _links(self) -> tuple[dict[int, str], dict[int, str]]:
        names, kinds = {}, {}
        request = _IFINFOMSG.pack(0, 0, 0, 0, 0, 0)
        for _, payload in netlink.dump(self._channel, _RTM_GETLINK, request):
            index = _IFINFOMSG.unpack_from(payload)[3]
            link = netlink.attributes(payload[_IFINFOMSG.size :])
            names[index] = _text(link.get(_IFLA_IFNAME, b""))
            kind = netlink.attributes(link.get(_IFLA_LINKINFO, b"")).get(_IFLA_INFO_KIND)
            if kind:
                kinds[index] = _text(kind)
        return names, kinds

    def _addresses(self) -> set[tuple[int, IPAddress]]:
        """Return all addresses, as pairs of interface index and address."""
        addresses = set()
        request = _IFADDRMSG.pack(0, 0, 0, 0, 0)
        for _, payload in netlink.dump(self._channel, _RTM_GETADDR, request):
            index = _IFADDRMSG.unpack_from(payload)[4]
            found = netlink.attributes(payload[_IFADDRMSG.size :])
            # On a point-to-point link, ADDRESS is the peer's and LOCAL is ours.
            raw = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
            if raw and len(raw) in (4, 16):
                addresses.add((index, ip_address(raw)))
        return addresses


def _open() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE)


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("utf-8", "replace")
