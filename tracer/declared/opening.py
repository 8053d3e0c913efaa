"""The first bytes of a connection: perhaps a PROXY header, then perhaps an HTTP request."""

from dataclasses import dataclass

from tracer.declared.proxy_protocol import Header, proxy_header
from tracer.declared.request import request
from tracer.proxy_headers import DeclaredClient, Opening

# The most bytes to keep until they are understood. Servers accept request heads of 8 KiB by default
# (nginx: large_client_header_buffers).
LIMIT = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """
    What the bytes are, and the clients they declare, the peer's own statement last.

    That is a PROXY header, if there is one: the peer sent it before everything else.
    """

    opening: Opening
    clients: tuple[DeclaredClient, ...] = ()
    has_more: bool = False


def read_opening(data: bytes, *, is_all: bool) -> Found | None:
    """
    Parse a connection's first bytes.

    Args:
        data: The bytes from the first on, without gaps.
        is_all: Whether no more will come.

    Returns:
        What they are, or None if more bytes are needed to tell.
    """
    header = proxy_header(data)
    clients: tuple[DeclaredClient, ...] = ()
    if isinstance(header, Header):
        clients = (header.client,)
        if len(data) < header.length:
            return Found(opening=Opening.CUT, clients=clients) if is_all else None
        data = data[header.length :]
    elif header.is_malformed:
        return Found(opening=Opening.MALFORMED)
    elif header.needs_more and data:
        return Found(opening=Opening.CUT) if is_all else None
    return _request(data, clients, is_all=is_all)


def _request(data: bytes, clients: tuple[DeclaredClient, ...], *, is_all: bool) -> Found | None:
    head = request(data)
    if head is None:
        return Found(opening=Opening.OTHER, clients=clients)
    if not head.is_whole and not is_all:
        return None
    return Found(
        opening=Opening.HTTP if head.is_whole else Opening.CUT,
        clients=(*head.clients, *clients),
        has_more=head.has_more,
    )
