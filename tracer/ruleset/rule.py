"""A rule that replaces the source or drops packets, and its owner."""

from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

from tracer.model import IPAddress
from tracer.ruleset.matches import Match

RuleFamily = Literal["ipv4", "ipv6", "both"]
Tool = Literal["iptables", "iptables-legacy", "nftables"]
HookName = Literal["prerouting", "input", "forward", "output", "postrouting"]
HOOKS: tuple[HookName, ...] = ("prerouting", "input", "forward", "output", "postrouting")


class Owner(StrEnum):
    """The program that made a rule, if its names prove it (docs/rule-owners.md)."""

    KUBE_PROXY = "kube-proxy"
    FLANNEL = "flannel"
    CALICO = "calico"
    CILIUM = "cilium"
    KINDNET = "kindnet"
    IP_MASQ_AGENT = "ip-masq-agent"
    PORTMAP = "portmap"
    CNI_BRIDGE = "cni-ipmasq"
    DOCKER = "docker"
    KLIPPER_LB = "klipper-lb"
    NETAVARK = "netavark"
    AWS_VPC_CNI = "aws-vpc-cni"
    ANTREA = "antrea"
    OVN_KUBERNETES = "ovn-kubernetes"
    KUBE_ROUTER = "kube-router"
    WEAVE = "weave"
    LIBVIRT = "libvirt"
    UFW = "ufw"
    FIREWALLD = "firewalld"
    TAILSCALE = "tailscale"
    UNKNOWN = "unknown"


class Action(StrEnum):
    """What a rule does to a packet. UNKNOWN is a statement or target that is not understood."""

    MASQUERADE = "masquerade"
    SNAT = "snat"
    DROP = "drop"
    REJECT = "reject"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Addresses from ``first`` to ``last``, both included."""

    first: IPAddress
    last: IPAddress

    def __contains__(self, address: IPAddress) -> bool:
        first, last = self.first, self.last
        if isinstance(address, IPv4Address):
            return isinstance(first, IPv4Address) and int(first) <= int(address) <= int(last)
        return isinstance(first, IPv6Address) and int(first) <= int(address) <= int(last)

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """
    A rule that translates the source or drops packets.

    Args:
        family: The family of the packets that it sees.
        table: Its table, as the tool names it (for nftables without the family).
        chain: Its chain.
        base_chain: The base chain that leads to it; None if none does.
        hook: The hook of the base chain.
        priority: The priority of the base chain.
        action: What it does.
        to_addresses: For SNAT, the addresses that may become the source; empty if not known.
        comment: Its own comment; for an element of a verdict map, the element's.
        text: The rule in one line, as its tool prints it.
        owner: The program that made it.
        tool: The tool that printed it.
        matches: Its conditions.
        is_understood: Whether all its conditions and its action are understood.
    """

    family: RuleFamily
    table: str
    chain: str
    base_chain: str | None = None
    hook: HookName | None = None
    priority: int | None = None
    action: Action
    to_addresses: tuple[Range, ...] = ()
    comment: str | None = None
    text: str
    owner: Owner = Owner.UNKNOWN
    tool: Tool
    matches: tuple[Match, ...] = ()
    is_understood: bool = True

    @property
    def is_snat(self) -> bool:
        """Whether it replaces the source."""
        return self.action in (Action.MASQUERADE, Action.SNAT)

    @property
    def is_drop(self) -> bool:
        """Whether it drops packets."""
        return self.action in (Action.DROP, Action.REJECT)

    def __str__(self) -> str:
        return f"{self.tool} {self.table} {self.chain}: {self.text}"
