"""
Rules kept up to date by a child that stays privileged, while the tracer itself does not.

Reading rules takes CAP_NET_ADMIN each time, which a tracer gives up once it is attached. The child
does nothing else: it looks for changes, runs the node's tools, and sends what they say. It also has
kube-proxy asked for its mode, in each namespace, by children that have no privileges.
"""

import ctypes
import os
import pickle
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from tracer.errors import TracerError
from tracer.kernel import privileges, proxy_mode
from tracer.kernel.netns import SELF
from tracer.kernel.privileges import Capability
from tracer.ruleset.model import ProxyMode, Ruleset
from tracer.ruleset.reader import Watcher

_INTERVAL_S = 1.0
# kube-proxy is asked so often; at once where its rules say another mode than before.
ASK_INTERVAL_S = 60.0
_PR_SET_PDEATHSIG = 1
_LENGTH = struct.Struct("=Q")
# Reading rules, also of legacy iptables; and giving up what is left, where kube-proxy is asked.
_KEPT = (
    Capability.CAP_NET_ADMIN,
    Capability.CAP_NET_RAW,
    Capability.CAP_SETUID,
    Capability.CAP_SETGID,
)
# To enter other namespaces, also by the path of a process that may do more than we.
_TO_ENTER = (Capability.CAP_SYS_ADMIN, Capability.CAP_SYS_PTRACE)


class RulesetKeeper:
    """
    The rules of several namespaces, as of a second ago at the most.

    Start it before any thread and before privileges are dropped. The first reading goes on in the
    child while the caller does other things.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        proxy_modes: Sequence[ProxyMode | None] | None = None,
        *,
        follows_modes: bool = False,
        is_kept: bool = False,
    ) -> None:
        """
        Start the child.

        Args:
            paths: The namespaces.
            proxy_modes: What each one's kube-proxy said of its mode; None for nothing.
            follows_modes: Whether to ask it again and again.
            is_kept: Whether rulesets hold what was printed, for a recording.
        """
        modes = proxy_modes or [None] * len(paths)
        self._modes = dict(enumerate(modes))
        self._rulesets: dict[int, Ruleset] = {}
        self._pending = b""
        self._channel, theirs = socket.socketpair()
        self._child = os.fork()
        if self._child == 0:
            self._channel.close()
            next_ask_s = time.monotonic() + ASK_INTERVAL_S if follows_modes else float("inf")
            places = [
                _Place(path=path, mode=mode, next_ask_s=next_ask_s, is_kept=is_kept)
                for path, mode in zip(paths, modes, strict=True)
            ]
            _keep(places, theirs)
        theirs.close()

    def ruleset(self, index: int) -> Ruleset:
        """
        Return the latest rules of the namespace that was named at this place.

        Waits for the first reading. If the child is gone, what it last said stays, marked as such.
        """
        self._channel.setblocking(False)
        is_alive = self._receive()
        while index not in self._rulesets and is_alive:
            self._channel.setblocking(True)
            is_alive = self._receive()
        if not is_alive:
            known = self._rulesets.get(index, Ruleset())
            if _ENDED not in known.unread:
                self._rulesets[index] = replace(known, unread=(*known.unread, _ENDED))
        return self._rulesets[index]

    def proxy_mode(self, index: int) -> ProxyMode | None:
        """Return what a namespace's kube-proxy said of its mode last; None for nothing."""
        return self._modes[index]

    def close(self) -> None:
        """End the child, which finds its socket closed."""
        self._channel.close()
        with suppress(ChildProcessError):
            os.waitpid(self._child, 0)

    def _receive(self) -> bool:
        """Take what there is; return whether there may be more one day."""
        try:
            chunk = self._channel.recv(1 << 20)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        self._pending += chunk
        while len(self._pending) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._pending)
            end = _LENGTH.size + length
            if len(self._pending) < end:
                break
            # From our own child, which has more privileges than we: nothing to be gained by lying.
            index, told = pickle.loads(self._pending[_LENGTH.size : end])  # noqa: S301
            if isinstance(told, Ruleset):
                self._rulesets[index] = told
            else:
                self._modes[index] = told
            self._pending = self._pending[end:]
        return bool(chunk)


@dataclass(slots=True, kw_only=True)
class _Place:
    """A namespace as the child knows it."""

    path: Path
    mode: ProxyMode | None
    next_ask_s: float
    is_kept: bool = False
    watcher: Watcher | None = None
    rules: Ruleset | None = None

    def news(self) -> Iterator[Ruleset | ProxyMode | None]:
        """Look, and yield what is not as it was."""
        ruleset = self._ruleset()
        if ruleset is not None:
            yield ruleset
            if self.rules is not None and self.rules.proxy_mode != ruleset.proxy_mode:
                self.next_ask_s -= ASK_INTERVAL_S
            self.rules = ruleset
        if time.monotonic() >= self.next_ask_s:
            self.next_ask_s = time.monotonic() + ASK_INTERVAL_S
            mode = proxy_mode.ask_apart(self.path)
            if mode != self.mode:
                self.mode = mode
                yield mode

    def _ruleset(self) -> Ruleset | None:
        try:
            if self.watcher is None:
                self.watcher = Watcher(self.path, is_kept=self.is_kept)
            return self.watcher.ruleset() if self.watcher.has_changed() else None
        except TracerError as error:
            # The namespace is gone, or was never there: the tracer finds out by itself.
            return None if self.watcher is not None else Ruleset(unread=(str(error),))


def _keep(places: Sequence[_Place], channel: socket.socket) -> NoReturn:
    """Send each namespace's rules, then each change, until the tracer is gone."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # Ctrl-C goes to the whole group; the tracer decides when it is over.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        is_elsewhere = any(place.path != SELF for place in places)
        privileges.restrict_to((*_KEPT, *_TO_ENTER) if is_elsewhere else _KEPT)
        poll = select.poll()
        poll.register(channel, select.POLLIN | select.POLLHUP)
        while True:
            for index, place in enumerate(places):
                for told in place.news():
                    message = pickle.dumps((index, told))
                    channel.sendall(_LENGTH.pack(len(message)) + message)
            if poll.poll(_INTERVAL_S * 1000):
                break
    finally:
        os._exit(0)


_ENDED = "the child that reads rules has ended: changes since then are not known"
