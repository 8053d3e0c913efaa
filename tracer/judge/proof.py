"""What the legs of a path prove: one node's guess is another node's certainty."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from tracer.judge.lines import Lines
from tracer.judge.path import Leg
from tracer.judge.verdict import Opinion, SeenAccept, Verdict
from tracer.model import FiveTuple

_GUESSES = (Verdict.REPLACED_UPSTREAM, Verdict.PRESERVED)


def proved(legs: Sequence[Leg], accept: SeenAccept | None) -> tuple[Leg, ...]:
    """
    Return the legs with what they prove about each other.

    A node that saw only another node's address guesses which client it hides, and why. If that
    other node was traced, its verdict counts: for the cause, and also if it replaced nothing. And
    for the node that replaced the source, the next one shows what it received.

    Args:
        legs: The legs of one path, in the order of the original direction.
        accept: What the backend's socket accepted.
    """
    found = list(legs)
    for i, leg in enumerate(legs):
        told = _by_those_before(legs[:i], leg)
        if told is not None:
            found[i] = _with(leg, told)
        elif leg.verdict in (Verdict.REPLACED, Verdict.PRESERVED):
            received = legs[i + 1] if i + 1 < len(legs) else None
            lines = _shown(received, accept if received is None else None)
            if lines is not None and leg.opinion is not None and leg.drop is None:
                found[i] = _with(leg, _more(leg.opinion, lines))
    return tuple(found)


def _by_those_before(before: Sequence[Leg], leg: Leg) -> Opinion | None:
    """Return a leg's opinion as corrected by the nodes before it; None if it stays."""
    own = leg.opinion
    if own is None or leg.verdict not in _GUESSES:
        return None
    replaced = [each for each in before if each.verdict is Verdict.REPLACED]
    if replaced:
        return _replaced_by(replaced[-1], leg, own)
    is_kept = before and all(each.verdict is Verdict.PRESERVED for each in before)
    if is_kept and leg.verdict is Verdict.REPLACED_UPSTREAM:
        node, source = before[0].node, leg.orig.src
        return replace(
            own,
            verdict=Verdict.PRESERVED,
            cause=None,
            evidence=(
                f"proof: {node} did not replace the source {source}: the client is that node "
                "itself",
            ),
            advice=(),
        )
    return None


def _replaced_by(word: Leg, leg: Leg, own: Opinion) -> Opinion:
    said = word.opinion or own
    return replace(
        own,
        verdict=Verdict.REPLACED_UPSTREAM,
        cause=said.cause,
        service=said.service or own.service,
        evidence=Lines(
            lambda: (
                f"the source {leg.orig.src} is not the client's, and this node did not replace it",
                f"proof: {word.node} received the connection from {_source(word.orig)} and sent it "
                f"on from {_source(leg.orig)}" + (f" ({said.cause})" if said.cause else ""),
            )
        ),
        advice=said.advice,
    )


def _shown(received: Leg | None, accept: SeenAccept | None) -> Callable[[], str] | None:
    """Return the line that says who received what a node sent on; None if that is not known."""
    if received is not None:
        return lambda: (
            f"proof: {received.node} received the connection from {_source(received.orig)}"
        )
    if accept is not None:
        peer = accept.accept.peer
        return lambda: f"proof: the backend's socket accepted the connection from {_source(peer)}"
    return None


def _more(opinion: Opinion, line: Callable[[], str]) -> Opinion:
    return replace(opinion, evidence=Lines(lambda: (*opinion.evidence, line())))


def _with(leg: Leg, opinion: Opinion) -> Leg:
    if leg.judged is None:
        return leg
    return replace(leg, judged=replace(leg.judged, opinion=opinion))


def _source(flow: FiveTuple) -> str:
    return str(flow.src) if flow.is_icmp else f"{flow.src} port {flow.sport}"
