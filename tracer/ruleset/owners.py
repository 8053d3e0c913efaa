"""
The owners of rules, by the names that each program gives its chains, tables and comments.

A name is listed only if no other program uses it; ``docs/rule-owners.md`` has the sources. Rules
that fit no name have the owner ``unknown``.
"""

import re

from tracer.ruleset.rule import Owner

_Names = tuple[tuple[re.Pattern[str], Owner], ...]


def _compiled(*names: tuple[str, Owner]) -> _Names:
    return tuple((re.compile(text), owner) for text, owner in names)


_CHAINS = _compiled(
    # kube-router comes first: all other names with KUBE are kube-proxy's.
    (
        r"KUBE-(ROUTER|NWPLCY|POD-FW|DEFAULT-NETPOL)\b.*|KUBE-IPVS-FIREWALL-ROUTER",
        Owner.KUBE_ROUTER,
    ),
    (r"KUBE-KUBELET-CANARY|KUBE-IPTABLES-HINT", Owner.UNKNOWN),
    (r"KUBE-.*", Owner.KUBE_PROXY),
    (r"FLANNEL-(POSTRTG|FWD)", Owner.FLANNEL),
    (r"cali-.*", Owner.CALICO),
    (r"(OLD_)?CILIUM_.*", Owner.CILIUM),
    (r"KIND-MASQ-AGENT", Owner.KINDNET),
    (r"IP-MASQ-AGENT", Owner.IP_MASQ_AGENT),
    (r"CNI-(HOSTPORT-(DNAT|SETMARK|MASQ|SNAT)|DN-[0-9a-f]{21}|SN-[0-9a-f]{21})", Owner.PORTMAP),
    (r"CNI-[0-9a-f]{24}", Owner.CNI_BRIDGE),
    (r"DOCKER([-_].*)?", Owner.DOCKER),
    (r"NETAVARK[-_].*", Owner.NETAVARK),
    (r"AWS-(SNAT|CONNMARK)-CHAIN-\d+", Owner.AWS_VPC_CNI),
    (r"ANTREA-.*", Owner.ANTREA),
    (r"OVN-KUBE-.*", Owner.OVN_KUBERNETES),
    (r"WEAVE(-.*)?", Owner.WEAVE),
    (r"LIBVIRT_.*", Owner.LIBVIRT),
    (r"ufw6?-.*", Owner.UFW),
    (r"ts-(input|forward|postrouting)", Owner.TAILSCALE),
)
_TABLES = _compiled(
    (r"kube-proxy", Owner.KUBE_PROXY),
    (r"flannel-ipv[46]", Owner.FLANNEL),
    (r"calico", Owner.CALICO),
    (r"kindnet-.*", Owner.KINDNET),
    (r"cni_hostport", Owner.PORTMAP),
    (r"cni_plugins_masquerade", Owner.CNI_BRIDGE),
    (r"docker-bridges", Owner.DOCKER),
    (r"netavark", Owner.NETAVARK),
    (r"ovn-kubernetes", Owner.OVN_KUBERNETES),
    (r"libvirt_network", Owner.LIBVIRT),
    (r"firewalld", Owner.FIREWALLD),
)
# Comments of rules that their programs put into built-in chains.
_COMMENTS = _compiled(
    (r"kubernetes (postrouting rules|service traffic requiring SNAT)", Owner.KUBE_PROXY),
    (r"flanneld (masq|forward)", Owner.FLANNEL),
    (r"cali:[A-Za-z0-9_-]{16}", Owner.CALICO),
    (r"cilium.*", Owner.CILIUM),
    (r"kind-masq-agent:.*", Owner.KINDNET),
    (r"ip-masq-agent:.*", Owner.IP_MASQ_AGENT),
    (r"CNI portfwd (masquerade mark|requiring masquerade)", Owner.PORTMAP),
    (r'name: ".*" id: ".*"', Owner.CNI_BRIDGE),
    (r"AWS,? (SNAT CHAIN|SNAT|CONNMARK).*", Owner.AWS_VPC_CNI),
    (r"Antrea: .*", Owner.ANTREA),
)


def of_chain(name: str) -> Owner:
    """Return the owner of iptables chains with this name."""
    return _find(_CHAINS, name)


def of_table(name: str) -> Owner:
    """Return the owner of nftables tables with this name."""
    return _find(_TABLES, name)


def of_comment(comment: str | None) -> Owner:
    """Return the owner of rules with this comment."""
    return _find(_COMMENTS, comment or "")


def of_bridge(interface: str) -> Owner:
    """Return the owner of a bridge: Docker's default bridge and those of its networks."""
    is_docker = re.fullmatch(r"docker0|docker_gwbridge|br-[0-9a-f]{12}", interface)
    return Owner.DOCKER if is_docker else Owner.UNKNOWN


def first(*owners: Owner) -> Owner:
    """Return the first known owner."""
    return next((owner for owner in owners if owner is not Owner.UNKNOWN), Owner.UNKNOWN)


def _find(names: _Names, name: str) -> Owner:
    for pattern, owner in names:
        if pattern.fullmatch(name):
            return owner
    return Owner.UNKNOWN
