"""Kubernetes objects as JSON, for tests to vary."""


def node(name="node1", addresses=("10.240.0.3",), cidrs=("10.244.1.0/24",)):
    return {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {"name": name},
        "spec": {"podCIDR": cidrs[0] if cidrs else "", "podCIDRs": list(cidrs)},
        "status": {
            "addresses": [{"type": "InternalIP", "address": item} for item in addresses]
            + [{"type": "Hostname", "address": name}]
        },
    }


def service(name="web", namespace="default", *, ports=None, status=None, **spec):
    spec.setdefault("clusterIPs", ["10.0.0.10"])
    spec["ports"] = [{"name": "http", "port": 80, "protocol": "TCP"}] if ports is None else ports
    return {
        "kind": "Service",
        "apiVersion": "v1",
        "metadata": {"namespace": namespace, "name": name},
        "spec": spec,
        "status": status or {},
    }


def balanced(*addresses, mode="VIP"):
    ingress = [{"ip": address, "ipMode": mode} for address in addresses]
    return {"loadBalancer": {"ingress": ingress}}


def endpoint(address="10.244.1.11", node="node1", pod="p1", namespace="default", **conditions):
    conditions = {f"{key}": value for key, value in conditions.items()}
    found = {"addresses": [address], "conditions": conditions}
    if node:
        found["nodeName"] = node
    if pod:
        found["targetRef"] = {"kind": "Pod", "namespace": namespace, "name": pod}
    return found


def slice_of(service="web", *endpoints, name=None, namespace="default", family="IPv4", ports=None):
    return {
        "kind": "EndpointSlice",
        "apiVersion": "discovery.k8s.io/v1",
        "metadata": {
            "namespace": namespace,
            "name": name or f"{service}-1",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": family,
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}] if ports is None else ports,
        "endpoints": list(endpoints),
    }


def pod(name="p1", ips=("10.244.1.11",), node="node1", *, namespace="default", ports=(), **more):
    phase = more.pop("phase", "Running")
    return {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {"nodeName": node, "containers": [{"ports": list(ports)}], **more},
        "status": {"phase": phase, "podIPs": [{"ip": item} for item in ips]},
    }
