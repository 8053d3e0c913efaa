"""The Kubernetes resources that are watched, as the API names them."""

from dataclasses import dataclass

from tracer.cluster.claims import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """
    Something to watch.

    ``group`` is the API group, empty for the core one; ``kind`` as in the API's objects.
    """

    group: str
    plural: str
    kind: str
    index_kind: Kind
    field_selector: str | None = None

    @property
    def path(self) -> str:
        """The collection's URL path."""
        return f"/apis/{self.group}/v1/{self.plural}" if self.group else f"/api/v1/{self.plural}"

    @property
    def api_version(self) -> str:
        """The ``apiVersion`` of its objects."""
        return f"{self.group}/v1" if self.group else "v1"

    @property
    def rule(self) -> str:
        """The line of a ClusterRole that lets it be watched."""
        return (
            f'{{apiGroups: ["{self.group}"], resources: ["{self.plural}"],'
            ' verbs: ["list", "watch"]}'
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """A question to the API server: it is created, answered by its ``status``, and not stored."""

    group: str
    plural: str
    kind: str

    @property
    def path(self) -> str:
        """The URL path."""
        return f"/apis/{self.group}/v1/{self.plural}"

    @property
    def api_version(self) -> str:
        """Its ``apiVersion``."""
        return f"{self.group}/v1"

    @property
    def rule(self) -> str:
        """The line of a ClusterRole that lets it be asked."""
        return f'{{apiGroups: ["{self.group}"], resources: ["{self.plural}"], verbs: ["create"]}}'


def resources(node: str | None) -> tuple[Resource, ...]:
    """
    Return what an agent watches: all Nodes, Services and EndpointSlices, and its own node's Pods.

    EndpointSlices name nodes and pods already, so the size of the cluster does not multiply
    the load on the API server. Without a node no Pods are watched.
    """
    nodes = Resource(group="", plural="nodes", kind="Node", index_kind=Kind.NODE)
    found = (
        nodes,
        Resource(group="", plural="services", kind="Service", index_kind=Kind.SERVICE),
        Resource(
            group="discovery.k8s.io",
            plural="endpointslices",
            kind="EndpointSlice",
            index_kind=Kind.ENDPOINT_SLICE,
        ),
    )
    if node is None:
        return found
    selector = f"spec.nodeName={node}"
    pods = Resource(
        group="", plural="pods", kind="Pod", index_kind=Kind.POD, field_selector=selector
    )
    return (*found, pods)
