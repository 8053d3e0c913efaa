"""What keeps the client's address, what to type for it, and what it costs."""

import json
import shlex
from ipaddress import ip_address

from tracer.cluster.match import HostPortMatch, ServiceMatch, Via
from tracer.cluster.objects import Policy, Service, ServiceType
from tracer.judge.cause import Cause
from tracer.judge.lines import owned
from tracer.ruleset.model import Owner, Rule

Match = ServiceMatch | HostPortMatch | None

# How to keep each owner's rule from masquerading.
_SETTINGS = {
    Owner.FLANNEL: "run flanneld without --ip-masq",
    Owner.CALICO: "set natOutgoing: false in its IPPool",
    Owner.CILIUM: (
        "set enable-ipv4-masquerade to false, or add the destination to nonMasqueradeCIDRs of its "
        "ip-masq-agent"
    ),
    Owner.KINDNET: "add the destination to POD_SUBNET, the range that it takes for pods",
    Owner.IP_MASQ_AGENT: "add the destination to nonMasqueradeCIDRs in its ConfigMap",
    Owner.CNI_BRIDGE: "set ipMasq: false in the CNI configuration",
    Owner.AWS_VPC_CNI: (
        "set AWS_VPC_K8S_CNI_EXTERNALSNAT to true, or add the destination to "
        "AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS"
    ),
    Owner.DOCKER: "set com.docker.network.bridge.enable_ip_masquerade of the network to false",
}
# The same for owners whose rules translate traffic to pods, not from them.
_INBOUND_SETTINGS = {
    Owner.KLIPPER_LB: "use another load balancer: this one always masquerades",
    Owner.PORTMAP: (
        "set snat: false in its configuration; cost: the pod itself and localhost then cannot "
        "reach the hostPort"
    ),
}
_NO_LOCAL = (
    "no command: with externalTrafficPolicy Local every node would drop, because its EndpointSlices"
    " place no endpoint on a node"
)
_ROUTE_BACK = "cost: the destination then needs a route back to the pods"


def for_source(
    cause: Cause | None,
    match: Match,
    *,
    backend: str,
    version: int | None,
    node: str,
    rule: Rule | None = None,
    is_local_possible: bool = True,
) -> tuple[str, ...]:
    """
    Return advice for a replaced source, one string per line.

    Args:
        cause: Why the source is replaced.
        match: What the client addressed.
        backend: The backend's address and port, or words for it.
        version: 4 or 6; None for both.
        node: The node that the client addressed.
        rule: The rule that replaces it, where that is certain.
        is_local_possible: Whether a node has an endpoint of the Service: with policy Local, the
            others drop.
    """
    service = match.service if isinstance(match, ServiceMatch) else None
    match cause:
        case Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER | Cause.IPVS_MASQUERADE:
            return _policy_local(service) if is_local_possible else (_NO_LOCAL,)
        case Cause.OFF_CLUSTER_SOURCE:
            return (
                "connect from inside the cluster, or to the pods' own addresses; cost: those need "
                "a route to the pods",
            )
        case Cause.MASQUERADE_ALL:
            return (
                "set masqueradeAll: false in kube-proxy's configuration (iptables.masqueradeAll or "
                "nftables.masqueradeAll); cost: backends then need a route back to the clients",
            )
        case Cause.HAIRPIN:
            return (
                f"connect to the pod itself, {backend}, or to localhost: through the Service this "
                "is unavoidable",
            )
        case Cause.NODE_LOCAL_SOURCE:
            return (
                f"connect from a pod to the ClusterIP{_cluster_ip(service, version)}: kube-proxy "
                "masquerades whatever a node's own processes send to a Service",
            )
        case Cause.LOCALHOST_NODEPORT:
            return ("connect to an address of the node instead of loopback",)
        case Cause.POD_EGRESS | Cause.OTHER_RULE:
            return _owners_setting(rule, backend)
        case Cause.NO_LOCAL_ENDPOINT:
            return _no_local_endpoint(match, node)
        case Cause.LOAD_BALANCER_PROXY:
            return (
                "read the client's address from the PROXY protocol or X-Forwarded-For header that "
                "the load balancer adds, or use a load balancer that forwards packets",
            )
        case _:
            return ()


def cause_in_ipvs_mode(cause: Cause, match: Match) -> Cause:
    """
    Return the cause to give advice on when kube-proxy masquerades in IPVS mode.

    In that mode the policy also decides about the node's own processes.
    """
    service = match.service if isinstance(match, ServiceMatch) else None
    is_cluster = service is not None and service.external_policy is Policy.CLUSTER
    if cause is Cause.NODE_LOCAL_SOURCE and is_cluster:
        return Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER
    return cause


