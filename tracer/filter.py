"""Which connections are wanted."""

from dataclasses import dataclass

from tracer.model import Connection, FiveTuple, IPAddress, IPNetwork


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """
    Which connections are wanted; an empty filter matches all.

    ``client`` matches the original source, ``backend`` the address that answers, and ``port`` the
    port that the client addressed or the one that answers; ICMP has none.
    """

    client: IPNetwork | None = None
    backend: IPNetwork | None = None
    port: int | None = None
    proto: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether everything is wanted."""
        return self == Filter()

    def covering(self, other: "Filter") -> "Filter":
        """Return the narrowest filter that matches everything that either filter matches."""
        return Filter(
            client=_covering(self.client, other.client),
            backend=_covering(self.backend, other.backend),
            port=self.port if self.port == other.port else None,
            proto=self.proto if self.proto == other.proto else None,
        )

    def matches(self, connection: Connection) -> bool:
        """Whether a connection is wanted, as ``connections.c`` decides in the kernel."""
        return self.matches_tuples(connection.orig, connection.reply)

    def matches_tuples(self, orig: FiveTuple, reply: FiveTuple) -> bool:
        """Whether the connection with these tuples is wanted."""
        return (
            self.proto in (None, orig.proto)
            and (self.port is None or (not orig.is_icmp and self.port in (orig.dport, reply.sport)))
            and _is_in(orig.src, self.client)
            and _is_in(reply.src, self.backend)
        )

    def matches_packet(self, packet: FiveTuple) -> bool:
        """Whether a packet belongs to a wanted flow, in either direction, as in ``drops.c``."""
        return (
            self.proto in (None, packet.proto)
            and (
                self.port is None
                or (not packet.is_icmp and self.port in (packet.dport, packet.sport))
            )
            and (_is_in(packet.src, self.client) or _is_in(packet.dst, self.client))
            and (_is_in(packet.src, self.backend) or _is_in(packet.dst, self.backend))
        )


def _covering(one: IPNetwork | None, other: IPNetwork | None) -> IPNetwork | None:
    """Return the longest prefix that contains both; None for everything."""
    if one is None or other is None or one.version != other.version:
        return None
    length = min(one.prefixlen, other.prefixlen)
    differing = int(one.network_address) ^ int(other.network_address)
    length = min(length, one.max_prefixlen - differing.bit_length())
    return one.supernet(new_prefix=length)


def _is_in(address: IPAddress, network: IPNetwork | None) -> bool:
    return network is None or address in network
