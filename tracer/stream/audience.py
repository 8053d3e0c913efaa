"""Clients grouped by filter: each filter is evaluated once for all clients that share it."""

from collections.abc import Iterator

from tracer.judge.verdict import Judged
from tracer.pipeline import Selection, Wanted
from tracer.stream.listener import Listener

# How many connections to remember, to recognize their accepts, at about 500 bytes each: for all
# filters together, and for each at least. An accept follows its connection within 0.1 s.
_REMEMBERED_ALL, _REMEMBERED_EACH = 8192, 64


class Audience:
    """Clients that were sent a hello, grouped by filter."""

    def __init__(self) -> None:
        self._by_wanted: dict[Wanted, tuple[Selection, list[Listener]]] = {}

    def join(self, client: Listener) -> None:
        """Add a client that has sent its request."""
        assert client.wanted is not None  # noqa: S101 - set by the request
        fresh = (Selection(client.wanted), list[Listener]())
        client.selection, members = self._by_wanted.setdefault(client.wanted, fresh)
        members.append(client)
        self._share_memory()

    def leave(self, client: Listener) -> None:
        """Remove a client, if it was added."""
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
        """Yield the clients that want a judged thing; clients may leave meanwhile."""
        for selection, members in list(self._by_wanted.values()):
            if selection.takes(judged):
                yield from list(members)

    def _share_memory(self) -> None:
        """Divide the memory for connections among the filters."""
        share = max(_REMEMBERED_EACH, _REMEMBERED_ALL // max(1, len(self._by_wanted)))
        for selection, _ in self._by_wanted.values():
            selection.remembered = share
