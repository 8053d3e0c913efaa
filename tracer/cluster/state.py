"""The tables behind a snapshot, and how to derive those of the next one."""

from bisect import insort
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from tracer.cluster.claims import Claim, Kind, Owner, Topic, claims_of, owner_of
from tracer.cluster.objects import Object
from tracer.cluster.table import Table

_Objects = tuple[Table[Owner, Object], ...]
_Claims = tuple[Table[Hashable, tuple[Claim, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """
    All objects by kind, and all claims by topic.

    ``cidr_lengths`` counts the pod CIDRs of each prefix length, longest first.
    """

    objects: _Objects = field(default_factory=lambda: tuple(Table() for _ in Kind))
    claims: _Claims = field(default_factory=lambda: tuple(Table() for _ in Topic))
    cidr_lengths: Mapping[int, int] = field(default_factory=dict)

    def get(self, owner: Owner) -> Object | None:
        """Return an object by identity."""
        return self.objects[owner.kind].get(owner)

    def at(self, topic: Topic, key: Hashable) -> tuple[Claim, ...]:
        """Return the claims on a key, best first."""
        return self.claims[topic].get(key) or ()

    def addresses(self, topic: Topic) -> Iterator[int]:
        """Yield the keys of a topic whose keys are addresses."""
        return (key for key, _ in self.claims[topic].items() if isinstance(key, int))

    def cidrs(self) -> Iterator[tuple[int, int, str]]:
        """Yield the prefix length and leading bits of each pod CIDR, and its Node."""
        for key, claims in self.claims[Topic.POD_CIDR].items():
            if isinstance(key, tuple):
                yield *key, claims[0].owner.name

    def covering(self, address: int) -> tuple[Claim, ...]:
        """Return the claims on the longest pod CIDR that contains an address."""
        for length in self.cidr_lengths:
            claims = self.at(Topic.POD_CIDR, (length, address >> (128 - length)))
            if claims:
                return claims
        return ()

    def changed(self, put: Iterable[Object], remove: Iterable[Owner]) -> "State":
        """Return the state after removals, then additions and replacements; itself if unchanged."""
        editor = _Editor(self)
        for owner in remove:
            editor.replace(owner, None)
        for obj in put:
            editor.replace(owner_of(obj), obj)
        return editor.finish()


class _Editor:
    def __init__(self, base: State) -> None:
        self._base = base
        self._objects = [table.edit() for table in base.objects]
        self._claims = [table.edit() for table in base.claims]
        self._lengths = dict(base.cidr_lengths)

    def replace(self, owner: Owner, obj: Object | None) -> None:
        table = self._objects[owner.kind]
        before = table.get(owner)
        if before == obj:
            return
        table.set(owner, obj)
        old = {} if before is None else claims_of(before, owner)
        new = {} if obj is None else claims_of(obj, owner)
        for subject in old.keys() - new.keys():
            self._claim(*subject, owner, None)
        for subject, claim in new.items():
            # Most endpoints of a changed slice stay the same: skipping them keeps updates cheap.
            if old.get(subject) != claim:
                self._claim(*subject, owner, claim)

    def finish(self) -> State:
        objects = tuple([table.finish() for table in self._objects])
        if all(after is before for after, before in zip(objects, self._base.objects, strict=True)):
            return self._base
        return State(
            objects=objects,
            claims=tuple([table.finish() for table in self._claims]),
            cidr_lengths=dict(sorted(self._lengths.items(), reverse=True)),
        )

    def _claim(self, topic: Topic, key: Hashable, owner: Owner, claim: Claim | None) -> None:
        table = self._claims[topic]
        before = table.get(key) or ()
        after = [other for other in before if other.owner != owner]
        if claim is not None:
            insort(after, claim, key=_order)
        table.set(key, tuple(after) or None)
        if topic is Topic.POD_CIDR and isinstance(key, tuple) and bool(before) != bool(after):
            self._count_length(key[0], 1 if after else -1)

    def _count_length(self, length: int, change: int) -> None:
        count = self._lengths.get(length, 0) + change
        if count:
            self._lengths[length] = count
        else:
            del self._lengths[length]


def _order(claim: Claim) -> tuple[int, Owner]:
    return claim.rank, claim.owner
