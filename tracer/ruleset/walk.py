"""
Walks the rules that a packet may meet, as netfilter does, with three-valued matches.

The walk follows every branch that cannot be ruled out, so its result contains the rule that really
matched. Facts about netfilter are from the kernel's nf_tables_core.c (nft_do_chain),
ip_tables.c (ipt_do_table), nf_nat_core.c (nf_nat_inet_fn) and nf_hook_slow.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby

from tracer.ruleset.flow import Flow
from tracer.ruleset.program import (
    DSTNAT,
    SRCNAT,
    BaseChain,
    Entry,
    Finish,
    Jump,
    Lookup,
    Op,
    Perhaps,
    SetConnectionMark,
    SetMark,
    Step,
    Verdict,
    telling_rules,
)
from tracer.ruleset.rule import Rule
from tracer.ruleset.truth import ALL_BITS, Bits, Truth
from tracer.ruleset.view import View

# With 10,000 Services the longest chain has tens of thousands of rules. More steps than this mean
# that branches multiply.
_MAX_STEPS = 200_000
# The kernel allows 16 jumps (NFT_JUMP_STACK_SIZE); legacy iptables allows more than anyone uses.
_MAX_DEPTH = 64


class _TooFarError(Exception):
    """The walk would take too long, or runs in a loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Walked:
    """
    The rules that may have ended the walk, in order.

    ``may_pass`` is whether the packet may have met none of them; ``is_complete`` whether the
    walk could be finished.
    """

    rules: tuple[Rule, ...]
    may_pass: bool
    is_complete: bool = True


@dataclass(slots=True)
class _Walk:
    """The state of a walk."""

    flow: Flow
    ct_mark: Bits
    wants_drops: bool
    rules: dict[Rule, None] = field(default_factory=dict)
    steps: int = 0


@dataclass(frozen=True, slots=True)
class _Out:
    """How a packet may leave a chain, with its mark; None where it cannot."""

    end: Bits | None
    accepted: Bits | None


def walk(base_chains: Iterable[BaseChain], flow: Flow, *, wants_drops: bool) -> Walked:
    """
    Walk base chains of one hook.

    Args:
        base_chains: The base chains that the packet meets, in any order.
        flow: The packet. Its mark is that at the start of the walk or, if drops are wanted, that
            at the drop.
        wants_drops: Whether rules that drop are wanted instead of those that translate the source.
    """
    chains = sorted(base_chains, key=lambda chain: chain.priority)
    has_ct_mark = not any(chain.effects.has_connection_mark for chain in chains)
    state = _Walk(
        flow=flow,
        ct_mark=Bits.of(flow.ct_mark if has_ct_mark else None),
        wants_drops=wants_drops,
    )
    mark: Bits | None = Bits.of(flow.mark)
    if wants_drops:
        # The mark before these chains changed it is not known.
        mark = _without(Bits.of(flow.mark), chains)
    try:
        for _, group in groupby(chains, key=lambda chain: chain.priority):
            if mark is not None:
                mark = _walk_group(tuple(group), state, mark)
    except _TooFarError:
        # Any of them may have matched.
        rules = (rule for rule in telling_rules(chains) if rule.is_drop == wants_drops)
        found = dict.fromkeys((*state.rules, *rules))
        return Walked(rules=tuple(found), may_pass=True, is_complete=False)
    return Walked(rules=tuple(state.rules), may_pass=mark is not None)


def _walk_group(chains: tuple[BaseChain, ...], state: _Walk, mark: Bits) -> Bits | None:
    """Walk base chains of the same priority, whose order is not known."""
    if len(chains) == 1:
        return _walk_base(chains[0], state, mark)
    while True:
        outs = [_walk_base(chain, state, mark) for chain in chains]
        # Each may run after any other, and so see the mark that the other left.
        blurred = mark
        for out in outs:
            blurred = _joined(blurred, out) or blurred
        if blurred == mark:
            return None if None in outs else mark
        mark = blurred


def _walk_base(chain: BaseChain, state: _Walk, mark: Bits) -> Bits | None:
    out = _walk_chain(chain, chain.name, state, mark, 0)
    if out.end is not None and chain.policy:
        if state.wants_drops:
            state.rules[chain.placed(chain.policy)] = None
        return out.accepted
    return _joined(out.end, out.accepted)


