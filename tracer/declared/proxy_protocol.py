"""
The PROXY protocol, versions 1 and 2: a header before a connection's own bytes.

The format is HAProxy's: doc/proxy-protocol.txt.
"""

import re
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from tracer.declared.identifier import address_of, unmapped
from tracer.model import IPAddress
from tracer.proxy_headers import ClientForm, DeclaredClient, ProxyHeader

V1_SIGNATURE = b"PROXY "
V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
# Section 2.1: "the worst-case line" has 107 characters with its CRLF.
_LONGEST_LINE = 107
_V2_HEAD = struct.Struct("!12sBBH")
_VERSION_2 = 2
_LOCAL, _PROXY = 0, 1
_UNSPEC, _INET, _INET6, _UNIX = 0, 1, 2, 3
_DECIMAL = re.compile(rb"0|[1-9][0-9]{0,4}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """
    The client that a header declares, and the header's length in bytes.

    Not all of a version 2 header may be there yet: only TLVs are missing then, which are skipped.
    """

    client: DeclaredClient
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NoHeader:
    """
    No header, or not yet.

    ``needs_more`` means that the bytes may still become a header, ``is_malformed`` that they began
    like one.
    """

    needs_more: bool = False
    is_malformed: bool = False


MORE = NoHeader(needs_more=True)
OTHER = NoHeader()
MALFORMED = NoHeader(is_malformed=True)


def proxy_header(data: bytes) -> Header | NoHeader:
    """Parse a header of either version at the beginning of a connection's bytes."""
    for signature, read in ((V1_SIGNATURE, _version_1), (V2_SIGNATURE, _version_2)):
        if data.startswith(signature):
            return read(data)
        if signature.startswith(data):
            return MORE
    return OTHER


def _version_1(data: bytes) -> Header | NoHeader:
    line, end, _ = data[:_LONGEST_LINE].partition(b"\r\n")
    if not end:
        return MALFORMED if len(data) >= _LONGEST_LINE else MORE
    # Exactly one space separates the words (section 2.1).
    words = line.split(b" ")
    length = len(line) + len(end)
    if words[1] == b"UNKNOWN":
        # The rest of the line must be ignored.
        return Header(client=_client(ProxyHeader.PROXY_V1, ClientForm.UNKNOWN), length=length)
    versions = {b"TCP4": 4, b"TCP6": 6}
    if len(words) != 6 or words[1] not in versions:
        return MALFORMED
    source, destination = map(address_of, words[2:4])
    if source is None or destination is None or not all(map(_is_port, words[4:6])):
        return MALFORMED
    # An IPv4-mapped address belongs to TCP6, and address_of has converted it.
    if versions[words[1]] == 4 and (b":" in words[2] or b":" in words[3]):
        return MALFORMED
    if versions[words[1]] == 6 and not (b":" in words[2] and b":" in words[3]):
        return MALFORMED
    return Header(
        client=_client(ProxyHeader.PROXY_V1, ClientForm.ADDRESS, source, int(words[4])),
        length=length,
    )


def _version_2(data: bytes) -> Header | NoHeader:
    if len(data) < _V2_HEAD.size:
        return MORE
    _, version_command, family_protocol, body = _V2_HEAD.unpack_from(data)
    version, command = version_command >> 4, version_command & 0xF
    if version != _VERSION_2 or command not in (_LOCAL, _PROXY):
        return MALFORMED
    length = _V2_HEAD.size + body
    if command == _LOCAL:
        # The rest must be skipped: the proxy speaks for itself, as for a health check.
        return Header(client=_client(ProxyHeader.PROXY_V2, ClientForm.LOCAL), length=length)
    family = family_protocol >> 4
    if family in (_UNSPEC, _UNIX):
        return Header(client=_client(ProxyHeader.PROXY_V2, ClientForm.UNKNOWN), length=length)
    if family not in (_INET, _INET6):
        return MALFORMED
    size = {_INET: 4, _INET6: 16}[family]
    if body < 2 * size + 4:
        return MALFORMED
    needed = _V2_HEAD.size + 2 * size + 4
    if len(data) < needed:
        return MORE
    source = data[_V2_HEAD.size : _V2_HEAD.size + size]
    (port,) = struct.unpack_from("!H", data, _V2_HEAD.size + 2 * size)
    address = IPv4Address(source) if family == _INET else unmapped(IPv6Address(source))
    return Header(
        client=_client(ProxyHeader.PROXY_V2, ClientForm.ADDRESS, address, port), length=length
    )


def _is_port(text: bytes) -> bool:
    return _DECIMAL.fullmatch(text) is not None and int(text) <= 65535


def _client(
    header: ProxyHeader, form: ClientForm, address: IPAddress | None = None, port: int = 0
) -> DeclaredClient:
    return DeclaredClient(header=header, form=form, address=address, port=port or None)
