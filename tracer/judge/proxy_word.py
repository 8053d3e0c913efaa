"""What proxies declare about the client behind a connection's peer, and whether it is trusted."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from tracer.model import IPAddress, IPNetwork
from tracer.proxy_headers import ClientForm, Declared, DeclaredClient, Opening, ProxyHeader

_PROXY_PROTOCOL = {header for header in ProxyHeader if header.is_proxy_protocol}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyWord:
    """
    What a connection's first bytes declare about clients behind its peer.

    ``peer`` sent them; it ``is_trusted`` if the user's list has it. ``client`` is the one that
    counts: going from the peer back towards the client, the first address that is not itself a
    trusted proxy (nginx: ``real_ip_recursive``). ``by`` is the trusted proxy that named it. Both
    are None if no trusted proxy names a client, or if two headers contradict each other
    (``is_ambiguous``). ``missing`` are headers that other connections to the same backend carry,
    and this one does not. ``declared`` is None if no first bytes came in time.
    """

    declared: Declared | None
    peer: IPAddress
    is_trusted: bool = False
    client: DeclaredClient | None = None
    by: IPAddress | None = None
    is_ambiguous: bool = False
    missing: tuple[ProxyHeader, ...] = ()

    @property
    def clients(self) -> tuple[DeclaredClient, ...]:
        """All clients that the headers name, the peer's own statement last."""
        return self.declared.clients if self.declared else ()

    @property
    def headers(self) -> tuple[ProxyHeader, ...]:
        """The headers that were present."""
        return tuple(sorted({client.header for client in self.clients}))

    @property
    def is_proxied(self) -> bool:
        """Whether a trusted proxy declares that it speaks for another client."""
        is_own = self.client is not None and self.client.form is ClientForm.LOCAL
        return self.is_trusted and bool(self.clients) and not is_own


def weigh(
    declared: Declared | None,
    peer: IPAddress,
    trusted: Sequence[IPNetwork],
    expected: Collection[ProxyHeader] = (),
) -> ProxyWord:
    """
    Decide which declared client counts.

    Args:
        declared: What the first bytes declare, None if none came in time.
        peer: The address that opened the connection.
        trusted: The proxies to trust.
        expected: Headers of trusted proxies that other connections to the same backend carry.
    """
    clients = declared.clients if declared else ()
    missing = tuple(_missing(declared, expected))
    if not _is_in(peer, trusted):
        return ProxyWord(declared=declared, peer=peer, missing=missing)
    found = [_client(way, peer, trusted) for way in _ways(clients)]
    is_ambiguous = len({_name(client) for client, _ in found}) > 1
    client, by = (None, None) if is_ambiguous or not found else found[0]
    return ProxyWord(
        declared=declared,
        peer=peer,
        is_trusted=True,
        client=client,
        by=by,
        is_ambiguous=is_ambiguous,
        missing=missing,
    )


def _ways(clients: Sequence[DeclaredClient]) -> list[list[DeclaredClient]]:
    """
    Return the declared chains: one, or two if both HTTP headers are present.

    A proxy that writes one of them passes the other on as it came.
    """
    outermost = [client for client in clients if client.header.is_proxy_protocol]
    headers = sorted({client.header for client in clients} - _PROXY_PROTOCOL)
    if not headers:
        return [outermost] if outermost else []
    return [
        [client for client in clients if client.header is header] + outermost for header in headers
    ]


def _client(
    chain: Sequence[DeclaredClient], peer: IPAddress, trusted: Sequence[IPNetwork]
) -> tuple[DeclaredClient, IPAddress]:
    by = peer
    for client in reversed(chain[1:]):
        if client.address is None or not _is_in(client.address, trusted):
            return client, by
        by = client.address
    # All are proxies: the first is as far back as the headers go.
    return chain[0], by


def _name(client: DeclaredClient) -> tuple[ClientForm, IPAddress | None, str | None]:
    return client.form, client.address, client.token


def _missing(declared: Declared | None, expected: Collection[ProxyHeader]) -> Iterator[ProxyHeader]:
    if declared is None:
        return
    there = {client.header for client in declared.clients}
    # Servers that expect the PROXY protocol accept both versions.
    has_proxy = any(header.is_proxy_protocol for header in there)
    for header in sorted(expected):
        if header.is_proxy_protocol:
            if not has_proxy and declared.opening in (Opening.HTTP, Opening.OTHER):
                yield header
        elif header not in there and declared.opening is Opening.HTTP:
            yield header


def _is_in(address: IPAddress, networks: Sequence[IPNetwork]) -> bool:
    return any(address in network for network in networks)
