"""Those who listen, by what they want: each thing is looked at once for all who want the same."""

from collections.abc import Iterator

from tracer.judge.verdict import Judged
from tracer.pipeline import Selection, Wanted
from tracer.stream.listener import Listener

# Connections whose accepts are recognized, at about half a kilobyte: for all filters together, and
# for each at the least. An accept comes a tenth of a second after its connection at the latest.
_REMEMBERED_ALL, _REMEMBERED_EACH = 8192, 64


class Audience:
    """Clients that have been greeted, by their filters."""

    def __init__(self) -> None:
        self._by_wanted: dict[Wanted, tuple[Selection, list[Listener]]] = {}

    def join(self, client: Listener) -> None:
        """Take in a client that has asked."""
        assert client.wanted is not None  # noqa: S101 - by then it has
        fresh = (Selection(client.wanted), list[Listener]())
        client.selection, members = self._by_wanted.setdefault(client.wanted, fresh)
        members.append(client)
        self._share_memory()

    def leave(self, client: Listener) -> None:
        """Let go of a client, if it is there."""
        if client.selection is None:
            return
        wanted = client.selection.wanted
        client.selection = None
        members = self._by_wanted[wanted][1]
        members.remove(client)
        if not members:
            del self._by_wanted[wanted]
            self._share_memory()

    def wanting(self, judged: Judged) -> Iterator[Listener]:
        """Yield those who want a thing; they may leave meanwhile."""
        for selection, members in list(self._by_wanted.values()):
            if selection.takes(judged):
                yield from list(members)

    def _share_memory(self) -> None:
        """Bound what all filters together remember of connections."""
        share = max(_REMEMBERED_EACH, _REMEMBERED_ALL // max(1, len(self._by_wanted)))
        for selection, _ in self._by_wanted.values():
            selection.remembered = share
