"""The cheap requests to nf_tables over netlink: its generation, and its tables."""

import errno
import os
import socket
import struct
from functools import cache
from pathlib import Path
from typing import Self

from tracer.kernel import netlink

# include/uapi/linux/netfilter/nfnetlink.h, netfilter/nf_tables.h
_NETLINK_NETFILTER = 12
_SUBSYSTEM = 10 << 8
_GETTABLE, _GETGEN = _SUBSYSTEM | 1, _SUBSYSTEM | 16
_NEWTABLE, _NEWGEN = _SUBSYSTEM | 0, _SUBSYSTEM | 15
_NFTA_TABLE_NAME, _NFTA_GEN_ID = 1, 1
_GENMSG = struct.Struct("=BBH")
_REQUEST = _GENMSG.pack(socket.AF_UNSPEC, 0, 0)
_TIMEOUT_S = 2.0

# The enum in include/uapi/linux/netfilter.h, with nft's names.
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}

_MODULE = Path("/sys/module/nf_tables")
_SYMBOLS = Path("/proc/kallsyms")


def has_nf_tables() -> bool:
    """
    Whether nf_tables is loaded or built in.

    Any netlink message to nf_tables would load the module (nfnetlink.c, request_module), which an
    observer must not do. If built in, it may be missing under /sys, but its symbols are there.
    """
    return _MODULE.exists() or _is_built_in()


@cache
def _is_built_in() -> bool:
    try:
        with _SYMBOLS.open("rb") as stream:
            return any(b" nft_do_chain\n" in line for line in stream)
    except OSError:
        return False


class Nftables:
    """A netlink socket to nf_tables in the network namespace where it was opened."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
        )
        self._socket.settimeout(_TIMEOUT_S)

    def generation(self) -> int:
        """
        Return the generation of the rules: each transaction increases it.

        Raises:
            OSError: If the kernel refuses: no CAP_NET_ADMIN.
        """
        kind, payload = netlink.ask(self._socket, _GETGEN, _REQUEST)
        if kind != _NEWGEN:
            raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
        return int.from_bytes(_attributes(payload).get(_NFTA_GEN_ID, b""), "big")

    def tables(self) -> frozenset[tuple[str, str]]:
        """
        Return all tables, each with its family's name.

        Raises:
            OSError: If the kernel refuses: no CAP_NET_ADMIN.
        """
        found = set()
        for kind, payload in netlink.dump(self._socket, _GETTABLE, _REQUEST):
            if kind == _NEWTABLE:
                name = _attributes(payload).get(_NFTA_TABLE_NAME, b"").rstrip(b"\0")
                family = _FAMILIES.get(payload[0], str(payload[0]))
                found.add((family, name.decode("utf-8", "replace")))
        return frozenset(found)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _attributes(payload: bytes) -> netlink.Attributes:
    return netlink.attributes(payload[_GENMSG.size :])
