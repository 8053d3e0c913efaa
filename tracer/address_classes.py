"""The classes of addresses for the counting programs: a node's view as prefixes."""

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network

from tracer.judge.view import View
from tracer.kernel.counters import AddressClass
from tracer.model import AddressFlag, ClientClass, IPNetwork

_LOOPBACKS: tuple[IPv4Network | IPv6Network, ...] = (
    IPv4Network("127.0.0.0/8"),
    IPv6Network("::1/128"),
)


def address_classes(view: View) -> dict[IPNetwork, AddressClass]:
    """Return prefixes whose longest match gives an address the class that the view gives it."""
    if view.cluster is None:
        classes = dict.fromkeys(_LOOPBACKS, ClientClass.LOOPBACK)
    else:
        classes = dict(view.cluster.prefixes())
    for address in view.addresses:
        if not address.is_loopback:
            classes[ip_network(address)] = ClientClass.NODE
    cidrs = view.rules.cluster_cidrs if view.rules else ()
    for cidr in cidrs:
        classes.setdefault(cidr, _covering(cidr, classes))
    return {
        network: AddressClass(found, _flags(network, found, view, cidrs))
        for network, found in classes.items()
    }


def _covering(network: IPNetwork, classes: Mapping[IPNetwork, ClientClass]) -> ClientClass:
    """Return the class of the longest prefix that covers a network; external if none does."""
    for length in range(network.prefixlen - 1, -1, -1):
        found = classes.get(network.supernet(new_prefix=length))
        if found is not None:
            return found
    return ClientClass.EXTERNAL


def _flags(
    network: IPNetwork, found: ClientClass, view: View, cidrs: Iterable[IPNetwork]
) -> AddressFlag:
    flags = AddressFlag(0)
    is_own = found is ClientClass.NODE and view.is_here(network.network_address)
    if is_own or found is ClientClass.LOOPBACK:
        flags |= AddressFlag.HERE
    if any(_is_under(network, cidr) for cidr in cidrs):
        flags |= AddressFlag.CLUSTER
    return flags


def _is_under(network: IPNetwork, cidr: IPNetwork) -> bool:
    return (
        network.version == cidr.version
        and network.prefixlen >= cidr.prefixlen
        and network.network_address in cidr
    )
