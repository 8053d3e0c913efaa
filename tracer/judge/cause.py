"""Why a source is not what the client's was: the causes, and what each means."""

from enum import StrEnum


class Cause(StrEnum):
    """A cause in Kubernetes' words. What each means is in `MEANINGS`."""

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


# kube-proxy's own masquerade, as it is called where it does not run in IPVS mode.
OF_KUBE_PROXY = frozenset(
    {Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER, Cause.OFF_CLUSTER_SOURCE, Cause.NODE_LOCAL_SOURCE}
)

MEANINGS: dict[Cause, str] = {
    Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER: (
        "The Service was reached from outside by a NodePort, load-balancer or external address, "
        "and its externalTrafficPolicy is Cluster: kube-proxy may send the connection to any "
        "node, so it masquerades, even when the endpoint is on this node."
    ),
    Cause.OFF_CLUSTER_SOURCE: (
        "A ClusterIP was reached from an address outside the range that kube-proxy takes for pods."
    ),
    Cause.MASQUERADE_ALL: "kube-proxy runs with masqueradeAll: it masquerades every connection.",
    Cause.HAIRPIN: (
        "A pod reached itself through its own Service. Without another source the answer would "
        "never pass the node that has to translate it back."
    ),
    Cause.NODE_LOCAL_SOURCE: (
        "A process of the node reached a NodePort, load-balancer or external address."
    ),
    Cause.LOCALHOST_NODEPORT: (
        "A NodePort was reached on a loopback address, which no other host could answer to."
    ),
    Cause.POD_EGRESS: (
        "A pod reached an address outside the cluster, which does not know the way to pods: the "
        "network plugin, an ip-masq-agent or the cloud masquerades."
    ),
    Cause.IPVS_MASQUERADE: "kube-proxy runs in IPVS mode and masqueraded the connection.",
    Cause.OTHER_RULE: "A rule that is not kube-proxy's replaced the source.",
    Cause.LOAD_BALANCER_PROXY: (
        "The peer is a load balancer or proxy that ended the client's connection and opened one of "
        "its own."
    ),
    Cause.NO_LOCAL_ENDPOINT: (
        "The Service's policy for this traffic is Local, and this node has no ready endpoint: "
        "kube-proxy drops what arrives here. In IPVS mode it sends it on to another node, whose "
        "answers do not come back this way: the client takes none of them."
    ),
    Cause.NO_ENDPOINTS: "The Service has no ready endpoint anywhere: kube-proxy refuses.",
    Cause.SOURCE_RANGES: "The client is not in the Service's loadBalancerSourceRanges.",
    Cause.NO_LISTENER: "Nobody listens there, and no Service translates the address.",
    Cause.CONNTRACK_INVALID: "Conntrack could not make sense of the packet, and a rule drops such.",
    Cause.RP_FILTER: (
        "Answers to the packet's source would leave by another interface (rp_filter), so the "
        "kernel discarded it."
    ),
    Cause.NETFILTER_DROP: "A netfilter rule or policy discarded the packet.",
}
