"""
The verdict on all connections under one path key: the kernel keeps only a count and a sample.

The judge of connections judges the sample, with the key's values in place of the sample's client
and destination where these are one of many.
"""

from dataclasses import dataclass, fields, replace

from tracer.cluster.match import HostPortMatch, ServiceMatch, Via
from tracer.judge.connection import judge_connection
from tracer.judge.verdict import Opinion
from tracer.judge.view import View
from tracer.model import (
    AddressFlag,
    ClientClass,
    Connection,
    FiveTuple,
    Hook,
    IPAddress,
    PathKey,
    Status,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedPath:
    """What became of the source on a path. ``via`` is NONE if no known Service was addressed."""

    opinion: Opinion
    via: Via


def judge_path(key: PathKey, sample: Connection, view: View) -> JudgedPath:
    """
    Judge all connections of a path.

    The opinion is what `judge_connection` gives for each of them; where they differ in what the
    key does not hold, the cause or the Service is None.

    Args:
        key: The path.
        sample: Any connection that was counted under the key.
        view: The node that holds it, and the cluster now.
    """
    told = _PathView(
        **{each.name: getattr(view, each.name) for each in fields(View)},
        key=key,
        client=sample.orig.src,
    )
    judged = judge_connection(_of_path(key, sample, view), told, time_ns=0)
    return JudgedPath(opinion=judged.opinion, via=_via(key, sample, told))


def is_typical(key: PathKey, sample: Connection, view: View) -> bool:
    """Whether the node now classifies a sample's client as the key does."""
    source = sample.orig.src
    return (
        (view.classify(source) or ClientClass.EXTERNAL) is key.client_class
        and view.is_here(source) == bool(key.client_flags & AddressFlag.HERE)
        and is_in_cluster_range(source, view) == bool(key.client_flags & AddressFlag.CLUSTER)
    )


def is_in_cluster_range(address: IPAddress, view: View) -> bool:
    """Whether an address is in the pod ranges of kube-proxy's rules, if they have any."""
    return any(address in cidr for cidr in (view.rules.cluster_cidrs if view.rules else ()))


def surroundings(key: PathKey, sample: Connection, view: View) -> tuple[object, ...]:
    """
    Return all that the opinion on a path can depend on besides the path itself.

    Much cheaper than the opinion: while this stays equal, so does the opinion.
    """
    orig, reply = sample.orig, sample.reply
    has_cluster = view.cluster is not None
    is_node = key.client_class is ClientClass.NODE
    return (
        *(has_cluster, view.node, view.mode, view.masquerade_mark),
        *(view.rules, view.addresses, view.interfaces),
        is_typical(key, sample, view),
        view.match(orig) if key.dst is not None else None,
        view.classify(reply.src),
        view.node_at(reply.src),
        view.behind(reply.src, reply.sport, reply.proto) if is_node else (),
    )


def _of_path(key: PathKey, sample: Connection, view: View) -> Connection:
    """Return the sample with the mark and status that all connections of the path share."""
    mark = None
    if key.is_marked is not None:
        others = (sample.mark or 0) & ~view.masquerade_mark
        mark = others | view.masquerade_mark if key.is_marked else others
    others = sample.status & ~Status.SRC_NAT
    return replace(
        sample,
        mark=mark,
        status=others | Status.SRC_NAT if key.has_snat_status else others,
        hook=Hook.NF_INPUT if key.is_input else Hook.NF_POSTROUTING,
    )


def _via(key: PathKey, sample: Connection, view: View) -> Via:
    match = view.match(sample.orig)
    if isinstance(match, ServiceMatch | HostPortMatch):
        return Via(match.via)
    return Via.POD if key.dst_class is ClientClass.POD and key.backend is None else Via.NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class _PathView(View):
    """A view in which the key decides about the client, and about what it leaves open."""

    key: PathKey
    client: IPAddress

    def is_here(self, address: IPAddress) -> bool:
        if address == self.client:
            return bool(self.key.client_flags & AddressFlag.HERE)
        return View.is_here(self, address)

    def classify(self, address: IPAddress) -> ClientClass | None:
        if address != self.client:
            return View.classify(self, address)
        if self.cluster is None and self.key.client_class is ClientClass.EXTERNAL:
            return None
        return self.key.client_class

    def match(self, flow: FiveTuple) -> ServiceMatch | HostPortMatch | None:
        # If the key has no destination or no port, the sample's is one of many.
        key = self.key
        if key.dst is None or (key.backend is None and key.is_input):
            return None
        return View.match(self, flow)

    def is_cluster_source(self, address: IPAddress) -> bool | None:
        if address != self.client:
            return View.is_cluster_source(self, address)
        cidrs = self.rules.cluster_cidrs if self.rules is not None else ()
        if any(cidr.version == address.version for cidr in cidrs):
            return bool(self.key.client_flags & AddressFlag.CLUSTER)
        found = self.classify(address)
        return None if found is None else found is ClientClass.POD
