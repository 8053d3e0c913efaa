"""Whether the cluster's objects are complete and current, for those that judge by them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """
    Whether the cluster's objects are complete and current.

    ``missing`` says what srcip is waiting for, None for nothing. ``age_s`` is None if nothing is
    watched.
    """

    missing: str | None = None
    age_s: float | None = None
    is_stale: bool = False
