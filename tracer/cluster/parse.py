"""Parse Kubernetes JSON into objects. It is not trusted: errors name the field that is wrong."""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import TypeVar

from tracer.cluster.errors import ClusterError
from tracer.cluster.fields import Fields, shown
from tracer.cluster.objects import (
    Endpoint,
    EndpointSlice,
    HostPort,
    LoadBalancerAddress,
    Node,
    Object,
    Pod,
    Policy,
    Service,
    ServicePort,
    ServiceType,
    SessionAffinity,
    SlicePort,
)
from tracer.model import SCTP, TCP, UDP, IPAddress

_PROTOCOLS = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}
_FAMILIES = {"IPv4": "ipv4", "IPv6": "ipv6"}
_SERVICE_NAME = "kubernetes.io/service-name"
# A Node's other address types are host names.
# In the order in which kube-proxy prefers them (GetNodeHostIPs in pkg/util/node).
_NODE_ADDRESSES = ("InternalIP", "ExternalIP")
_ENDED = {"Succeeded", "Failed"}

_Choice = TypeVar("_Choice", bound=StrEnum)


def parse(obj: Mapping[str, object]) -> Object | None:
    """
    Parse one object as the API server or ``kubectl -o json`` prints it.

    Args:
        obj: The JSON object.

    Returns:
        The object, or None for kinds and EndpointSlice address types that srcip does not use.

    Raises:
        ClusterError: A field has another type or value than the API allows.
    """
    kind = obj.get("kind") if isinstance(obj, dict) else None
    if not isinstance(kind, str):
        raise ClusterError("not a Kubernetes object: it has no kind")
    reader = _READERS.get((_group(obj.get("apiVersion")), kind))
    if reader is None:
        return None
    fields = Fields(obj, where=_where(kind, obj))
    metadata = fields.member("metadata")
    name = metadata.required_name("name")
    namespace = None if kind == "Node" else metadata.required_name("namespace")
    return reader(fields, namespace or "", name)


def _group(version: object) -> str:
    # Items of the API server's lists have no apiVersion of their own.
    if version is None:
        return ""
    text = version if isinstance(version, str) else "?"
    return text.rpartition("/")[0] or ("" if text == "v1" else "?")


def _where(kind: str, obj: Mapping[str, object]) -> str:
    metadata = obj.get("metadata")
    if not isinstance(metadata, dict):
        return kind
    names = [metadata.get("namespace"), metadata.get("name")]
    return f"{kind} " + "/".join(
        name if isinstance(name, str) and name.isprintable() and len(name) < 254 else shown(name)
        for name in names
        if name is not None
    )


def _service(fields: Fields, namespace: str, name: str) -> Service:
    spec = fields.member("spec")
    kind = _choice(spec, "type", ServiceType, ServiceType.CLUSTER_IP)
    cluster_ips, is_headless = _cluster_ips(spec)
    external_ips = spec.addresses("externalIPs")
    return Service(
        namespace=namespace,
        name=name,
        type=kind,
        cluster_ips=cluster_ips,
        external_ips=external_ips,
        load_balancer=_load_balancer(fields),
        ports=tuple([_service_port(port) for port in spec.members("ports")]),
        external_policy=_external_policy(spec, kind, has_external_ips=bool(external_ips)),
        internal_policy=_choice(spec, "internalTrafficPolicy", Policy, Policy.CLUSTER),
        session_affinity=_choice(spec, "sessionAffinity", SessionAffinity, SessionAffinity.NONE),
        source_ranges=spec.networks("loadBalancerSourceRanges"),
        health_check_node_port=spec.number("healthCheckNodePort"),
        is_headless=is_headless and kind is not ServiceType.EXTERNAL_NAME,
        external_name=spec.name("externalName") if kind is ServiceType.EXTERNAL_NAME else None,
    )


def _cluster_ips(spec: Fields) -> tuple[tuple[IPAddress, ...], bool]:
    texts = spec.texts("clusterIPs")
    key = "clusterIPs" if texts else "clusterIP"
    texts = texts or (spec.text("clusterIP"),)
    if "None" in texts:
        return (), True
    if not any(texts):
        return (), False
    if key == "clusterIPs":
        return spec.addresses(key), False
    address = spec.address(key)
    return (() if address is None else (address,)), False


def _external_policy(spec: Fields, kind: ServiceType, *, has_external_ips: bool) -> Policy | None:
    # The API server sets the policy only on Services that can be reached from outside
    # (SetDefaults_Service of pkg/apis/core/v1/defaults.go).
    if has_external_ips or kind in (ServiceType.NODE_PORT, ServiceType.LOAD_BALANCER):
        return _choice(spec, "externalTrafficPolicy", Policy, Policy.CLUSTER)
    return None


def _load_balancer(fields: Fields) -> tuple[LoadBalancerAddress, ...]:
    ingress = fields.member("status").member("loadBalancer").members("ingress")
    found = ((item.address("ip"), item.text("ipMode", "VIP")) for item in ingress)
    return tuple(
        [
            LoadBalancerAddress(address=address, is_proxy=mode == "Proxy")
            for address, mode in found
            if address is not None
        ]
    )


