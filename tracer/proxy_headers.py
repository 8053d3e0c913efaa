"""What proxies declare of their clients in a connection's first bytes."""

import re
from dataclasses import dataclass
from enum import IntEnum

from tracer.model import FiveTuple, IPAddress


class ProxyHeader(IntEnum):
    """The header in which a proxy names its client. Values are ``enum srcip_proxy_header``."""

    PROXY_V1 = 1
    PROXY_V2 = 2
    X_FORWARDED_FOR = 3
    FORWARDED = 4

    @property
    def is_proxy_protocol(self) -> bool:
        """Whether it is the PROXY protocol, which precedes the connection's own bytes."""
        return self in (ProxyHeader.PROXY_V1, ProxyHeader.PROXY_V2)

    @property
    def label(self) -> str:
        """The name as its specification spells it."""
        return _HEADER_LABELS[self]


_HEADER_LABELS = {
    ProxyHeader.PROXY_V1: "PROXY v1",
    ProxyHeader.PROXY_V2: "PROXY v2",
    ProxyHeader.X_FORWARDED_FOR: "X-Forwarded-For",
    ProxyHeader.FORWARDED: "Forwarded",
}


# A name that hides a client's address: obfnode of RFC 7239, section 6.3, of limited length.
CLIENT_TOKEN = re.compile(r"_[A-Za-z0-9._-]{1,31}", re.ASCII)


class ClientForm(IntEnum):
    """How a header names a client. Values are ``enum srcip_client_form``."""

    ADDRESS = 1
    TOKEN = 2  # a name that hides the address
    UNKNOWN = 3  # the proxy does not know the client, or hides it
    LOCAL = 4  # PROXY's LOCAL: the proxy's own connection, such as a health check
    INVALID = 5  # not valid in this header; its text is not kept


class Opening(IntEnum):
    """What a connection's first bytes were. Values are ``enum srcip_opening``."""

    HTTP = 1  # the head of an HTTP/1 request, read to its end
    OTHER = 2  # another protocol, such as TLS or HTTP/2; after a PROXY header, if there was one
    CUT = 3  # incomplete: they ended early, or were too long
    MALFORMED = 4  # they began like a PROXY header, but are not one


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredClient:
    """The client that one header names: ``address`` is set for ADDRESS, ``token`` for TOKEN."""

    header: ProxyHeader
    form: ClientForm
    address: IPAddress | None = None
    port: int | None = None
    token: str | None = None

    def __str__(self) -> str:
        return str(self.address or self.token or self.form.name.lower())


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """
    Some of the first bytes of a TCP connection, at an offset from its first byte.

    ``is_end`` says that the sender closes its side after it, ``is_cut`` that nothing more of the
    connection will be reported.
    """

    ktime_ns: int
    netns: int
    flow: FiveTuple
    offset: int
    payload: bytes
    is_end: bool
    is_cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """
    What a TCP connection's first bytes declare about clients behind its peer.

    ``flow`` is the peer's tuple, equal to the connection's ``orig``. ``clients`` are in the order
    in which they were added, so the last was added by the peer; ``has_more`` says that earlier ones
    were left out.
    """

    ktime_ns: int
    netns: int
    flow: FiveTuple
    opening: Opening
    clients: tuple[DeclaredClient, ...] = ()
    has_more: bool = False
