"""Netlink messages, attributes and dumps, for conntrack, rules and interfaces."""

import errno
import os
import socket
import struct
from collections.abc import Iterator

# include/uapi/linux/netlink.h
NLMSG_ERROR, NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLA_TYPE_MASK = 0x3FFF
_HEADER = struct.Struct("=IHHII")
RECEIVE = 1 << 16

Attributes = dict[int, bytes]


def dump(channel: socket.socket, kind: int, payload: bytes) -> Iterator[tuple[int, bytes]]:
    """
    Request a dump and yield its messages as type and payload.

    Raises:
        OSError: If the kernel answers with an error.
    """
    _send(channel, kind, _NLM_F_DUMP, payload)
    while True:
        for found, answer in _checked(channel):
            if found == NLMSG_DONE:
                return
            yield found, answer


def ask(channel: socket.socket, kind: int, payload: bytes) -> tuple[int, bytes]:
    """
    Send a request, and return the one answer as type and payload.

    Raises:
        OSError: If the kernel answers with an error; EBADMSG if the answer is malformed.
    """
    _send(channel, kind, 0, payload)
    for found, answer in _checked(channel):
        return found, answer
    raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))


def _send(channel: socket.socket, kind: int, flags: int, payload: bytes) -> None:
    length = _HEADER.size + len(payload)
    channel.send(_HEADER.pack(length, kind, _NLM_F_REQUEST | flags, 1, 0) + payload)


def _checked(channel: socket.socket) -> Iterator[tuple[int, bytes]]:
    for found, answer in messages(channel.recv(RECEIVE)):
        if found == NLMSG_ERROR:
            number = -struct.unpack_from("=i", answer)[0]
            raise OSError(number, os.strerror(number))
        yield found, answer


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Split one received datagram into messages, as type and payload."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or at + length > len(data):
            return
        yield kind, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


def attributes(data: bytes) -> Attributes:
    """Split attributes, each aligned to 4 bytes; stop at a truncated one."""
    found: Attributes = {}
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4 or at + length > len(data):
            break
        found[kind & _NLA_TYPE_MASK] = data[at + 4 : at + length]
        at += (length + 3) & ~3
    return found