def _service_port(port: Fields) -> ServicePort:
    target = port.raw("targetPort")
    return ServicePort(
        name=port.name("name"),
        proto=_protocol(port),
        port=port.required_number("port"),
        node_port=port.number("nodePort"),
        target_port=port.name("targetPort")
        if isinstance(target, str)
        else port.number("targetPort"),
    )


def _endpoint_slice(fields: Fields, namespace: str, name: str) -> EndpointSlice | None:
    family = _FAMILIES.get(fields.text("addressType"))
    if family is None:
        if fields.text("addressType") == "FQDN":
            return None
        raise fields.error("addressType", "IPv4, IPv6 or FQDN")
    labels = fields.member("metadata").member("labels")
    return EndpointSlice(
        namespace=namespace,
        name=name,
        service=labels.name(_SERVICE_NAME),
        family=family,
        ports=_slice_ports(fields),
        endpoints=tuple(
            [_endpoint(item, namespace, family) for item in fields.members("endpoints")]
        ),
    )


def _slice_ports(fields: Fields) -> tuple[SlicePort, ...]:
    found = [(port, port.number("port")) for port in fields.members("ports")]
    # A port without a number means "all ports"; kube-proxy skips it (endpointslicecache.go).
    return tuple(
        [
            SlicePort(port.name("name"), _protocol(port), number)
            for port, number in found
            if number is not None
        ]
    )


def _endpoint(fields: Fields, namespace: str, family: str) -> Endpoint:
    addresses = fields.addresses("addresses")
    if not addresses or any(address.version != int(family[-1]) for address in addresses):
        raise fields.error("addresses", f"{family} addresses")
    conditions = fields.member("conditions")
    is_ready = conditions.flag("ready", default=True)
    return Endpoint(
        addresses=addresses,
        node=fields.name("nodeName"),
        pod=_target(fields.member("targetRef"), namespace),
        is_ready=is_ready,
        is_serving=conditions.flag("serving", default=is_ready),
        is_terminating=conditions.flag("terminating", default=False),
    )


def _target(ref: Fields, namespace: str) -> tuple[str, str] | None:
    if ref.text("kind") != "Pod":
        return None
    # Endpoints are of the slice's own namespace.
    return ref.name("namespace") or namespace, ref.required_name("name")


def _node(fields: Fields, _namespace: str, name: str) -> Node:
    spec = fields.member("spec")
    found = list(fields.member("status").members("addresses"))
    addresses = (
        item.address("address")
        for kind in _NODE_ADDRESSES
        for item in found
        if item.text("type") == kind
    )
    cidrs = spec.networks("podCIDRs")
    if not cidrs and spec.text("podCIDR"):
        cidrs = (spec.network("podCIDR"),)
    return Node(
        name=name,
        addresses=tuple(dict.fromkeys([item for item in addresses if item is not None])),
        pod_cidrs=cidrs,
    )


def _pod(fields: Fields, namespace: str, name: str) -> Pod:
    spec, status = fields.member("spec"), fields.member("status")
    has_ended = status.text("phase") in _ENDED
    return Pod(
        namespace=namespace,
        name=name,
        ips=() if has_ended else _pod_ips(status),
        node=spec.name("nodeName"),
        is_host_network=spec.flag("hostNetwork", default=False),
        host_ports=() if has_ended else _host_ports(spec),
    )


def _pod_ips(status: Fields) -> tuple[IPAddress, ...]:
    found = [item.address("ip") for item in status.members("podIPs")]
    found = found or [status.address("podIP")]
    return tuple([address for address in found if address is not None])


def _host_ports(spec: Fields) -> tuple[HostPort, ...]:
    # A sidecar is an init container that keeps running, so its ports count, too.
    return tuple(
        [
            _host_port(port)
            for containers in ("containers", "initContainers")
            for container in spec.members(containers)
            for port in container.members("ports")
            if port.number("hostPort") is not None
        ]
    )


def _host_port(port: Fields) -> HostPort:
    address = port.address("hostIP")
    return HostPort(
        address=None if address is None or address.is_unspecified else address,
        port=port.required_number("hostPort"),
        proto=_protocol(port),
        container_port=port.required_number("containerPort"),
    )


def _protocol(port: Fields) -> int:
    number = _PROTOCOLS.get(port.text("protocol", "TCP"))
    if number is None:
        raise port.error("protocol", "TCP, UDP or SCTP")
    return number


def _choice(fields: Fields, key: str, choices: type[_Choice], default: _Choice) -> _Choice:
    text = fields.text(key)
    try:
        return choices(text) if text else default
    except ValueError:
        raise fields.error(key, " or ".join(choices)) from None


_READERS: dict[tuple[str, str], Callable[[Fields, str, str], Object | None]] = {
    ("", "Service"): _service,
    ("", "Node"): _node,
    ("", "Pod"): _pod,
    ("discovery.k8s.io", "EndpointSlice"): _endpoint_slice,
}
