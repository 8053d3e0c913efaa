"""What proxies say of the client behind a connection's peer, and how far it can be believed."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from tracer.model import (
    ClientForm,
    Declared,
    DeclaredClient,
    IPAddress,
    IPNetwork,
    Opening,
    ProxyHeader,
)

_PROXY_PROTOCOL = {header for header in ProxyHeader if header.is_proxy_protocol}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyWord:
    """
    What a connection's first bytes say of clients behind its peer.

    ``peer`` is who sent them; it ``is_trusted`` if the user's list has it. ``client`` is the one
    that counts, and ``by`` the trusted proxy that named it: going from the peer back towards the
    client, the first that is no trusted proxy itself (nginx: ``real_ip_recursive``). Both are None
    where nobody trusted says anything, or two headers contradict each other (``is_ambiguous``).
    ``missing`` are headers that other connections to the same backend carry, and this one does not.
    ``declared`` is None where no first bytes came in time.
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
        """All clients that the headers name, the peer's own word last."""
        return self.declared.clients if self.declared else ()

    @property
    def headers(self) -> tuple[ProxyHeader, ...]:
        """The headers that were there."""
        return tuple(sorted({client.header for client in self.clients}))

    @property
    def is_proxied(self) -> bool:
        """Whether a trusted proxy says that it speaks for somebody else."""
        is_own = self.client is not None and self.client.form is ClientForm.LOCAL
        return self.is_trusted and bool(self.clients) and not is_own


def weigh(
    declared: Declared | None,
    peer: IPAddress,
    trusted: Sequence[IPNetwork],
    expected: Collection[ProxyHeader] = (),
) -> ProxyWord:
    """
    Say what can be believed.

    Args:
        declared: What the first bytes were, None if none came in time.
        peer: Who opened the connection.
        trusted: The proxies whose word counts.
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
    Return the chains that are told: one, or two where both HTTP headers are there.

    A proxy that writes one of them hands on what stands in the other, whoever wrote that.
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
    # All others are proxies: the first is as far back as anybody can say.
    return chain[0], by


def _name(client: DeclaredClient) -> tuple[ClientForm, IPAddress | None, str | None]:
    return client.form, client.address, client.token


def _missing(declared: Declared | None, expected: Collection[ProxyHeader]) -> Iterator[ProxyHeader]:
    if declared is None:
        return
    there = {client.header for client in declared.clients}
    # Readers of the PROXY protocol take both versions.
    has_proxy = any(header.is_proxy_protocol for header in there)
    for header in sorted(expected):
        if header.is_proxy_protocol:
            if not has_proxy and declared.opening in (Opening.HTTP, Opening.OTHER):
                yield header
        elif header not in there and declared.opening is Opening.HTTP:
            yield header


def _is_in(address: IPAddress, networks: Sequence[IPNetwork]) -> bool:
    return any(address in network for network in networks)