def for_drop(
    cause: Cause | None, match: Match, node: str, *, is_own: bool = False
) -> tuple[str, ...]:
    """
    Return advice for a packet that did not arrive, one string per line.

    Args:
        cause: Why it did not arrive.
        match: What the client addressed.
        node: The node that dropped it.
        is_own: Whether a process of the node sent it, from an address of a Service.
    """
    service = match.service if isinstance(match, ServiceMatch) else None
    match cause:
        case Cause.NO_LOCAL_ENDPOINT:
            return _no_local_endpoint(match, node)
        case Cause.NO_ENDPOINTS:
            if service is None:
                return ("find out why no endpoint is ready",)
            slices = ("get", "endpointslices", "-l", f"kubernetes.io/service-name={service.name}")
            return (f"find out why no endpoint is ready: {_kubectl(service, *slices)}",)
        case Cause.SOURCE_RANGES:
            ranges = ", ".join(map(str, service.source_ranges)) if service else ""
            who = f"{node}'s own address" if is_own else "the client"
            return (f"add {who} to loadBalancerSourceRanges (now: {ranges})",)
        case Cause.NO_LISTENER if isinstance(match, ServiceMatch) and match.via is Via.NODE_PORT:
            return (
                "connect to another address of the node: kube-proxy does not serve the NodePort at "
                "this one",
            )
        case Cause.NO_LISTENER:
            return ("start the server, or check the address and port",)
        case Cause.RP_FILTER:
            return (
                "make routing symmetric, or loosen the filter: "
                "sysctl -w net.ipv4.conf.all.rp_filter=2; cost: forged sources may pass",
            )
        case Cause.CONNTRACK_INVALID:
            return (
                "look for asymmetric routes; if packets are outside the TCP window: "
                "sysctl -w net.netfilter.nf_conntrack_tcp_be_liberal=1; cost: forged packets may "
                "pass",
            )
        case _:
            return ()


def _policy_local(service: Service | None) -> tuple[str, ...]:
    cost = "cost: nodes without a ready endpoint drop the traffic, and load may be uneven"
    if service is None or service.load_balancer or service.type is ServiceType.LOAD_BALANCER:
        cost += "; the load balancer must probe healthCheckNodePort"
    if service is None:
        return ("set externalTrafficPolicy: Local on the Service", cost)
    patch = json.dumps({"spec": {"externalTrafficPolicy": "Local"}}, separators=(",", ":"))
    return (_kubectl(service, "patch", "service", service.name, "-p", patch), cost)


def _no_local_endpoint(match: Match, node: str) -> tuple[str, ...]:
    if not isinstance(match, ServiceMatch):
        return ()
    service = match.service
    if match.via is Via.CLUSTER_IP:
        return (
            f"run an endpoint of {service.key} on {node} (a DaemonSet runs one on every node), or "
            "set internalTrafficPolicy: Cluster",
        )
    health = service.health_check_node_port
    lines = [f"run an endpoint of {service.key} on {node}"]
    if health is not None:
        lines.append(
            f"or have the load balancer stop sending to {node}: its health check, /healthz on "
            f"port {health}, answers 503"
        )
    else:
        lines.append(f"or send clients to nodes that have an endpoint, not to {node}")
    return tuple(lines)


def _owners_setting(rule: Rule | None, backend: str) -> tuple[str, ...]:
    if rule is None:
        return ("find the rule that replaced the source, and change its owner's setting",)
    inbound = _INBOUND_SETTINGS.get(rule.owner)
    if inbound:
        return (f"{rule.owner}: {inbound}",)
    setting = _SETTINGS.get(rule.owner)
    if setting:
        return (f"{rule.owner}: {setting}; {_ROUTE_BACK}",)
    whose = "the rule (owner unknown)" if rule.owner is Owner.UNKNOWN else owned(rule)
    return (
        f"exclude {backend} from {whose} in table {rule.table}, chain {rule.chain}; "
        "cost: the destination then needs a route back to the client",
    )


def _cluster_ip(service: Service | None, version: int | None) -> str:
    if service is None:
        return ""
    addresses = [ip for ip in service.cluster_ips if version in (None, ip_address(ip).version)]
    return f" {' or '.join(map(str, addresses))}" if addresses else ""


def _kubectl(service: Service, *words: str) -> str:
    # Names come from the cluster: a pasted line must run this command and nothing else.
    return shlex.join(["kubectl", "--namespace", service.namespace, *words])
