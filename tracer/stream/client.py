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

from tracer.judge.verdict import Judged, JudgedConnection, JudgedDrop, Summary
from tracer.pipeline import Wanted
from tracer.stream.errors import StreamError
from tracer.stream.lines import judged_of
from tracer.stream.protocol import MAX_LINE, VERSION, parse_object, request_line

_CHUNK = 1 << 18
# How long an agent may take to end the stream when asked.
PATIENCE_S = 10.0


class AgentStream:
    """
    What a running agent judges and a filter wants.

    Raises:
        StreamError: If there is no agent, or it refuses.
    """

    def __init__(self, path: Path, wanted: Wanted) -> None:
        self._path = path
        self._inbox = b""
        self._lines: deque[bytes] = deque()
        self._end: Mapping[str, Any] | None = None
        self._connections = self._drops = 0
        self.nodes: Sequence[str] = ()
        self._give_up_s = float("inf")
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(str(path))
            self._socket.sendall(request_line(wanted))
        except OSError as error:
            self._socket.close()
            raise self._unreachable(error) from None
        self._socket.setblocking(False)

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
        raise StreamError(f"the agent at {self._path} has not begun to count in {timeout_s:g} s")

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
            judged = judged_of(parse_object(line))
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
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

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
        told = self._end or {}
        lost, not_seen = told.get("lost", {}), told.get("not_seen", [])
        return Summary(
            connections=self._connections,
            drops=self._drops,
            lost={str(key): int(value) for key, value in dict(lost).items()},
            not_seen=tuple(map(str, not_seen)),
        )

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, told: Mapping[str, Any]) -> None:
        if told.get("kind") == "error":
            raise StreamError(f"the agent at {self._path} refuses: {told.get('message')}")
        if told.get("kind") != "hello" or told.get("version") != VERSION:
            raise StreamError(
                f"what answers at {self._path} is no agent of this version of the stream "
                f"({json.dumps(told):.80})"
            )
        self.nodes = tuple(map(str, told.get("nodes") or ()))

    def _receive(self, timeout_s: float) -> None:
        if self._lines:
            return
        ready, _, _ = select.select([self._socket], [], [], timeout_s)
        if not ready:
            if time.monotonic() > self._give_up_s:
                raise StreamError(f"the agent at {self._path} gives no summary")
            return
        try:
            chunk = self._socket.recv(_CHUNK)
        except ConnectionError:
            chunk = b""
        if not chunk:
            raise StreamError(
                f"the agent at {self._path} closed the stream: it has ended, or this reader was "
                "too slow for too long"
            )
        if self._give_up_s < float("inf"):
            self._give_up_s = time.monotonic() + PATIENCE_S
        *lines, self._inbox = (self._inbox + chunk).split(b"\n")
        self._lines += lines
        if len(self._inbox) > MAX_LINE:
            raise StreamError(f"the agent at {self._path} sends a line without an end")

    def _unreachable(self, error: OSError) -> StreamError:
        hint = {
            "FileNotFoundError": "; is 'srcip serve' running on this node?",
            "ConnectionRefusedError": "; is 'srcip serve' running on this node?",
            "PermissionError": "; it is for the group of 'srcip serve --stream-group'",
        }.get(type(error).__name__, "")
        return StreamError(
            f"cannot reach the agent at {self._path}: {error.strerror or error}{hint}"
        )


# A summary line begins so: `exporters.jsonl` keeps the order of keys, and the contract its kind.
_SUMMARY = b'{"kind": "summary"'
