"""The verdict on a dropped packet: the Service's state or the rule that explains it."""

import re
from functools import cached_property

from tracer.cluster.match import EndpointAddress, Family, HostPortMatch, ServiceMatch, Via
from tracer.cluster.objects import Policy
from tracer.judge import advice
from tracer.judge.cause import Cause
from tracer.judge.endpoints import usable
from tracer.judge.lines import owned
from tracer.judge.place import possible_hooks
from tracer.judge.verdict import JudgedDrop, Opinion, Verdict
from tracer.judge.view import EXTERNAL_WAYS, View, policy_of, reference
from tracer.model import Drop, FiveTuple, Hook, IPAddress
from tracer.ruleset.model import Candidates, Flow, HookName, Owner, Rule

NETFILTER_DROP = "NETFILTER_DROP"
# Drop reasons of the kernel (include/net/dropreason-core.h) that decide the cause alone.
_CAUSES = {
    "NO_SOCKET": Cause.NO_LISTENER,
    "IP_RPFILTER": Cause.RP_FILTER,
}
_ON_INVALID = re.compile(r"(?<!! )--ctstate INVALID(?= |$)|ct state invalid(?= |$)")
_HOOKS: dict[Hook, HookName] = {
    Hook.NF_PREROUTING: "prerouting",
    Hook.NF_INPUT: "input",
    Hook.NF_FORWARD: "forward",
    Hook.NF_OUTPUT: "output",
    Hook.NF_POSTROUTING: "postrouting",
}


def judge_drop(
    drop: Drop,
    view: View,
    *,
    time_ns: int,
    reason: str,
    place: str | None,
    dst_input: str | None,
) -> JudgedDrop:
    """
    Judge one dropped packet.

    Args:
        drop: The packet.
        view: The node that dropped it, and the cluster at that time.
        time_ns: When it was dropped, in Unix time.
        reason: The kernel's name for ``drop.reason``, without ``SKB_DROP_REASON_``.
        place: The function at ``drop.location``.
        dst_input: The function at ``drop.dst_input``.
    """
    hooks = possible_hooks(drop, dst_input) if reason == NETFILTER_DROP else ()
    case = _Case(drop, view, reason, place, hooks)
    return JudgedDrop(
        drop=drop,
        time_ns=time_ns,
        node=view.node,
        reason=reason,
        place=place,
        hook=case.hook,
        opinion=case.opinion(),
    )


