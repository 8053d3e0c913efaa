"""The few questions to nf_tables over netlink that cost nothing: which generation, which tables."""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

# include/uapi/linux/netlink.h, netfilter/nfnetlink.h, netfilter/nf_tables.h
_NETLINK_NETFILTER = 12
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_SUBSYSTEM = 10 << 8
_GETTABLE, _GETGEN = _SUBSYSTEM | 1, _SUBSYSTEM | 16
_NEWTABLE, _NEWGEN = _SUBSYSTEM | 0, _SUBSYSTEM | 15
_NFTA_TABLE_NAME, _NFTA_GEN_ID = 1, 1
_NLA_TYPE_MASK = 0x3FFF
_HEADER = struct.Struct("=IHHII")
_GENMSG = struct.Struct("=BBH")
_RECEIVE = 1 << 16
_TIMEOUT_S = 2.0

# enum in include/uapi/linux/netfilter.h, by the names that nft has for them.
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}

_MODULE = Path("/sys/module/nf_tables")
_SYMBOLS = Path("/proc/kallsyms")


def has_nf_tables() -> bool:
    """
    Whether the kernel runs nf_tables.

    Any netlink message to it would load the module (nfnetlink.c, request_module), and an observer
    loads none. Built into the kernel it need not show under /sys, but among the symbols.
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
    """A netlink socket to the nf_tables of the namespace in which it was opened."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
        )
        self._socket.settimeout(_TIMEOUT_S)

    def generation(self) -> int:
        """
        Return the number of changes that the rules have seen: it grows with each transaction.

        Raises:
            OSError: If the kernel refuses: no CAP_NET_ADMIN.
        """
        self._send(_GETGEN, 0)
        for kind, payload in self._answer():
            if kind == _NEWGEN:
                number = _attribute(payload, _NFTA_GEN_ID)
                return int.from_bytes(number or b"", "big")
        raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))

    def tables(self) -> frozenset[tuple[str, str]]:
        """
        Return all tables, each with its family's name.

        Raises:
            OSError: If the kernel refuses: no CAP_NET_ADMIN.
        """
        self._send(_GETTABLE, _NLM_F_DUMP)
        found = set()
        for kind, payload in self._answer():
            if kind == _NEWTABLE:
                name = (_attribute(payload, _NFTA_TABLE_NAME) or b"").rstrip(b"\0")
                family = _FAMILIES.get(payload[0], str(payload[0]))
                found.add((family, name.decode("utf-8", "replace")))
        return frozenset(found)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _send(self, kind: int, flags: int) -> None:
        body = _GENMSG.pack(socket.AF_UNSPEC, 0, 0)
        header = _HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | flags, 1, 0)
        self._socket.send(header + body)

    def _answer(self) -> Iterator[tuple[int, bytes]]:
        """Yield the messages of one answer; one that is no dump has only one."""
        while True:
            for kind, payload in _messages(self._socket.recv(_RECEIVE)):
                if kind == _NLMSG_ERROR:
                    code = -struct.unpack_from("=i", payload)[0]
                    raise OSError(code, os.strerror(code))
                if kind == _NLMSG_DONE:
                    return
                yield kind, payload
                if kind == _NEWGEN:
                    return


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        size, kind, *_ = _HEADER.unpack_from(data)
        if size < _HEADER.size:
            return
        yield kind, data[_HEADER.size : size]
        data = data[-(-size // 4) * 4 :]


def _attribute(payload: bytes, wanted: int) -> bytes | None:
    data = payload[_GENMSG.size :]
    while len(data) >= 4:
        size, kind = struct.unpack_from("=HH", data)
        if size < 4:
            return None
        if kind & _NLA_TYPE_MASK == wanted:
            return data[4:size]
        data = data[-(-size // 4) * 4 :]
    return None
