"""
Checks the tokens of running streams again.

The API server takes its time to answer, and the stream's loop must not wait. So a thread asks about
one client after the other, and tells the loop which of them may no longer listen.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tracer.stream.listener import Listener
from tracer.stream.mailbox import Mailbox

_log = logging.getLogger(__name__)

# How often each client is checked, and the pauses after a check: 256 clients that connected at once
# are checked within about two minutes. While the API server does not answer, the pauses are longer.
EVERY_S, PAUSE_S, LONG_PAUSE_S = 180.0, 0.5, 30.0
# How long a client may listen while the API server does not answer.
UNANSWERED_S = 3600.0

# A refusal: an HTTP status, 5xx if there was no answer, and a line with the reason.
Refusal = tuple[int, str]
AskAgain = Callable[[], Refusal | None]
_NO_ANSWER: Refusal = (503, "its token could not be checked")


@dataclass(slots=True)
class _Watched:
    ask: AskAgain
    answered_s: float
    due_s: float


class Recheck:
    """Checks clients' tokens in a thread of its own. The methods are for the loop's thread."""

    def __init__(self, room: int, clock_s: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            room: The maximum number of clients.
            clock_s: The clock for all intervals.
        """
        self._clock_s = clock_s
        self._changed = threading.Condition()
        self._watched: dict[Listener, _Watched] = {}
        self._refused: Mailbox[tuple[Listener, Refusal]] = Mailbox(room)
        self._thread: threading.Thread | None = None
        self._not_before_s = float("-inf")
        self._is_closed = False

    def fileno(self) -> int:
        """Return a descriptor that is readable when `refused` has something to return."""
        return self._refused.fileno()

    def watch(self, client: Listener, ask: AskAgain) -> None:
        """
        Check a client from now on, which has just been admitted.

        Args:
            client: The client.
            ask: Does the check again; may take seconds.

        Raises:
            RuntimeError: If no thread can be started.
        """
        now_s = self._clock_s()
        with self._changed:
            self._watched[client] = _Watched(ask, now_s, now_s + EVERY_S)
            self._changed.notify()
        if self._thread is None:
            # Only with the first client: by then the agent runs as nobody, and so does the thread.
            thread = threading.Thread(target=self._run, daemon=True)
            thread.start()
            self._thread = thread

    def forget(self, client: Listener) -> None:
        """Stop checking a client that has gone."""
        with self._changed:
            self._watched.pop(client, None)

    def refused(self) -> list[tuple[Listener, Refusal]]:
        """Return the clients that may no longer listen, and why."""
        return self._refused.take()

    def close(self) -> None:
        """Stop checking, without waiting for an answer that is still due."""
        with self._changed:
            self._is_closed = True
            self._watched.clear()
            self._changed.notify()
        self._refused.close()

    def _run(self) -> None:
        while (client := self._next()) is not None:
            with self._changed:
                watched = self._watched.get(client)
            if watched is not None:
                self._weigh(client, watched, self._answer(watched.ask))

    def _next(self) -> Listener | None:
        """Wait until a client is due; None at the end."""
        with self._changed:
            while not self._is_closed:
                first = min(self._watched, key=lambda each: self._watched[each].due_s, default=None)
                wait_s = None
                if first is not None:
                    at_s = max(self._watched[first].due_s, self._not_before_s)
                    wait_s = at_s - self._clock_s()
                    if wait_s <= 0:
                        return first
                self._changed.wait(wait_s)
        return None

    def _answer(self, ask: AskAgain) -> Refusal | None:
        try:
            return ask()
        except Exception:
            # When the agent ends, the connection to the API server closes before this thread ends.
            if not self._is_closed:
                _log.exception("a token was not checked")
            return _NO_ANSWER

    def _weigh(self, client: Listener, watched: _Watched, refusal: Refusal | None) -> None:
        now_s = self._clock_s()
        is_answered = refusal is None or refusal[0] < 500
        with self._changed:
            self._not_before_s = now_s + (PAUSE_S if is_answered else LONG_PAUSE_S)
            watched.due_s = now_s + EVERY_S
            if is_answered:
                watched.answered_s = now_s
            if refusal is not None and is_answered:
                self._refuse(client, refusal)
            for each in [each for each in self._watched if self._is_too_old(each, now_s)]:
                why = f"the API server could not be asked about its token for {UNANSWERED_S:g} s"
                self._refuse(each, (503, why))

    def _is_too_old(self, client: Listener, now_s: float) -> bool:
        return now_s - self._watched[client].answered_s > UNANSWERED_S

    def _refuse(self, client: Listener, refusal: Refusal) -> None:
        if self._watched.pop(client, None) is not None:
            self._refused.put((client, refusal))
