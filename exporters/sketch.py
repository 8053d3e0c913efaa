"""A path as a picture shows it: stations from client to endpoint, and the packets between them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise

from exporters.path_words import declared_word, facts, headline, reasons, rule
from exporters.text import declared_text, endpoint, ends
from tracer.judge.path import Direction, Ending, Leg, Path, PathHop, Translated
from tracer.judge.verdict import Verdict
from tracer.model import ClientClass, FiveTuple, Hook


class Role(StrEnum):
    """What a station is."""

    CLIENT = "client"
    NODE = "node"
    DECLARED = "declared"  # a trusted proxy declares it
    UNSEEN = "unseen"  # it must be there, but was not traced
    ENDPOINT = "endpoint"


class Mark(StrEnum):
    """What happened at a station, as a picture marks it."""

    SNAT = "snat"
    DNAT = "dnat"
    CHANGED = "changed"
    KEPT = "kept"
    DROPPED = "dropped"

    @property
    def colour(self) -> str:
        """The name of its colour in a picture."""
        return _COLOURS[self]


_COLOURS = {
    Mark.SNAT: "yellow",
    Mark.DNAT: "cyan",
    Mark.CHANGED: "yellow",
    Mark.KEPT: "green",
    Mark.DROPPED: "red",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What a station did: ``text`` names the station, ``there`` is placed beside it."""

    mark: Mark
    text: str
    there: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """
    A box in the picture. ``detail`` is an address, or what is known in its place.

    If it ``has_name``, ``name`` is its name, otherwise its kind.
    """

    role: Role
    name: str
    detail: str = ""
    has_name: bool = True
    notes: tuple[Note, ...] = ()

    @property
    def drop(self) -> Note | None:
        """Why nothing leaves this station."""
        return next((note for note in self.notes if note.mark is Mark.DROPPED), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch:
    """
    The picture of a path, in words that are not escaped yet.

    ``wires`` are the packets between each pair of stations, None where they were not seen.
    ``facts`` and ``reasons`` (evidence and advice) are pairs of a label and a text. ``rule`` is
    that of the deciding node; the reasons name it, too. ``headline`` begins with the verdict.
    """

    verdict: Verdict
    headline: str
    stations: tuple[Station, ...]
    wires: tuple[FiveTuple | None, ...]
    facts: tuple[tuple[str, str], ...]
    rule: str | None
    reasons: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]


def sketch(path: Path) -> Sketch:
    """Draw up the picture of a path."""
    before = _before(path)
    after = _after(path)
    nodes = tuple(
        Station(role=Role.NODE, name=leg.node, notes=tuple(_notes(path, leg))) for leg in path.legs
    )
    wires: list[FiveTuple | None] = [None] * (len(before) - 1)
    wires += [leg.orig for leg in path.legs]
    wires += [path.backend] * len(after)
    return Sketch(
        verdict=path.verdict,
        headline=headline(path),
        stations=(*before, *nodes, *after),
        wires=tuple(wires),
        facts=tuple(facts(path)),
        rule=rule(path.deciding.opinion),
        reasons=tuple(reasons(path.deciding.opinion)),
        missing=path.missing,
    )


def _before(path: Path) -> tuple[Station, ...]:
    """Return the client, and what is between it and the first traced node."""
    first = path.legs[0]
    source = ends(path.orig)[0]
    word = declared_word(path)
    if word is not None and word.is_proxied and word.client is not None:
        client = declared_text(word.client)
        stations = [_nameless(Role.DECLARED, "client", client)]
        if word.by not in (None, word.peer):
            stations.append(_nameless(Role.DECLARED, "proxy", str(word.by)))
        return *stations, _nameless(Role.CLIENT, "proxy", source)
    nobody = _nameless(Role.UNSEEN, "client", "not known")
    match first.verdict:
        case Verdict.REPLACED_UPSTREAM:
            text = "SNAT before the first traced node"
            note = Note(mark=Mark.SNAT, text=text, there=text)
            return nobody, replace(_nameless(Role.UNSEEN, "node", source), notes=(note,))
        case Verdict.PROXIED:
            return nobody, _nameless(Role.CLIENT, "proxy", source)
    pod = _client_pod(first)
    if pod is not None:
        return (Station(role=Role.CLIENT, name=pod, detail=source),)
    return (_nameless(Role.CLIENT, _client_kind(first), source),)


def _nameless(role: Role, what: str, detail: str) -> Station:
    return Station(role=role, name=what, detail=detail, has_name=False)


