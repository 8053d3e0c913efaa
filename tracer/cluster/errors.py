"""Errors of the cluster index and its sources."""

from tracer.errors import TracerError


class ClusterError(TracerError):
    """Kubernetes objects cannot be read, fetched or understood."""
