"""The interfaces of a namespace: their names by index, and all their addresses."""

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

    ``kinds`` are what the kernel says of interfaces that are no hardware: veth, bridge, vxlan.
    ``service_addresses`` are those that kube-proxy in IPVS mode has bound.
    """

    names: Mapping[int, str] = field(default_factory=dict)
    kinds: Mapping[int, str] = field(default_factory=dict)
    addresses: frozenset[IPAddress] = frozenset()
    service_addresses: frozenset[IPAddress] = frozenset()


class InterfaceWatcher:
    """
    Keeps a snapshot of one namespace's interfaces up to date.

    Its sockets stay in the namespace, so it works on after root was given up.

    Raises:
        NetnsError: If the namespace cannot be entered or asked.
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
        Return the interfaces as they are now; read anew only if the kernel told of a change.

        Raises:
            NetnsError: If the kernel does not answer. The next call asks again.
        """
        self._is_stale |= self._has_changed()
        if self._is_stale:
            self._snapshot = self._read()
            self._is_stale = False
        return self._snapshot

    def fileno(self) -> int:
        """Return a descriptor that is readable once something has changed."""
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
            # ENOBUFS: so much has changed that the kernel lost count.
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
            told = netlink.attributes(payload[_IFINFOMSG.size :])
            names[index] = _text(told.get(_IFLA_IFNAME, b""))
            kind = netlink.attributes(told.get(_IFLA_LINKINFO, b"")).get(_IFLA_INFO_KIND)
            if kind:
                kinds[index] = _text(kind)
        return names, kinds

    def _addresses(self) -> set[tuple[int, IPAddress]]:
        """Return all addresses, each with its interface's index."""
        addresses = set()
        request = _IFADDRMSG.pack(0, 0, 0, 0, 0)
        for _, payload in netlink.dump(self._channel, _RTM_GETADDR, request):
            index = _IFADDRMSG.unpack_from(payload)[4]
            told = netlink.attributes(payload[_IFADDRMSG.size :])
            # Of a point-to-point link ADDRESS is the far end's; LOCAL is ours.
            raw = told.get(_IFA_LOCAL) or told.get(_IFA_ADDRESS)
            if raw and len(raw) in (4, 16):
                addresses.add((index, ip_address(raw)))
        return addresses


def _open() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE)


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("utf-8", "replace")
