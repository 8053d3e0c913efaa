"""What the verdict on a connection rests on, written out if somebody reads it."""

from collections.abc import Callable, Sequence
from functools import partial

from tracer.cluster.match import HostPortMatch, ServiceMatch, Via
from tracer.cluster.objects import Service
from tracer.judge.view import EXTERNAL_WAYS
from tracer.model import Connection, Hook
from tracer.ruleset.model import Candidates, Owner, Rule

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
        """Keep a line."""
        self._lines.append(line)

    def take(self) -> Sequence[Callable[[], str]]:
        """
        Hand over what was kept, to be written out if somebody reads it, and keep it no longer.

        Lines know those who made them. If these went on to know the lines, nobody but the garbage
        collector would find them.
        """
        lines, self._lines = self._lines, []
        return lines

    def tuples(self) -> None:
        """Tell what conntrack's two tuples say of SNAT and DNAT."""
        orig, reply = self._connection.orig, self._connection.reply
        if self._connection.is_snat:
            self.add(
                lambda: f"the backend answers to {reply.dst}, not to the client {orig.src}: SNAT"
            )
        else:
            self.add(lambda: f"the backend answers to the sender's own address {orig.src}")
        if self._connection.is_dnat:
            self.add(lambda: f"addressed to {orig.dst}, answered by {reply.src}: DNAT")

    def mark(self, is_marked: bool | None, mask: int) -> None:
        """Tell whether kube-proxy had marked the packet; None if nobody knows."""
        if is_marked:
            self.add(lambda: f"the packet carried kube-proxy's mark {mask:#x} before SNAT")
        elif is_marked is False:
            self.add(lambda: "the packet did not carry kube-proxy's mark")
        else:
            self.add(lambda: "the packet's mark is not known: nobody saw it before SNAT")

    def rule(self, candidates: Candidates | None) -> Rule | None:
        """Tell which rule did it, or which may have, and return it if that is certain."""
        if candidates is None:
            self.add(lambda: "the node's rules were not read")
            return None
        if candidates.certain is not None:
            rule = candidates.certain
            self.add(lambda: f"rule of {_owner(rule)}: {rule}")
            return rule
        for rule in candidates.possible[:_SHOWN]:
            self.add(partial(_perhaps, rule))
        self.add(lambda: f"no rule is certain: {candidates.reason}")
        return None

    def policy(self, match: ServiceMatch) -> None:
        """Tell the policy of a Service that was reached from outside."""
        service = match.service
        self.add(
            lambda: (
                f"Service {service.key} was reached by its {_WAYS[match.via]}; its "
                f"externalTrafficPolicy is {service.external_policy}"
            )
        )

    def preserved(self, match: ServiceMatch | HostPortMatch | None, is_marked: bool | None) -> None:
        """Tell by which way the client came whose address stays."""
        if isinstance(match, ServiceMatch):
            if match.via in EXTERNAL_WAYS:
                self.policy(match)
            elif match.via is Via.CLUSTER_IP:
                key = match.service.key
                self.add(lambda: f"Service {key} was reached by its ClusterIP from inside")
        if isinstance(match, HostPortMatch):
            pod, port = match.pod, match.port.port
            self.add(lambda: f"reached by host port {port} of pod {pod.namespace}/{pod.name}")
        if is_marked and self._connection.hook is Hook.NF_POSTROUTING:
            self.add(
                lambda: "the packet carried kube-proxy's mark, but nothing replaced its source"
            )

    def upstream(self, node: str, services: Sequence[Service]) -> None:
        """Tell why another node is taken to have replaced the source, and what would prove it."""
        orig = self._connection.orig
        names = ", ".join(str(service.key) for service in services[:_SHOWN])
        more = f" and {len(services) - _SHOWN} more" if len(services) > _SHOWN else ""
        self.add(lambda: f"the sender {orig.src} is {node}, and this node replaced nothing")
        self.add(
            lambda: (
                f"the backend is an endpoint of {names}{more}, with externalTrafficPolicy "
                f"Cluster: {node} may have masqueraded for it"
            )
        )
        self.add(
            lambda: (
                f"proof: 'srcip trace' on {node}, with the connection {orig.src} port "
                f"{orig.sport}; a process of {node} itself would look the same here"
            )
        )


def _perhaps(rule: Rule) -> str:
    return f"perhaps the rule of {_owner(rule)}: {rule}"


def _owner(rule: Rule) -> str:
    return "an unknown owner" if rule.owner is Owner.UNKNOWN else str(rule.owner)
