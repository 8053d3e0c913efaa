"""The lab's network: kernel settings, and lines for ``ip -batch``."""

from collections.abc import Callable, Iterator

from lab import hosts
from lab.hosts import FAMILIES, NODES, PODS, Addresses, Family, Node

# The prefix lengths of the two networks that hosts share.
_LENGTH: dict[Family, int] = {"ipv4": 24, "ipv6": 64}
_EVERYWHERE: dict[Family, str] = {"ipv4": "0.0.0.0/0", "ipv6": "::/0"}


def sysctls(host: str) -> dict[str, str]:
    """
    Return the settings of a host, by their path under ``/proc/sys/net``.

    They must be set before links exist: IPv6 copies ``default`` when a device is created.
    """
    settings = {}
    for scope in ("all", "default"):
        settings[f"ipv4/conf/{scope}/rp_filter"] = "0"
        settings[f"ipv6/conf/{scope}/disable_ipv6"] = "0"
        # An address under duplicate address detection is unusable for a second. Detection is off
        # for a device only if it is off in both scopes.
        settings[f"ipv6/conf/{scope}/accept_dad"] = "0"
    # Nothing answers router solicitations here: they would only clutter traces.
    settings["ipv6/conf/default/router_solicitations"] = "0"
    if host == "router" or host in NODES:
        settings["ipv4/ip_forward"] = "1"
        settings["ipv6/conf/all/forwarding"] = "1"
    if host in NODES:
        # A rate limit per peer would turn "refused" into a timeout when a lab is used often.
        settings["ipv4/icmp_ratelimit"] = "0"
        settings["ipv6/icmp/ratelimit"] = "0"
    return settings


def links(netns: Callable[[str], str]) -> Iterator[str]:
    """
    Yield the lines that connect all hosts; run them in any namespace.

    Both ends are created where they belong, so no name is taken in the caller's namespace.

    Args:
        netns: Returns the name of a host's network namespace.
    """
    ends = [("router", "client", "client", "eth0")]
    ends += [("router", node, node, "eth0") for node in NODES]
    ends += [(pod.node.name, f"veth-{pod.name}", pod.name, "eth0") for pod in PODS.values()]
    for host, device, peer, peer_device in ends:
        yield (
            f"link add {device} netns {netns(host)} "
            f"type veth peer name {peer_device} netns {netns(peer)}"
        )


def devices(host: str) -> tuple[str, ...]:
    """Return the devices of a host that carry packets once the other end is up."""
    if host == "router":
        return ("client", "lan", *NODES)
    if host in NODES:
        return ("eth0", *(f"veth-{pod.name}" for pod in PODS.values() if pod.node.name == host))
    return ("eth0",)


def setup(host: str) -> Iterator[str]:
    """Yield the lines that give a host its addresses and routes; run them inside it."""
    yield "link set lo up"
    if host == "client":
        yield from _client()
    elif host == "router":
        yield from _router()
    elif host in NODES:
        yield from _node(NODES[host])
    else:
        yield from _pod(PODS[host])


def routes_via(node: str) -> Iterator[str]:
    """Yield the router's lines that send addresses that no host has to one node."""
    for family in FAMILIES:
        hop = NODES[node].address.of(family)
        for networks in (hosts.SERVICES, hosts.LOAD_BALANCER):
            yield f"route replace {networks.of(family)} via {hop}"


def _client() -> Iterator[str]:
    # The kernel picks the first address as source.
    yield from _up("eth0", hosts.CLIENT, _LENGTH)
    yield f"address add {hosts.CLIENT2}/{_LENGTH['ipv4']} dev eth0"
    yield from _default_route(hosts.ROUTER_TO_CLIENT)


def _router() -> Iterator[str]:
    yield "link add lan type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
    for node in NODES:
        yield f"link set {node} master lan up"
    yield from _up("lan", hosts.ROUTER_TO_NODES, _LENGTH)
    yield from _up("client", hosts.ROUTER_TO_CLIENT, _LENGTH)


def _node(node: Node) -> Iterator[str]:
    yield from _up("eth0", node.address, _LENGTH)
    yield from _default_route(hosts.ROUTER_TO_NODES)
    for other in NODES.values():
        if other is not node:
            for family in FAMILIES:
                yield f"route add {other.pods.of(family)} via {other.address.of(family)}"
    for pod in PODS.values():
        if pod.node is node:
            device = f"veth-{pod.name}"
            yield from _up(device, node.gateway, {"ipv4": 32, "ipv6": 128})
            for family in FAMILIES:
                yield f"route add {pod.address.of(family)} dev {device}"


def _pod(pod: hosts.Pod) -> Iterator[str]:
    yield from _up("eth0", pod.address, {"ipv4": 32, "ipv6": 128})
    for family in FAMILIES:
        yield f"route add {pod.node.gateway.of(family)} dev eth0"
    yield from _default_route(pod.node.gateway)


def _up(device: str, addresses: Addresses, length: dict[Family, int]) -> Iterator[str]:
    yield f"link set {device} up"
    for family in FAMILIES:
        nodad = " nodad" if family == "ipv6" else ""
        yield f"address add {addresses.of(family)}/{length[family]} dev {device}{nodad}"


def _default_route(gateway: Addresses) -> Iterator[str]:
    for family in FAMILIES:
        yield f"route add {_EVERYWHERE[family]} via {gateway.of(family)}"