class _Case:
    """One dropped packet and all that the judge derives from it."""

    def __init__(
        self, drop: Drop, view: View, reason: str, place: str | None, hooks: tuple[Hook, ...]
    ) -> None:
        self.drop = drop
        self.view = view
        self.reason = reason
        self.hooks = hooks
        where = f" in {place}" if place else ""
        self.evidence = [f"the kernel dropped the packet: {reason}{where}"]

    def opinion(self) -> Opinion:
        if self.hook is not None:
            shows = "its route and interface show" if len(self.hooks) == 1 else "the rules show"
            self.evidence.append(f"{shows} that it was at netfilter's {self.hook.label} hook")
        if self.drop.orig is None:
            self.evidence.append("the packet had no conntrack entry")
        cause = self._cause()
        if self.view.cluster is None:
            self.evidence.append("no cluster objects were read: judged by packet and rules alone")
        flow = self.flow
        return Opinion(
            verdict=Verdict.DROPPED,
            cause=cause,
            service=reference(self.match),
            client_class=self.view.classify(flow.src) if flow else None,
            rule=self.rule,
            evidence=tuple(self.evidence),
            advice=advice.for_drop(
                cause,
                # Behind DNAT it is the backend's address that nobody listened at.
                None if self.drop.is_translated else self.match,
                self.view.node,
                is_own=flow is not None and flow.src in self.view.service_addresses,
            ),
        )

    @cached_property
    def flow(self) -> FiveTuple | None:
        return self.drop.flow

    @cached_property
    def match(self) -> ServiceMatch | HostPortMatch | None:
        return self.view.match(self.flow) if self.flow else None

    @cached_property
    def hook(self) -> Hook | None:
        """The only hook it can have been at, or the only one whose rules can have dropped it."""
        able = [hook for hook in self.hooks if len(self.hooks) == 1 or self._rules_at(hook)]
        return able[0] if len(able) == 1 else None

    @cached_property
    def candidates(self) -> Candidates | None:
        """The rules that may have dropped it; None where rules or hook are not known."""
        return self._candidates_at(self.hook) if self.hook is not None else None

    def _rules_at(self, hook: Hook) -> bool:
        candidates = self._candidates_at(hook)
        return candidates is not None and bool(candidates.possible)

    def _candidates_at(self, hook: Hook) -> Candidates | None:
        view = self.view
        if view.rules is None:
            return None
        flow = Flow.of_drop(
            self.drop,
            is_new=self.drop.is_new,
            iif=view.interfaces.get(self.drop.iif),
            oif=view.interfaces.get(self.drop.dst_ifindex),
            local_addresses=view.addresses or None,
        )
        return view.rules.drop_candidates(flow, _HOOKS[hook]) if flow else None

    @cached_property
    def rule(self) -> Rule | None:
        return self.candidates.certain if self.candidates else None

    def _cause(self) -> Cause | None:
        if self.reason != NETFILTER_DROP:
            cause = _CAUSES.get(self.reason)
            # A reply without a socket: its client has gone, which says nothing about listeners.
            return None if cause is Cause.NO_LISTENER and self.drop.is_reply else cause
        self._note_rules()
        if self._is_invalid:
            return Cause.CONNTRACK_INVALID
        if self.rule is not None and self.rule.owner is not Owner.KUBE_PROXY:
            return Cause.NETFILTER_DROP
        if isinstance(self.match, ServiceMatch) and self._is_before_kube_proxy(self.match):
            cause = self._service_cause(self.match)
            if cause is not None:
                return cause
        return Cause.NETFILTER_DROP

    def _is_before_kube_proxy(self, match: ServiceMatch) -> bool:
        """Whether kube-proxy's rules of this node may have dropped what was sent to a Service."""
        # One that has an endpoint's address was not dropped for want of an endpoint.
        if self.drop.is_reply or self.drop.is_translated or self.flow is None:
            return False
        # Another node's NodePort is that node's business.
        return match.via is not Via.NODE_PORT or self.view.is_here(self.flow.dst)

    @cached_property
    def _is_invalid(self) -> bool:
        """
        Whether only a rule on INVALID packets can have dropped it.

        Such a rule is never certain: an untracked packet has no conntrack entry either.
        """
        if self.drop.orig is not None or self.candidates is None:
            return False
        only = self.candidates.only
        has_all = self.view.rules is not None and not self.view.rules.unread
        return has_all and only is not None and only.is_understood and _is_on_invalid(only)

    def _service_cause(self, match: ServiceMatch) -> Cause | None:
        """Return the state of a Service that makes kube-proxy drop; None if there is none."""
        if not self._usable(match):
            self.evidence.append(f"Service {match.service.key} has no ready endpoint")
            if self.view.mode == "ipvs":
                # ip_vs_leave in net/netfilter/ipvs/ip_vs_core.c
                self.evidence.append(
                    "in IPVS mode, a virtual server without endpoints refuses by itself, without a "
                    "rule"
                )
            return Cause.NO_ENDPOINTS
        if self._is_excluded(match):
            return Cause.SOURCE_RANGES
        is_bound = policy_of(match) is Policy.LOCAL and not self._is_exempt(match)
        if is_bound and not self._usable(match, self.view.node):
            which = "internal" if match.via is Via.CLUSTER_IP else "external"
            self.evidence.append(
                f"Service {match.service.key} has {which}TrafficPolicy Local and no ready endpoint "
                f"on {self.view.node}"
            )
            return Cause.NO_LOCAL_ENDPOINT
        return None

    def _is_exempt(self, match: ServiceMatch) -> bool:
        """Whether the client may use other nodes' endpoints in spite of externalTrafficPolicy."""
        # "pod traffic for ... external destinations", "route LOCAL traffic for ...".
        has_rules = self.view.mode in ("iptables", "nftables")
        if match.via not in EXTERNAL_WAYS or not has_rules or self.flow is None:
            return False
        source = self.flow.src
        return self.view.is_here(source) or bool(self.view.is_cluster_source(source))

    def _usable(self, match: ServiceMatch, node: str | None = None) -> tuple[EndpointAddress, ...]:
        if self.view.cluster is None or self.flow is None:
            return ()
        family: Family = "ipv4" if self.flow.src.version == 4 else "ipv6"
        return usable(self.view.cluster.endpoints(match.service.key, match.port, family), node)

    def _is_excluded(self, match: ServiceMatch) -> bool:
        if match.via is not Via.LOAD_BALANCER or self.flow is None:
            return False
        source = self.flow.src
        # kube-proxy treats each family on its own: without ranges of a family, all its clients may
        # connect (newBaseServiceInfo in pkg/proxy/serviceport.go).
        ranges = [one for one in match.service.source_ranges if one.version == source.version]
        sources = self._own_sources(source) or (source,)
        if not ranges or any(one in each for one in sources for each in ranges):
            return False
        listed = ", ".join(map(str, sources))
        self.evidence.append(
            f"{listed} is not in loadBalancerSourceRanges of Service {match.service.key}: "
            f"{', '.join(map(str, ranges))}"
        )
        return True

    def _own_sources(self, source: IPAddress) -> tuple[IPAddress, ...]:
        """
        Return the addresses that count for a process on the node that connects to a Service.

        In IPVS mode the node has the Service's address, so the kernel picks that as source.
        kube-proxy checks the node's own addresses against the ranges instead
        (lbNoNodeAccessIPPortProtocolEntries).
        """
        if source not in self.view.service_addresses or self.view.cluster is None:
            return ()
        node = self.view.cluster.node(self.view.node)
        own = node.addresses if node is not None else ()
        return tuple(one for one in own if one.version == source.version)

    def _note_rules(self) -> None:
        if self.candidates is None:
            return
        if self.rule is not None:
            self.evidence.append(f"dropped by {owned(self.rule)}: {self.rule}")
            return
        for rule in self.candidates.possible[:3]:
            self.evidence.append(f"possibly dropped by {owned(rule)}: {rule}")
        self.evidence.append(f"no rule is certain: {self.candidates.reason}")


def _is_on_invalid(rule: Rule) -> bool:
    # On the state INVALID alone: "! --ctstate" and lists of states mean something else.
    return bool(_ON_INVALID.search(rule.text))
