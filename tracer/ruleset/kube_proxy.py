"""
How kube-proxy runs, inferred from its own rules.

From pkg/proxy of Kubernetes: iptables/proxier.go, ipvs/proxier.go, nftables/proxier.go.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_network
from typing import Any

from tracer.ruleset.program import KubeProxyFacts

_TO_MARK = "-j KUBE-MARK-MASQ"
_SET_MARK = re.compile(
    r"-A KUBE-MARK-MASQ .*-j MARK --(?:set-xmark (0x[0-9a-f]+)/\1|or-mark (0x[0-9a-f]+))$"
)
# Only the rule for the ClusterIP has this comment. It has "! -s CIDR", "! -i BRIDGE", or neither
# with masqueradeAll.
_CLUSTER_IP = re.compile(r"-A KUBE-SV[CL]-\S+ (.*)-d \S+ .*cluster IP\".*-j KUBE-MARK-MASQ$")
_IPVS_CLUSTER_IP = re.compile(
    r"-A KUBE-SERVICES (.*)-m set --match-set KUBE-6?-?CLUSTER-IP (\S+) -j KUBE-MARK-MASQ$"
)
_OUTSIDE = re.compile(r"! -s (\S+)")
_BY_INTERFACE = re.compile(r"! -i (\S+)")


def of_iptables(chains: Mapping[str, Sequence[str]]) -> KubeProxyFacts:
    """
    Return what the nat table of iptables shows.

    Args:
        chains: Its chains with their rules, lines that begin with ``-A``.
    """
    marks = [
        int(found[1] or found[2], 16)
        for line in chains.get("KUBE-MARK-MASQ", ())
        if (found := _SET_MARK.match(line))
    ]
    mode = _mode(chains)
    if mode is None:
        return KubeProxyFacts(masquerade_mark=marks[0] if len(marks) == 1 else None)
    sources = list(_ipvs_sources(chains) if mode == "ipvs" else _sources(chains))
    return KubeProxyFacts(
        mode=mode,
        masquerade_mark=marks[0] if len(marks) == 1 else None,
        has_masquerade_all=any(not text for text in sources) if sources else None,
        cluster_cidrs=_cidrs(found for text in sources for found in _OUTSIDE.findall(text)),
        local_interfaces=tuple(
            dict.fromkeys(found for text in sources for found in _BY_INTERFACE.findall(text))
        ),
    )


def of_nftables(rules: Iterable[Mapping[str, Any]]) -> KubeProxyFacts:
    """
    Return what the table ``kube-proxy`` of nftables shows.

    Args:
        rules: Its rules as ``nft -j`` prints them.
    """
    marks, all_outside = set(), set()
    cidrs: list[str] = []
    for rule in rules:
        ops = [op for op in rule.get("expr", ()) if isinstance(op, dict)]
        marks |= {mark for op in ops if (mark := _or_mark(op)) is not None}
        matches = [op["match"] for op in ops if isinstance(op.get("match"), dict)]
        if not any(match.get("right") == "@cluster-ips" for match in matches):
            continue
        if not any("mangle" in op or _jumps_to_mark(op) for op in ops):
            continue
        all_outside.add(len(matches) == 1)
        cidrs += [cidr for match in matches if (cidr := _outside(match))]
    return KubeProxyFacts(
        mode="nftables",
        masquerade_mark=marks.pop() if len(marks) == 1 else None,
        # If kube-proxy does not distinguish pods from other clients, there is no such rule at all.
        has_masquerade_all=True in all_outside,
        cluster_cidrs=_cidrs(cidrs),
    )


def _mode(chains: Mapping[str, Sequence[str]]) -> str | None:
    services = chains.get("KUBE-SERVICES", ())
    if any(
        "--match-set KUBE-" in line for line in (*services, *chains.get("KUBE-POSTROUTING", ()))
    ):
        return "ipvs"
    # The kubelet also makes KUBE-MARK-MASQ and KUBE-POSTROUTING, but not KUBE-SERVICES.
    return "iptables" if services else None


def _sources(chains: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for lines in chains.values():
        for line in lines:
            if line.endswith(_TO_MARK) and (found := _CLUSTER_IP.match(line)):
                yield found[1].strip()


def _ipvs_sources(chains: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for line in chains.get("KUBE-SERVICES", ()):
        if found := _IPVS_CLUSTER_IP.match(line):
            before = re.sub(r'-m comment --comment "[^"]*"', "", found[1]).strip()
            # With "src,dst" it marks only traffic from Services themselves.
            yield "src,dst" if found[2] == "src,dst" else before


def _or_mark(op: Mapping[str, Any]) -> int | None:
    match op:
        case {
            "mangle": {"key": {"meta": {"key": "mark"}}, "value": {"|": [{"meta": _}, int(mark)]}}
        }:
            return mark
    return None


def _jumps_to_mark(op: Mapping[str, Any]) -> bool:
    return op.get("jump") == {"target": "mark-for-masquerade"}


def _outside(match: Mapping[str, Any]) -> str | None:
    match match:
        case {
            "op": "!=",
            "left": {"payload": {"field": "saddr"}},
            "right": {"prefix": {"addr": str(address), "len": int(length)}},
        }:
            return f"{address}/{length}"
    return None


def _cidrs(texts: Iterable[str]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for text in texts:
        try:
            found[str(ip_network(text))] = None
        except ValueError:
            continue
    return tuple(found)
