"""Why the backend does not see the client's address: the causes, and what each means."""

from enum import StrEnum


class Cause(StrEnum):
    """A cause in the terms of Kubernetes; `MEANINGS` explains each."""

    EXTERNAL_TRAFFIC_POLICY_CLUSTER = "external-traffic-policy-cluster"
    OFF_CLUSTER_SOURCE = "off-cluster-source"
    MASQUERADE_ALL = "masquerade-all"
    HAIRPIN = "hairpin"
    NODE_LOCAL_SOURCE = "node-local-source"
    LOCALHOST_NODEPORT = "localhost-nodeport"
    POD_EGRESS = "pod-egress"
    IPVS_MASQUERADE = "ipvs-masquerade"
    OTHER_RULE = "other-rule"
    LOAD_BALANCER_PROXY = "load-balancer-proxy"
    NO_LOCAL_ENDPOINT = "no-local-endpoint"
    NO_ENDPOINTS = "no-endpoints"
    SOURCE_RANGES = "source-ranges"
    NO_LISTENER = "no-listener"
    CONNTRACK_INVALID = "conntrack-invalid"
    RP_FILTER = "rp-filter"
    NETFILTER_DROP = "netfilter-drop"


# Causes of kube-proxy's own masquerade in modes other than IPVS.
OF_KUBE_PROXY = frozenset(
    {Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER, Cause.OFF_CLUSTER_SOURCE, Cause.NODE_LOCAL_SOURCE}
)

MEANINGS: dict[Cause, str] = {
    Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER: (
        "The Service was reached from outside through a NodePort, load-balancer or external "
        "address, and its externalTrafficPolicy is Cluster: kube-proxy may send the connection to "
        "any node, so it masquerades, even when the endpoint is on this node."
    ),
    Cause.OFF_CLUSTER_SOURCE: (
        "A ClusterIP was reached from an address outside the ranges that kube-proxy takes for pods."
    ),
    Cause.MASQUERADE_ALL: (
        "kube-proxy runs with masqueradeAll: it masquerades every connection to a ClusterIP."
    ),
    Cause.HAIRPIN: (
        "A pod reached itself through its own Service. With its own address as source, the reply "
        "would never leave the pod, and the node could not translate it back."
    ),
    Cause.NODE_LOCAL_SOURCE: (
        "A process on the node reached a NodePort, load-balancer or external address of a Service."
    ),
    Cause.LOCALHOST_NODEPORT: (
        "A NodePort was reached on a loopback address, to which no backend could reply."
    ),
    Cause.POD_EGRESS: (
        "A pod reached an address outside the cluster, where there is usually no route back to "
        "pods: the network plugin, an ip-masq-agent or the cloud masquerades."
    ),
    Cause.IPVS_MASQUERADE: "kube-proxy runs in IPVS mode and masqueraded the connection.",
    Cause.OTHER_RULE: "A rule that is not kube-proxy's replaced the source.",
    Cause.LOAD_BALANCER_PROXY: (
        "The peer is a load balancer or proxy that terminated the client's connection and opened "
        "its own to the backend."
    ),
    Cause.NO_LOCAL_ENDPOINT: (
        "The Service's policy for this traffic is Local, and this node has no ready endpoint: "
        "kube-proxy drops the traffic. In IPVS mode it forwards it to another node, whose replies "
        "do not return this way: the client ignores them."
    ),
    Cause.NO_ENDPOINTS: (
        "The Service has no ready endpoint on any node: kube-proxy rejects its traffic."
    ),
    Cause.SOURCE_RANGES: "The client is not in the Service's loadBalancerSourceRanges.",
    Cause.NO_LISTENER: "No socket listens there, and no Service translates the address.",
    Cause.CONNTRACK_INVALID: (
        "Conntrack classified the packet as INVALID, and a rule drops invalid packets."
    ),
    Cause.RP_FILTER: (
        "Replies to the packet's source would leave through another interface, so the kernel's "
        "reverse path filter (rp_filter) dropped the packet."
    ),
    Cause.NETFILTER_DROP: "A netfilter rule or policy dropped the packet.",
}
