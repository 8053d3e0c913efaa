"""What keeps the client's address, what that costs, and what to type."""

import json
import shlex
from ipaddress import ip_address

from tracer.cluster.match import HostPortMatch, ServiceMatch, Via
from tracer.cluster.objects import Policy, Service, ServiceType
from tracer.judge.cause import Cause
from tracer.ruleset.model import Owner, Rule

Match = ServiceMatch | HostPortMatch | None

# What each owner of a rule calls the setting that decides about its masquerading.
_SETTINGS = {
    Owner.FLANNEL: "flanneld's --ip-masq",
    Owner.CALICO: "natOutgoing of its IPPool",
    Owner.CILIUM: "enable-ipv4-masquerade, or the ranges of its ip-masq-agent",
    Owner.KINDNET: "the range it takes for the cluster's pods (POD_SUBNET)",
    Owner.IP_MASQ_AGENT: "nonMasqueradeCIDRs in its ConfigMap",
    Owner.CNI_BRIDGE: "ipMasq in the CNI configuration",
    Owner.AWS_VPC_CNI: "AWS_VPC_K8S_CNI_EXTERNALSNAT or AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS",
    Owner.DOCKER: "com.docker.network.bridge.enable_ip_masquerade of the network",
    Owner.KLIPPER_LB: "another load balancer: klipper-lb always masquerades",
    Owner.PORTMAP: "snat in the portmap plugin's configuration",
}


def for_source(
    cause: Cause | None,
    match: Match,
    *,
    backend: str,
    version: int | None,
    node: str,
    rule: Rule | None = None,
) -> tuple[str, ...]:
    """
    Return advice for a source that is replaced, a line each.

    Args:
        cause: Why it is.
        match: What the client addressed.
        backend: The backend by address and port, or in words.
        version: 4 or 6; None for both.
        node: The node that the client addressed.
        rule: The rule that does it, where that is certain.
    """
    service = match.service if isinstance(match, ServiceMatch) else None
    match cause:
        case Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER | Cause.IPVS_MASQUERADE:
            return _policy_local(service)
        case Cause.OFF_CLUSTER_SOURCE:
            return (
                "reach the Service from inside the cluster, or route to the pods' own addresses",
            )
        case Cause.MASQUERADE_ALL:
            return (
                "turn masqueradeAll off in kube-proxy's configuration (iptables.masqueradeAll)",
            )
        case Cause.HAIRPIN:
            return (
                f"unavoidable through a Service: connect to the pod itself, {backend}, or to "
                "localhost",
            )
        case Cause.NODE_LOCAL_SOURCE:
            return (
                f"connect from a pod, to the ClusterIP{_cluster_ip(service, version)}: what a node "
                "itself sends to a Service is masqueraded on every way",
            )
        case Cause.LOCALHOST_NODEPORT:
            return ("use an address of the node instead of loopback",)
        case Cause.POD_EGRESS | Cause.OTHER_RULE:
            return _owners_setting(rule, backend)
        case Cause.NO_LOCAL_ENDPOINT:
            return _no_local_endpoint(match, node)
        case Cause.LOAD_BALANCER_PROXY:
            return (
                "read the client's address from the PROXY protocol or X-Forwarded-For header that "
                "the load balancer adds, or use one that forwards packets",
            )
        case _:
            return ()


def cause_in_ipvs_mode(cause: Cause, match: Match) -> Cause:
    """
    Return the cause to give advice on where kube-proxy in IPVS mode masquerades.

    There the policy decides about the node's own processes, too.
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
    Return advice for a packet that did not arrive, a line each.

    Args:
        cause: Why it did not.
        match: What the client addressed.
        node: The node that discarded it.
        is_own: Whether a process of the node sent it, from an address of a Service.
    """
    service = match.service if isinstance(match, ServiceMatch) else None
    match cause:
        case Cause.NO_LOCAL_ENDPOINT:
            return _no_local_endpoint(match, node)
        case Cause.NO_ENDPOINTS:
            return (
                "see why no endpoint is ready"
                + (f": {_kubectl(service, 'get', 'endpointslices')}" if service else ""),
            )
        case Cause.SOURCE_RANGES:
            ranges = ", ".join(map(str, service.source_ranges)) if service else ""
            who = f"{node}'s own address" if is_own else "the client"
            return (f"add {who} to loadBalancerSourceRanges (now {ranges})",)
        case Cause.NO_LISTENER if isinstance(match, ServiceMatch) and match.via is Via.NODE_PORT:
            return (
                "use another address of the node: kube-proxy does not serve the NodePort at this "
                "one",
            )
        case Cause.NO_LISTENER:
            return ("start the server, or check address and port",)
        case Cause.RP_FILTER:
            return (
                "make routing symmetric, or loosen the filter: sysctl net.ipv4.conf.all.rp_filter",
            )
        case Cause.CONNTRACK_INVALID:
            return (
                "look for asymmetric routes, or packets beyond the TCP window: "
                "sysctl net.netfilter.nf_conntrack_tcp_be_liberal",
            )
        case _:
            return ()


def _policy_local(service: Service | None) -> tuple[str, ...]:
    price = "price: nodes without a ready endpoint drop, and load is uneven across pods"
    if service is None or service.load_balancer or service.type is ServiceType.LOAD_BALANCER:
        price += "; the load balancer must probe healthCheckNodePort"
    if service is None:
        return ("set externalTrafficPolicy: Local on the Service", price)
    patch = json.dumps({"spec": {"externalTrafficPolicy": "Local"}}, separators=(",", ":"))
    return (f"{_kubectl(service, 'patch', 'service', service.name, '-p', patch)}", price)


def _no_local_endpoint(match: Match, node: str) -> tuple[str, ...]:
    if not isinstance(match, ServiceMatch):
        return ()
    service = match.service
    if match.via is Via.CLUSTER_IP:
        return (
            f"run an endpoint of {service.key} on {node} (a DaemonSet), or set "
            "internalTrafficPolicy: Cluster",
        )
    health = service.health_check_node_port
    lines = [f"run an endpoint of {service.key} on {node}"]
    if health is not None:
        lines.append(
            f"or let the load balancer take out {node}: /healthz at port {health} there says 503"
        )
    else:
        lines.append(f"or send clients to nodes that have one, not to {node}")
    return tuple(lines)


def _owners_setting(rule: Rule | None, backend: str) -> tuple[str, ...]:
    if rule is None:
        return ("find the rule among the candidates, and its owner's setting",)
    setting = _SETTINGS.get(rule.owner)
    if setting:
        return (f"{rule.owner}: {setting}; the far side must then know the way back to pods",)
    whose = "the" if rule.owner is Owner.UNKNOWN else f"{rule.owner}'s"
    unknown = ", whose owner is not known" if rule.owner is Owner.UNKNOWN else ""
    return (
        f"leave {backend} out of {whose} rule in table {rule.table}, chain {rule.chain}{unknown}; "
        "the far side must then know the way back",
    )


def _cluster_ip(service: Service | None, version: int | None) -> str:
    if service is None:
        return ""
    addresses = [ip for ip in service.cluster_ips if version in (None, ip_address(ip).version)]
    return f" {' or '.join(map(str, addresses))}" if addresses else ""


def _kubectl(service: Service, *words: str) -> str:
    # Names come from the cluster: whoever pastes the line must not run more than it.
    return shlex.join(["kubectl", "--namespace", service.namespace, *words])
