"""The verdict on the source of a connection, its cause and its evidence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from tracer.cluster.match import Family, ServiceMatch, Via
from tracer.cluster.objects import Policy, Service
from tracer.judge import advice, proxy_lines
from tracer.judge.cause import OF_KUBE_PROXY, Cause
from tracer.judge.connection_notes import ConnectionNotes
from tracer.judge.endpoints import usable
from tracer.judge.lines import Lines
from tracer.judge.proxy_word import ProxyWord
from tracer.judge.stray import detour
from tracer.judge.verdict import JudgedConnection, Opinion, ServiceRef, Verdict
from tracer.judge.view import EXTERNAL_WAYS, View, policy_of, reference
from tracer.model import ClientClass, Connection, Hook, Status
from tracer.ruleset.model import Candidates, Flow, HookName, Owner, Rule


def judge_connection(
    connection: Connection, view: View, *, time_ns: int, word: ProxyWord | None = None
) -> JudgedConnection:
    """
    Judge one conntrack entry.

    Args:
        connection: The entry.
        view: The node that holds it, and the cluster at its time.
        time_ns: When it was created, in Unix time.
        word: What its first bytes say about the client behind its peer, if they are read.
    """
    return JudgedConnection(
        connection=connection,
        time_ns=time_ns,
        node=view.node,
        opinion=_Case(connection, view, word).opinion(),
        backend_pod=view.pod_at(connection.reply.src),
        word=word,
    )


class _Case:
    """One connection and all that the judge derives from it, each fact at most once."""

    def __init__(self, connection: Connection, view: View, word: ProxyWord | None) -> None:
        self.connection = connection
        self.view = view
        self.word = word
        # Every verdict needs these; the rest is computed on demand.
        self.match = view.match(connection.orig)
        self.client_class = view.classify(connection.orig.src)
        # Whether kube-proxy had set its masquerade mark; None if not known.
        mark = connection.mark
        self.is_marked = None if mark is None else bool(mark & view.masquerade_mark)
        self.notes = ConnectionNotes(connection)

    def opinion(self) -> Opinion:
        self.notes.tuples()
        verdict, found = self._verdict()
        if self.view.cluster is None:
            self.notes.add(lambda: "no cluster objects were read: judged by tuples and rules alone")
        return Opinion(
            verdict=verdict,
            cause=found.cause,
            service=found.service or reference(self.match) or self._behind(),
            client_class=self.client_class,
            rule=found.rule,
            evidence=Lines(partial(self._evidence, self.notes.take())),
            advice=Lines(lambda: self._advice(found)),
        )

    def _evidence(self, notes: Sequence[Callable[[], str]]) -> list[str]:
        word = () if self.word is None else proxy_lines.evidence(self.word, self.connection)
        return [*(note() for note in notes), *word]

    def _advice(self, found: "_Found") -> tuple[str, ...]:
        reply = self.connection.reply
        port = "" if reply.is_icmp else f" port {reply.sport}"
        word = () if self.word is None else proxy_lines.advice(self.word, self.connection)
        if self.word is not None and self.word.is_proxied:
            return word
        return word + advice.for_source(
            found.advised or found.cause,
            self.match,
            backend=f"{reply.src}{port}",
            version=reply.src.version,
            rule=found.rule,
            node=self.view.node,
            is_local_possible=self._is_local_possible(),
        )

    def _is_local_possible(self) -> bool:
        """Whether a node has an endpoint of the Service; yes if there is no telling."""
        match, cluster = self.match, self.view.cluster
        if cluster is None or not isinstance(match, ServiceMatch):
            return True
        family: Family = "ipv4" if self.connection.reply.src.version == 4 else "ipv6"
        found = usable(cluster.endpoints(match.service.key, match.port, family))
        return not found or any(endpoint.node for endpoint in found)

    def _behind(self) -> ServiceRef | None:
        """Return the Service of a pod that was reached at its own address, if there is just one."""
        reply = self.connection.reply
        if self.match is not None or self.connection.is_dnat or reply.is_icmp:
            return None
        services = self.view.behind(reply.src, reply.sport, reply.proto)
        return _reference(services[0], Via.POD) if len(services) == 1 else None

    @cached_property
    def is_client_here(self) -> bool:
        return self.view.is_here(self.connection.orig.src)

    @cached_property
    def candidates(self) -> Candidates | None:
        """The rules that may have replaced the source; None if no rules were read."""
        rules, view = self.view.rules, self.view
        if rules is None:
            return None
        flow = Flow.of(
            self.connection,
            iif=view.interfaces.get(self.connection.iif),
            oif=view.interfaces.get(self.connection.oif),
            local_addresses=view.addresses or None,
        )
        hook: HookName = "input" if self.connection.hook is Hook.NF_INPUT else "postrouting"
        return rules.snat_candidates(flow, hook)

    @cached_property
    def is_masqueraded_in_place(self) -> bool:
        """
        Whether masquerading picked the address that the packet already had.

        A process on the node that reaches a backend on another node has the node's address before
        and after SNAT: the address is right only by chance.
        """
        connection = self.connection
        if connection.is_snat or self.match is None or not self.is_client_here:
            return False
        if self.is_marked is None:
            return bool(connection.status & Status.SRC_NAT)
        return self.is_marked and connection.hook is Hook.NF_POSTROUTING

    def _verdict(self) -> "tuple[Verdict, _Found]":
        connection = self.connection
        if self.word is not None and self.word.is_proxied:
            return Verdict.PROXIED, _Found(Cause.LOAD_BALANCER_PROXY)
        if connection.is_snat and not connection.status & Status.SRC_NAT:
            self.notes.add(
                lambda: (
                    f"conntrack's status {int(connection.status):#x} lacks IPS_SRC_NAT, although "
                    "its tuples show SNAT"
                )
            )
            return Verdict.UNKNOWN, _Found()
        if connection.is_snat or self.is_masqueraded_in_place:
            return Verdict.REPLACED, self._why_replaced()
        if self._is_proxied():
            return Verdict.PROXIED, _Found(Cause.LOAD_BALANCER_PROXY)
        upstream = self._upstream()
        if upstream is not None:
            return Verdict.REPLACED_UPSTREAM, upstream
        self.notes.preserved(self.match, self.is_marked)
        return Verdict.PRESERVED, self._stray() or _Found()

    def _stray(self) -> "_Found | None":
        """Return why replies do not return through this node, although the source is kept."""
        found = detour(self.connection, self.match, self.view, self.client_class)
        if found is None or not isinstance(self.match, ServiceMatch):
            return None
        key, node = self.match.service.key, self.view.node
        is_external = self.match.via in EXTERNAL_WAYS
        which = "external" if is_external else "internal"
        why = f"kube-proxy in IPVS mode uses other nodes' endpoints if {node} has no ready one"
        if is_external and self.view.mode != "ipvs" and found.why is None:
            # "pod traffic for ... external destinations" in both proxiers' rules.
            inside = "kube-proxy applies it to external clients, not to pods"
            why = f"{inside}; or {why}" if self.view.mode is None else inside
        self.notes.add(
            lambda: (
                f"Service {key} has {which}TrafficPolicy Local, but the endpoint is on "
                f"{found.node}: {why}"
            )
        )
        if found.why is None:
            return None
        self.notes.add(lambda: f"replies do not return through {node}: {found.why}")
        return _Found(Cause.NO_LOCAL_ENDPOINT)

    def _why_replaced(self) -> "_Found":
        rule = self.notes.rule(self.candidates)
        cause = self._cause(rule)
        if cause is not None and self.view.mode == "ipvs" and cause in OF_KUBE_PROXY:
            self.notes.add(
                lambda: f"kube-proxy runs in IPVS mode; in other modes the cause would be {cause}"
            )
            advised = advice.cause_in_ipvs_mode(cause, self.match)
            return _Found(Cause.IPVS_MASQUERADE, rule, advised=advised)
        if cause is None:
            self.notes.add(lambda: "the cause is not known: the facts above do not decide it")
        return _Found(cause, rule)

    def _cause(self, rule: Rule | None) -> Cause | None:
        connection, match = self.connection, self.match
        self.notes.mark(self.is_marked, self.view.masquerade_mark)
        if self.is_masqueraded_in_place:
            self.notes.add(lambda: "masquerading picked the address that the packet already had")
        if match is not None and connection.reply.src == connection.orig.src:
            self.notes.add(lambda: f"client and backend are both {connection.orig.src}")
            return Cause.HAIRPIN
        is_foreign = rule is not None and rule.owner is not Owner.KUBE_PROXY
        if is_foreign or self.is_marked is False:
            return self._foreign_cause()
        # kube-proxy masquerades nothing that it has not sent to an endpoint before.
        is_served = connection.is_translated or self.is_marked
        if isinstance(match, ServiceMatch) and is_served:
            return self._kube_proxy_cause(match)
        if self.is_marked:
            self.notes.add(
                lambda: (
                    f"kube-proxy marked the packet, but no Service is known at "
                    f"{connection.orig.dst} port {connection.orig.dport}"
                )
            )
            return None
        return self._foreign_cause()

    def _kube_proxy_cause(self, match: ServiceMatch) -> Cause | None:
        source = self.connection.orig.src
        if source.is_loopback:
            self.notes.add(lambda: f"the client's address {source} is a loopback address")
            return Cause.LOCALHOST_NODEPORT
        if match.via in EXTERNAL_WAYS:
            return self._external_cause(match)
        if self.view.rules is not None and self.view.rules.has_masquerade_all:
            self.notes.add(
                lambda: "kube-proxy's rules mark all traffic to ClusterIPs: masqueradeAll is on"
            )
            return Cause.MASQUERADE_ALL
        is_cluster_source = self.view.is_cluster_source(source)
        if is_cluster_source is False:
            self.notes.add(
                lambda: f"the client {source} is outside the ranges that kube-proxy takes for pods"
            )
            return Cause.OFF_CLUSTER_SOURCE
        return None

    def _external_cause(self, match: ServiceMatch) -> Cause | None:
        self.notes.policy(match)
        if self.is_client_here:
            self.notes.add(
                lambda: f"the client {self.connection.orig.src} is {self.view.node} itself"
            )
            return Cause.NODE_LOCAL_SOURCE
        # In every mode of kube-proxy, masqueradeAll affects ClusterIPs only.
        is_cluster = policy_of(match) is Policy.CLUSTER
        return Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER if is_cluster else None

    def _foreign_cause(self) -> Cause | None:
        """Distinguish a pod's traffic out of the cluster from what other rules translate."""
        view, connection = self.view, self.connection
        source, target = self.client_class, view.classify(connection.reply.src)
        is_outside = target in (ClientClass.EXTERNAL, ClientClass.LOADBALANCER)
        is_egress = source is ClientClass.POD and is_outside
        if self.match is None and is_egress:
            self.notes.add(
                lambda: (
                    f"the client {connection.orig.src} is a pod, and {connection.reply.src} is "
                    "outside the cluster"
                )
            )
            return Cause.POD_EGRESS
        if self.candidates is None or not self.candidates.possible:
            return None
        rule, owners = self.candidates.certain, self.candidates.owners
        # With no certain rule, kube-proxy may have done it, unless its mark was missing.
        is_sure = rule is not None or self.is_marked is not False
        return None if is_sure and Owner.KUBE_PROXY in owners else Cause.OTHER_RULE

    def _is_proxied(self) -> bool:
        source = self.connection.orig.src
        if self.client_class is not ClientClass.LOADBALANCER:
            return False
        self.notes.add(lambda: f"the peer {source} is the address of a load balancer")
        return True

    def _upstream(self) -> "_Found | None":
        """Explain a client address that is another node's, where this node replaced nothing."""
        connection, view = self.connection, self.view
        reply = connection.reply
        if view.cluster is None or connection.is_dnat or self.is_client_here:
            return None
        node = self._other_node()
        if node is None:
            return None
        services = [
            service
            for service in view.behind(reply.src, reply.sport, reply.proto)
            if service.external_policy is Policy.CLUSTER
        ]
        if not services:
            return None
        self.notes.upstream(node, services)
        (only, *others) = services
        reference = None if others else _reference(only, Via.NONE)
        return _Found(Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER, service=reference)

    def _other_node(self) -> str | None:
        """
        Return the other node that the client's address belongs to, None if there is none.

        With an overlay network a node masquerades to the address of its tunnel or bridge: one of
        the first two of its pod range, which belong to no pod (such as flannel.1 and cni0).
        """
        source, cluster = self.connection.orig.src, self.view.cluster
        if cluster is None:
            return None
        if self.client_class is ClientClass.NODE:
            return cluster.node_of(source) or "another node"
        name = cluster.node_of_pod_address(source)
        node = cluster.node(name) if name and cluster.pod_at(source) is None else None
        if node is None or node.name == self.view.node:
            return None
        is_first = any(
            source in cidr and int(source) - int(cidr.network_address) in (0, 1)
            for cidr in node.pod_cidrs
        )
        return node.name if is_first else None


@dataclass(frozen=True, slots=True)
class _Found:
    """What was found. ``advised`` is the cause to give advice on, if it is a different one."""

    cause: Cause | None = None
    rule: Rule | None = None
    service: ServiceRef | None = None
    advised: Cause | None = None


def _reference(service: Service, via: Via) -> ServiceRef:
    policy = service.external_policy if via is Via.NONE else None
    return ServiceRef(
        namespace=service.namespace, name=service.name, port=None, via=via, policy=policy
    )
