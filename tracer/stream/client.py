"""The client's end of the live stream: an agent's results, as the source of a run."""

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
# How long an agent may take to end the stream after being asked to.
PATIENCE_S = 10.0
# How long to wait between attempts to connect while a Unix socket's queue is full.
_AGAIN_S = 0.05


class AgentStream:
    """
    The results of a running agent that match a filter.

    Raises:
        StreamError: If there is no agent, or it refuses.
    """

    def __init__(
        self, agent: Path | HttpsAgent, wanted: Wanted, *, patience_s: float | None = None
    ) -> None:
        """
        Args:
            agent: Its Unix socket, or its HTTPS address.
            wanted: What it should send.
            patience_s: How long it may take to accept us; at most the limit of `upgrade`.
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
        # `select` does not report what arrived together with the answer.
        self._split(b"")

    def wait(self, timeout_s: float) -> None:
        """
        Wait for the agent's hello.

        Raises:
            StreamError: If it refuses, or sends nothing in time.
        """
        end_s = time.monotonic() + timeout_s
        while (left_s := end_s - time.monotonic()) > 0:
            self._receive(left_s)
            if self._lines:
                self._begin(parse_object(self._lines.popleft()))
                return
        raise StreamError(
            f"the agent at {self._agent} did not start counting within {timeout_s:.3g} s"
        )

    def read(self, timeout_s: float) -> list[bytes] | None:
        """
        Return the next lines; an empty list on a time-out, None after the agent's summary.

        Raises:
            StreamError: If the agent closed the stream without a summary.
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
        """Yield what the lines hold."""
        for line in lines:
            value = parse_object(line)
            self._check(value)
            judged = judged_of(value)
            self._connections += isinstance(judged, JudgedConnection)
            self._drops += isinstance(judged, JudgedDrop)
            yield judged

    def rest(self) -> Iterator[Judged]:
        """Yield what was held back until the end: nothing, each line is complete."""
        yield from ()

    def hang_up(self) -> None:
        """Ask the agent to end the stream: it sends what happened until now, then the summary."""
        self._give_up_s = time.monotonic() + PATIENCE_S
        # If the agent is gone meanwhile, reading reports it.
        with suppress(OSError, StreamError):
            if isinstance(self._agent, Path):
                # Older than the end line, and understood by every agent.
                self._channel.socket.shutdown(socket.SHUT_WR)
            else:
                self._say(end_line())

    def take_summary(self) -> None:
        """
        Wait for the summary, and discard what arrives before it.

        Raises:
            StreamError: If it does not arrive.
        """
        while self._end is None:
            for line in self.read(0.1) or ():
                if line.startswith(_ERROR):
                    self._check(parse_object(line))

    @property
    def shown(self) -> int:
        """How many connections and drops were received."""
        return self._connections + self._drops

    def summary(self) -> Summary:
        """Sum up what was received, with the losses and blind spots that the agent reported."""
        lost, not_seen = _losses_of(self._end or {})
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

    def _begin(self, hello: Mapping[str, Any]) -> None:
        if hello.get("kind") == "error":
            raise StreamError(f"the agent at {self._agent} refuses: {hello.get('message')}")
        if hello.get("kind") != "hello" or hello.get("version") != VERSION:
            raise StreamError(
                f"what answers at {self._agent} is not an agent with version {VERSION} of the "
                f"stream ({json.dumps(hello):.80})"
            )
        nodes = hello.get("nodes")
        self.nodes = tuple(map(str, nodes)) if isinstance(nodes, list) else ()

    def _check(self, value: Mapping[str, Any]) -> None:
        """Raise an error that the agent sends in place of a summary."""
        if value.get("kind") == "error":
            why = f"{value.get('message')}{upgrade.what_to_do(value.get('status'))}"
            raise StreamError(f"the agent at {self._agent} ends the stream: {why}")

    def _receive(self, timeout_s: float) -> None:
        if self._lines:
            return
        ready, _, _ = select.select([self._channel], [], [], timeout_s)
        if not ready:
            if time.monotonic() > self._give_up_s:
                raise StreamError(f"the agent at {self._agent} sent no summary")
            return
        try:
            chunk = self._channel.receive()
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            raise StreamError(
                f"the agent at {self._agent} closed the stream: it ended, or this client read too "
                "slowly for too long"
            )
        if self._give_up_s < float("inf"):
            self._give_up_s = time.monotonic() + PATIENCE_S
        self._split(chunk)

    def _split(self, chunk: bytes) -> None:
        *lines, self._inbox = (self._inbox + chunk).split(b"\n")
        self._lines += lines
        if len(self._inbox) > MAX_LINE:
            raise StreamError(
                f"the agent at {self._agent} sent a line of more than {MAX_LINE} bytes"
            )

    def _say(self, line: bytes) -> None:
        self._channel.deadline_s = time.monotonic() + PATIENCE_S
        try:
            send_all(self._channel, line)
        except OSError as error:
            raise StreamError(
                f"cannot send to the agent at {self._agent}: {error.strerror or error}"
            ) from None
        self._channel.deadline_s = None


def _connected(agent: Path | HttpsAgent, patience_s: float | None) -> tuple[Channel, bytes]:
    """Return the connection, and what was already received on it."""
    patience_s = min(upgrade.PATIENCE_S, patience_s or upgrade.PATIENCE_S)
    if isinstance(agent, HttpsAgent):
        return upgrade.connect(agent, chunk=_CHUNK, patience_s=patience_s)
    sock = socket.socket(socket.AF_UNIX)
    try:
        _connect(sock, agent, patience_s)
    except OSError as error:
        sock.close()
        hint = {
            "TimeoutError": f" within {patience_s:g} s; is it overloaded, or does it hang?",
            "FileNotFoundError": "; is 'srcip serve' running on this node?",
            "ConnectionRefusedError": "; is 'srcip serve' running on this node?",
            "PermissionError": "; only the group of 'srcip serve --stream-group' may connect",
        }.get(type(error).__name__, "")
        raise StreamError(
            f"cannot reach the agent at {agent}: {error.strerror or error}{hint}"
        ) from None
    return ClearChannel(sock, chunk=_CHUNK), b""


def _connect(sock: socket.socket, path: Path, patience_s: float) -> None:
    """Connect, or time out while the listener's queue is full (unix_stream_connect: EAGAIN)."""
    deadline_s = time.monotonic() + patience_s
    sock.setblocking(False)
    while True:
        try:
            sock.connect(str(path))
        except BlockingIOError:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("no answer") from None
            time.sleep(min(_AGAIN_S, left_s))
        else:
            return


def _losses_of(summary: Mapping[str, Any]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return what a summary says was lost, and what it says was not seen."""
    lost, not_seen = summary.get("lost", {}), summary.get("not_seen", [])
    try:
        return {str(key): int(value) for key, value in dict(lost).items()}, tuple(
            map(str, not_seen)
        )
    except (OverflowError, TypeError, ValueError) as error:
        raise StreamError(f"the agent's summary is malformed: {error!r:.80}") from None


# How the last line begins: `exporters.jsonl` and the protocol write the kind first.
_SUMMARY, _ERROR = b'{"kind": "summary"', b'{"kind": "error"'
