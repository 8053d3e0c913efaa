"""The evidence for the verdict on a connection, formatted only when somebody reads it."""

from collections.abc import Callable, Sequence
from functools import partial

from tracer.cluster.match import HostPortMatch, ServiceMatch, Via
from tracer.cluster.objects import Service
from tracer.judge.lines import owned
from tracer.judge.view import EXTERNAL_WAYS
from tracer.model import Connection, Hook
from tracer.ruleset.model import Candidates, Rule

_SHOWN = 3
_WAYS = {
    Via.NODE_PORT: "NodePort",
    Via.LOAD_BALANCER: "load-balancer address",
    Via.EXTERNAL_IP: "external IP",
}


class ConnectionNotes:
    """Collects the evidence on one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lines: list[Callable[[], str]] = []

    def add(self, line: Callable[[], str]) -> None:
        """Add a line."""
        self._lines.append(line)

    def take(self) -> Sequence[Callable[[], str]]:
        """
        Return the lines, and forget them.

        Each line refers to its maker. A reference back to the lines would be a cycle, which only
        the garbage collector frees.
        """
        lines, self._lines = self._lines, []
        return lines

    def tuples(self) -> None:
        """Add what conntrack's two tuples say about SNAT and DNAT."""
        orig, reply = self._connection.orig, self._connection.reply
        if self._connection.is_snat:
            self.add(
                lambda: (
                    f"conntrack expects replies to {reply.dst}, not to the client {orig.src}: SNAT"
                )
            )
        else:
            self.add(lambda: f"conntrack expects replies to the original source {orig.src}")
        if self._connection.is_dnat:
            self.add(
                lambda: f"conntrack expects replies from {reply.src}, not from {orig.dst}: DNAT"
            )

    def mark(self, is_marked: bool | None, mask: int) -> None:
        """Add whether kube-proxy had marked the packet; None if not known."""
        if is_marked:
            self.add(
                lambda: f"the packet carried kube-proxy's masquerade mark {mask:#x} before SNAT"
            )
        elif is_marked is False:
            self.add(lambda: "the packet did not carry kube-proxy's masquerade mark")
        else:
            self.add(lambda: "the packet's mark is not known: it was not seen before SNAT")

    def rule(self, candidates: Candidates | None) -> Rule | None:
        """Add which rule replaced the source, or may have; return it if it is certain."""
        if candidates is None:
            self.add(lambda: "the node's rules were not read")
            return None
        if candidates.certain is not None:
            rule = candidates.certain
            self.add(lambda: f"SNAT by {owned(rule)}: {rule}")
            return rule
        for rule in candidates.possible[:_SHOWN]:
            self.add(partial(_possibly, rule))
        self.add(lambda: f"no rule is certain: {candidates.reason}")
        return None

    def policy(self, match: ServiceMatch) -> None:
        """Add the policy of a Service that was reached from outside."""
        service = match.service
        self.add(
            lambda: (
                f"Service {service.key} was reached through its {_WAYS[match.via]}; its "
                f"externalTrafficPolicy is {service.external_policy}"
            )
        )

    def preserved(self, match: ServiceMatch | HostPortMatch | None, is_marked: bool | None) -> None:
        """Add how the client reached the backend, where its address is kept."""
        if isinstance(match, ServiceMatch):
            if match.via in EXTERNAL_WAYS:
                self.policy(match)
            elif match.via is Via.CLUSTER_IP:
                key = match.service.key
                self.add(lambda: f"Service {key} was reached through its ClusterIP")
        if isinstance(match, HostPortMatch):
            pod, port = match.pod, match.port.port
            self.add(
                lambda: f"pod {pod.namespace}/{pod.name} was reached through its hostPort {port}"
            )
        if is_marked and self._connection.hook is Hook.NF_INPUT:
            self.add(
                lambda: (
                    "the packet carried kube-proxy's masquerade mark, but the backend is on the "
                    "node itself: what is delivered there does not pass POST_ROUTING, where "
                    "kube-proxy masquerades"
                )
            )
        if is_marked and self._connection.hook is Hook.NF_POSTROUTING:
            self.add(
                lambda: (
                    "the packet carried kube-proxy's masquerade mark, but its source was not "
                    "replaced"
                )
            )

    def upstream(self, node: str, services: Sequence[Service]) -> None:
        """Add why another node probably replaced the source, and what would prove it."""
        orig = self._connection.orig
        names = ", ".join(str(service.key) for service in services[:_SHOWN])
        more = f" and {len(services) - _SHOWN} more" if len(services) > _SHOWN else ""
        self.add(lambda: f"the source {orig.src} is {node}, and this node did not replace it")
        self.add(
            lambda: (
                f"the backend is an endpoint of {names}{more}, with externalTrafficPolicy "
                f"Cluster: {node} may have masqueraded the connection"
            )
        )
        self.add(
            lambda: (
                f"not proven: a process on {node} itself would look the same here; run 'srcip "
                f"trace' on {node} and look for {orig.src} port {orig.sport}"
            )
        )


def _possibly(rule: Rule) -> str:
    return f"possibly SNAT by {owned(rule)}: {rule}"