def _client_pod(first: Leg) -> str | None:
    """Return the pod behind the interface on which the first packet came in."""
    hop = _first_hop(first)
    if hop is None or hop.hop.hook is not Hook.TC_INGRESS or not hop.device or not hop.device.pod:
        return None
    return f"{hop.device.pod.namespace}/{hop.device.pod.name}"


def _client_kind(first: Leg) -> str:
    hop = _first_hop(first)
    if hop is not None and hop.hop.hook is Hook.NF_OUTPUT:
        return "process"
    match first.opinion.client_class if first.opinion else None:
        case ClientClass.POD:
            return "pod"
        case ClientClass.NODE:
            return "node"
        case ClientClass.LOADBALANCER:
            return "load balancer"
        case ClientClass.LOOPBACK:
            return "process"
    return "client"


def _first_hop(first: Leg) -> PathHop | None:
    passage = first.passage(Direction.ORIGINAL)
    return passage.hops[0] if passage and passage.hops else None


def _after(path: Path) -> tuple[Station, ...]:
    """Return the endpoint, preceded by its node if that is known but was not traced."""
    last = path.legs[-1]
    if path.drop is not None:
        return ()
    passage = last.passage(Direction.ORIGINAL)
    detail = ends(path.backend)[1] if path.backend else "not known"
    if passage is not None and passage.ending is Ending.DELIVERED:
        return (_nameless(Role.ENDPOINT, "process", detail),)
    pod = last.judged.backend_pod if last.judged else None
    if pod is None:
        return (_nameless(Role.ENDPOINT, "endpoint", detail),)
    end = Station(role=Role.ENDPOINT, name=f"{pod.namespace}/{pod.name}", detail=detail)
    if pod.node in (None, last.node):
        return (end,)
    return Station(role=Role.UNSEEN, name=pod.node or "", detail="not seen"), end


def _notes(path: Path, leg: Leg) -> Iterator[Note]:
    """Yield what a node did to the first packet."""
    passage = leg.passage(Direction.ORIGINAL)
    hops = passage.hops if passage else ()
    if (to := _translated(hops, Translated.DNAT)) or _is_dnat(leg):
        to = to or (ends(leg.reply)[0] if leg.reply else "")
        yield Note(mark=Mark.DNAT, text=f"DNAT at {leg.node}", there=f"DNAT to {to}")
    if (to := _translated(hops, Translated.SNAT)) or _is_snat(leg):
        to = to or (ends(leg.reply)[1] if leg.reply else "")
        yield Note(mark=Mark.SNAT, text=f"SNAT at {leg.node}", there=f"SNAT to {to}")
    for text in _changes(hops):
        yield Note(mark=Mark.CHANGED, text=text, there=text)
    if leg.drop is not None:
        text = f"dropped, {leg.drop.opinion.cause or leg.drop.reason}"
        yield Note(mark=Mark.DROPPED, text=text, there=text)
    if leg is path.legs[-1] and path.verdict is Verdict.PRESERVED:
        yield Note(mark=Mark.KEPT, text="source kept", there="source kept")


def _is_dnat(leg: Leg) -> bool:
    return leg.reply is not None and leg.reply.src != leg.orig.dst


def _is_snat(leg: Leg) -> bool:
    return leg.reply is not None and leg.reply.dst != leg.orig.src


def _translated(hops: Sequence[PathHop], by: Translated) -> str:
    """Return what an address was translated to, as the hops saw it; empty if they did not."""
    found = [change.after for hop in hops for change in hop.translations if change.by is by]
    return endpoint(*found[-1]) if found else ""


def _changes(hops: Sequence[PathHop]) -> Iterator[str]:
    for earlier, later in pairwise(hops):
        if any(change.by is Translated.OTHER for change in later.translations):
            yield (
                f"changed between {place_text(earlier)} and {place_text(later)}, not by netfilter"
            )


def place_text(path_hop: PathHop) -> str:
    """Return a hop's hook, with its side of NAT or its interface."""
    hop, device = path_hop.hop, path_hop.device
    if hop.hook in (Hook.TC_INGRESS, Hook.TC_EGRESS):
        return f"{hop.hook.label} {device.name if device else 'of an unknown interface'}"
    # Nothing is translated at forward.
    if hop.is_after_nat is None or hop.hook is Hook.NF_FORWARD:
        return hop.hook.label
    return f"{hop.hook.label} {'after' if hop.is_after_nat else 'before'} NAT"
