"""A client's end of the live stream: what an agent judges, as a source of a run."""

import json
import select
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tracer.channel import Channel, ClearChannel, send_all
from tracer.judge.verdict import Judged, JudgedConnection, JudgedDrop, Summary
from tracer.pipeline import Wanted
from tracer.stream import upgrade
from tracer.stream.errors import StreamError
from tracer.stream.lines import judged_of
from tracer.stream.protocol import MAX_LINE, VERSION, end_line, parse_object, request_line
from tracer.stream.upgrade import HttpsAgent

_CHUNK = 1 << 18
# How long an agent may take to end the stream when asked.
PATIENCE_S = 10.0


class AgentStream:
    """
    What a running agent judges and a filter wants.

    Raises:
        StreamError: If there is no agent, or it refuses.
    """

    def __init__(
        self, agent: Path | HttpsAgent, wanted: Wanted, *, patience_s: float | None = None
    ) -> None:
        """
        Args:
            agent: Its Unix socket, or where it listens with TLS.
            wanted: What it shall hand out.
            patience_s: How long it may take to let us in; never more than an agent ever takes.
        """
        self._agent = agent
        self._lines: deque[bytes] = deque()
        self._end: Mapping[str, Any] | None = None
        self._connections = self._drops = 0
        self.nodes: Sequence[str] = ()
        self._give_up_s = float("inf")
        self._channel, self._inbox = _connected(agent, patience_s)
        try:
            self._say(request_line(wanted))
        except StreamError:
            self.close()
            raise
        # What came with the answer to us is no news to `select`.
        self._split(b"")

    def wait(self, timeout_s: float) -> None:
        """
        Wait for the agent's word that it has begun.

        Raises:
            StreamError: If it refuses, or says nothing in time.
        """
        end_s = time.monotonic() + timeout_s
        while (left_s := end_s - time.monotonic()) > 0:
            self._receive(left_s)
            if self._lines:
                self._begin(parse_object(self._lines.popleft()))
                return
        raise StreamError(f"the agent at {self._agent} has not begun to count in {timeout_s:g} s")

    def read(self, timeout_s: float) -> list[bytes] | None:
        """
        Return the next lines; none if nothing came in time, None after the agent's summary.

        Raises:
            StreamError: If the agent has gone away without one.
        """
        if self._end is not None:
            return None
        self._receive(timeout_s)
        lines = []
        while self._lines:
            line = self._lines.popleft()
            if line.startswith(_SUMMARY):
                self._end = parse_object(line)
                break
            lines.append(line)
        return lines if lines or self._end is None else None

    def judge(self, lines: Iterable[bytes]) -> Iterator[Judged]:
        """Yield what lines tell."""
        for line in lines:
            told = parse_object(line)
            if told.get("kind") == "error":
                raise StreamError(f"the agent at {self._agent} refuses: {told.get('message')}")
            judged = judged_of(told)
            self._connections += isinstance(judged, JudgedConnection)
            self._drops += isinstance(judged, JudgedDrop)
            yield judged

    def rest(self) -> Iterator[Judged]:
        """Yield what was kept back until the end: nothing, a line stands for itself."""
        yield from ()

    def hang_up(self) -> None:
        """Ask for the end: what happened until now still comes, then the summary."""
        self._give_up_s = time.monotonic() + PATIENCE_S
        # An agent that has ended meanwhile is found out in reading.
        with suppress(OSError, StreamError):
            if isinstance(self._agent, Path):
                # So it was before there was a word for it: every agent knows it.
                self._channel.socket.shutdown(socket.SHUT_WR)
            else:
                self._say(end_line())

    def take_summary(self) -> None:
        """
        Take the summary; what still comes before it is left out.

        Raises:
            StreamError: If it does not come.
        """
        while self._end is None:
            self.read(0.1)

    @property
    def shown(self) -> int:
        """How many connections and drops there were."""
        return self._connections + self._drops

    def summary(self) -> Summary:
        """Add up what was shown, and what the agent says was lost and cannot be seen."""
        lost, not_seen = _told_at_the_end(self._end or {})
        return Summary(
            connections=self._connections, drops=self._drops, lost=lost, not_seen=not_seen
        )

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, told: Mapping[str, Any]) -> None:
        if told.get("kind") == "error":
            raise StreamError(f"the agent at {self._agent} refuses: {told.get('message')}")
        if told.get("kind") != "hello" or told.get("version") != VERSION:
            raise StreamError(
                f"what answers at {self._agent} is no agent of this version of the stream "
                f"({json.dumps(told):.80})"
            )
        nodes = told.get("nodes")
        self.nodes = tuple(map(str, nodes)) if isinstance(nodes, list) else ()

    def _receive(self, timeout_s: float) -> None:
        if self._lines:
            return
        ready, _, _ = select.select([self._channel], [], [], timeout_s)
        if not ready:
            if time.monotonic() > self._give_up_s:
                raise StreamError(f"the agent at {self._agent} gives no summary")
            return
        try:
            chunk = self._channel.receive()
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            raise StreamError(
                f"the agent at {self._agent} closed the stream: it has ended, or this reader was "
                "too slow for too long"
            )
        if self._give_up_s < float("inf"):
            self._give_up_s = time.monotonic() + PATIENCE_S
        self._split(chunk)

    def _split(self, chunk: bytes) -> None:
        *lines, self._inbox = (self._inbox + chunk).split(b"\n")
        self._lines += lines
        if len(self._inbox) > MAX_LINE:
            raise StreamError(f"the agent at {self._agent} sends a line without an end")

    def _say(self, line: bytes) -> None:
        self._channel.deadline_s = time.monotonic() + PATIENCE_S
        try:
            send_all(self._channel, line)
        except OSError as error:
            raise StreamError(
                f"the agent at {self._agent} does not listen: {error.strerror or error}"
            ) from None
        self._channel.deadline_s = None


def _connected(agent: Path | HttpsAgent, patience_s: float | None) -> tuple[Channel, bytes]:
    """Return the connection, and what the agent has said on it already."""
    if isinstance(agent, HttpsAgent):
        patience_s = min(upgrade.PATIENCE_S, patience_s or upgrade.PATIENCE_S)
        return upgrade.connect(agent, chunk=_CHUNK, patience_s=patience_s)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(str(agent))
    except OSError as error:
        sock.close()
        hint = {
            "FileNotFoundError": "; is 'srcip serve' running on this node?",
            "ConnectionRefusedError": "; is 'srcip serve' running on this node?",
            "PermissionError": "; it is for the group of 'srcip serve --stream-group'",
        }.get(type(error).__name__, "")
        raise StreamError(
            f"cannot reach the agent at {agent}: {error.strerror or error}{hint}"
        ) from None
    return ClearChannel(sock, chunk=_CHUNK), b""


def _told_at_the_end(summary: Mapping[str, Any]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return what was lost, and what cannot be seen."""
    lost, not_seen = summary.get("lost", {}), summary.get("not_seen", [])
    try:
        return {str(key): int(value) for key, value in dict(lost).items()}, tuple(
            map(str, not_seen)
        )
    except (OverflowError, TypeError, ValueError) as error:
        raise StreamError(f"the agent's summary is not understood: {error!r:.80}") from None


# A summary line begins so: `exporters.jsonl` keeps the order of keys, and the contract its kind.
_SUMMARY = b'{"kind": "summary"'
