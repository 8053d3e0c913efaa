"""
Keeps rules up to date in a child that stays privileged, while the tracer itself does not.

Each reading of rules needs CAP_NET_ADMIN, which a tracer drops once it is attached. The child does
nothing else: it watches for changes, runs the node's tools and sends what they print. It also has
unprivileged children ask kube-proxy for its mode, in each namespace.
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
# How often to ask kube-proxy; at once if its rules show another mode than before.
ASK_INTERVAL_S = 60.0
_PR_SET_PDEATHSIG = 1
_LENGTH = struct.Struct("=Q")
# To read rules, also of legacy iptables; and for the children that ask kube-proxy to drop the rest.
_KEPT = (
    Capability.CAP_NET_ADMIN,
    Capability.CAP_NET_RAW,
    Capability.CAP_SETUID,
    Capability.CAP_SETGID,
)
# To enter other namespaces, also through /proc of a process with more capabilities.
_TO_ENTER = (Capability.CAP_SYS_ADMIN, Capability.CAP_SYS_PTRACE)


class RulesetKeeper:
    """
    The rules of several namespaces, at most a second old.

    Start it before any thread, and before privileges are dropped. The child does the first reading
    while the caller goes on.
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
            proxy_modes: The mode that each namespace's kube-proxy reported; None if none.
            follows_modes: Whether to keep asking kube-proxy for its mode.
            is_kept: Whether rulesets keep the printed rules, for a recording.
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
        Return the latest rules of a namespace, by its index among the given paths.

        Waits for the first reading. If the child has ended, its last rules stay, marked as such.
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
        """Return the mode that a namespace's kube-proxy last reported; None if none."""
        return self._modes[index]

    def close(self) -> None:
        """End the child by closing its socket."""
        self._channel.close()
        with suppress(ChildProcessError):
            os.waitpid(self._child, 0)

    def _receive(self) -> bool:
        """Receive what is there; return whether the child is still alive."""
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
            # From our own child, which has more privileges than this process: pickle is safe here.
            index, told = pickle.loads(self._pending[_LENGTH.size : end])  # noqa: S301
            if isinstance(told, Ruleset):
                self._rulesets[index] = told
            else:
                self._modes[index] = told
            self._pending = self._pending[end:]
        return bool(chunk)


@dataclass(slots=True, kw_only=True)
class _Place:
    """The child's state of one namespace."""

    path: Path
    mode: ProxyMode | None
    next_ask_s: float
    is_kept: bool = False
    watcher: Watcher | None = None
    rules: Ruleset | None = None

    def news(self) -> Iterator[Ruleset | ProxyMode | None]:
        """Yield the rules and the mode if they have changed."""
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
            # The namespace has gone, or never existed: the tracer finds out by itself.
            return None if self.watcher is not None else Ruleset(unread=(str(error),))


def _keep(places: Sequence[_Place], channel: socket.socket) -> NoReturn:
    """Send each namespace's rules, then each change, until the tracer has ended."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # Ctrl-C goes to the whole process group; the tracer decides when to end.
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
