"""One address as a header names it: of the client, or of a proxy on the way."""

import re
from ipaddress import IPv6Address, ip_address

from tracer.model import IPAddress
from tracer.proxy_headers import CLIENT_TOKEN, ClientForm, DeclaredClient, ProxyHeader

# Longer than any address with brackets and port.
_LONGEST = 64
_HIGHEST_PORT = 65535
# node-port of RFC 7239, section 6: a number, or an obfuscated identifier.
_PORT = re.compile(rb"[0-9]{1,5}|_[A-Za-z0-9._-]+")
_ADDRESS = re.compile(rb"[0-9A-Fa-f:.]+")


def address_of(text: bytes) -> IPAddress | None:
    """Parse an address; None if it is not one. IPv4-mapped IPv6 becomes IPv4."""
    if len(text) > _LONGEST or not _ADDRESS.fullmatch(text):
        return None
    try:
        address = ip_address(text.decode("ascii"))
    except ValueError:
        return None
    return unmapped(address)


def unmapped(address: IPAddress) -> IPAddress:
    """Return ``::ffff:a.b.c.d`` as IPv4, and other addresses unchanged."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def identifier(text: bytes, header: ProxyHeader) -> DeclaredClient:
    """
    Parse an address with or without a port, ``unknown``, or an obfuscated identifier.

    Anything else is kept as invalid, without its text.
    """
    invalid = DeclaredClient(header=header, form=ClientForm.INVALID)
    text = text.strip(b" \t")
    if len(text) > _LONGEST:
        return invalid
    address = address_of(text)
    if address is not None:
        return DeclaredClient(header=header, form=ClientForm.ADDRESS, address=address)
    node, port = _split(text)
    if not _PORT.fullmatch(port) or (number := _number(port)) > _HIGHEST_PORT:
        return invalid
    address = address_of(node)
    if address is not None:
        form = ClientForm.ADDRESS
        return DeclaredClient(header=header, form=form, address=address, port=number or None)
    if node.lower() == b"unknown":
        return DeclaredClient(header=header, form=ClientForm.UNKNOWN)
    token = node.decode("ascii", "replace")
    if CLIENT_TOKEN.fullmatch(token):
        return DeclaredClient(header=header, form=ClientForm.TOKEN, token=token)
    return invalid


def _split(text: bytes) -> tuple[bytes, bytes]:
    """Split off the port: ``192.0.2.1:80``, ``[2001:db8::1]:80``. Without one it is 0."""
    if text.startswith(b"["):
        node, bracket, rest = text[1:].partition(b"]")
        # Brackets come in pairs, and only around IPv6.
        node = node if bracket and b":" in node else b""
    else:
        node, colon, port = text.partition(b":")
        rest = colon + port
    return node, rest[1:] if rest.startswith(b":") else rest or b"0"


def _number(port: bytes) -> int:
    return int(port) if port.isdigit() else 0
