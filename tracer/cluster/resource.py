"""The Kubernetes resources that srcip watches or creates, as the API names them."""

from dataclasses import dataclass

from tracer.cluster.claims import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """
    A resource to watch.

    ``group`` is the API group, empty for the core group; ``kind`` is that of its objects.
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
        """The ClusterRole rule that permits watching it."""
        return (
            f'{{apiGroups: ["{self.group}"], resources: ["{self.plural}"],'
            ' verbs: ["list", "watch"]}'
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """A review to create: the API server answers in its ``status`` and does not store it."""

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
        """The ClusterRole rule that permits creating it."""
        return f'{{apiGroups: ["{self.group}"], resources: ["{self.plural}"], verbs: ["create"]}}'


def resources(node: str | None) -> tuple[Resource, ...]:
    """
    Return what a tracer watches: all Nodes, Services and EndpointSlices, and its own node's Pods.

    EndpointSlices already name the other nodes' pods, so that not every agent has to watch every
    Pod. Without a node no Pods are watched.
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