def _walk_chain(base: BaseChain, name: str, state: _Walk, mark: Bits, depth: int) -> _Out:
    if depth > _MAX_DEPTH or name not in base.chains:
        raise _TooFarError
    here = mark
    left: Bits | None = None
    accepted: Bits | None = None
    for step in base.chains[name]:
        state.steps += 1
        if state.steps > _MAX_STEPS:
            raise _TooFarError
        out = _Stepper(base, state, depth).run(step, here)
        left, accepted = _joined(left, out.left), _joined(accepted, out.accepted)
        if out.next is None:
            return _Out(left, accepted)
        here = out.next
    return _Out(_joined(here, left), accepted)


@dataclass(slots=True)
class _Stepper:
    """
    Executes one rule.

    ``next`` is the mark with which the packet meets the next rule, ``left`` the mark with which it
    returns to the chain's caller, ``accepted`` the mark with which it leaves the base chain. None
    where that is ruled out.
    """

    base: BaseChain
    state: _Walk
    depth: int
    next: Bits | None = None
    left: Bits | None = None
    accepted: Bits | None = None

    def run(self, step: Step, mark: Bits) -> "_Stepper":
        here: Bits | None = mark
        for op in step:
            if here is None:
                break
            here = self._apply(op, here)
        self.next = _joined(self.next, here)
        return self

    def _apply(self, op: Op, mark: Bits) -> Bits | None:
        """Return the mark for the rule's next operation, None if that is not reached."""
        match op:
            case SetMark():
                return mark.changed(op.keep, op.flip, op.unknown)
            case SetConnectionMark():
                return mark
            case Lookup():
                return self._look_up(op, mark)
            case Finish() | Perhaps() | Jump() | Verdict():
                return self._go(op, mark)
        truth = op.truth(self._view(mark))
        if truth is not Truth.YES:
            self.next = _joined(self.next, mark)
        return None if truth is Truth.NO else mark

    def _go(self, op: Finish | Perhaps | Jump | Verdict, mark: Bits) -> Bits | None:
        match op:
            case Finish():
                if op.rule.is_drop == self.state.wants_drops:
                    self.state.rules[self.base.placed(op.rule)] = None
                elif not op.rule.is_drop:
                    # A translated packet continues at the hook.
                    self.accepted = _joined(self.accepted, mark)
                return None
            case Perhaps():
                # It may change the mark, too.
                self.state.rules[self.base.placed(op.rule)] = None
                self.accepted = _joined(self.accepted, Bits.of(None))
                return Bits.of(None)
            case Jump():
                self._jump(op, mark)
            case Verdict.RETURN:
                self.left = _joined(self.left, mark)
            case Verdict.ACCEPT:
                self.accepted = _joined(self.accepted, mark)
            case Verdict.CONTINUE:
                self.next = _joined(self.next, mark)
        return None

    def _jump(self, op: Jump, mark: Bits) -> None:
        out = _walk_chain(self.base, op.chain, self.state, mark, self.depth + 1)
        self.accepted = _joined(self.accepted, out.accepted)
        if op.is_goto:
            self.left = _joined(self.left, out.end)
        else:
            self.next = _joined(self.next, out.end)

    def _look_up(self, op: Lookup, mark: Bits) -> Bits | None:
        view = self._view(mark)
        entries, is_sure = op.entries.find(tuple(view.value(key) for key in op.keys))
        is_sure = is_sure and op.is_sure
        for entry in entries if op.is_sure else op.entries:
            self._enter(entry, mark)
        # If nothing is found, the rule continues after the lookup.
        return None if entries and is_sure else mark

    def _enter(self, entry: Entry, mark: Bits) -> None:
        before, self.state.rules = self.state.rules, {}
        on = self._go(entry.op, mark)
        self.next = _joined(self.next, on)
        for rule in self.state.rules:
            # A helper chain serves many elements: the element's comment says for what.
            named = replace(rule, comment=entry.comment) if not rule.comment else rule
            before[named] = None
        self.state.rules = before

    def _view(self, mark: Bits) -> View:
        base = self.base
        return View(
            flow=self.state.flow,
            mark=mark,
            ct_mark=self.state.ct_mark,
            is_before_dnat=base.hook in ("prerouting", "output")
            and (base.priority <= DSTNAT or base.kind == "nat"),
            is_after_snat=base.hook in ("input", "postrouting")
            and base.priority > SRCNAT
            and base.kind != "nat",
        )


def _joined(one: Bits | None, other: Bits | None) -> Bits | None:
    if one is None or other is None:
        return one or other
    return one.joined(other)


def _without(mark: Bits, chains: Iterable[BaseChain]) -> Bits:
    """Return what is known of a mark that these chains may have changed already."""
    for chain in chains:
        mark = mark.changed(ALL_BITS, 0, chain.effects.mark_bits)
    return mark
