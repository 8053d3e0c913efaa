"""
Rules kept up to date by a child that stays privileged, while the tracer itself does not.

Reading rules takes CAP_NET_ADMIN each time, which a tracer gives up once it is attached. The child
does nothing else: it looks for changes, runs the node's tools, and sends what they say.
"""

import ctypes
import os
import pickle
import select
import signal
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from tracer.errors import TracerError
from tracer.ruleset.model import Ruleset
from tracer.ruleset.reader import Watcher

_INTERVAL_S = 1.0
_PR_SET_PDEATHSIG = 1
_LENGTH = struct.Struct("=Q")


class RulesetKeeper:
    """
    The rules of several namespaces, as of a second ago at the most.

    Start it before any thread and before privileges are dropped. The first reading goes on in the
    child while the caller does other things.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """
        Start the child.

        Args:
            paths: The namespaces.
        """
        self._rulesets: dict[int, Ruleset] = {}
        self._pending = b""
        self._channel, theirs = socket.socketpair()
        self._child = os.fork()
        if self._child == 0:
            self._channel.close()
            _keep(paths, theirs)
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
            index, ruleset = pickle.loads(self._pending[_LENGTH.size : end])  # noqa: S301
            self._rulesets[index] = ruleset
            self._pending = self._pending[end:]
        return bool(chunk)


def _keep(paths: Sequence[Path], channel: socket.socket) -> NoReturn:
    """Send each namespace's rules, then each change, until the tracer is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # Ctrl-C goes to the whole group; the tracer decides when it is over.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    poll = select.poll()
    poll.register(channel, select.POLLIN | select.POLLHUP)
    watchers: dict[int, Watcher] = {}
    try:
        while True:
            for index, path in enumerate(paths):
                _look(index, path, watchers, channel)
            if poll.poll(_INTERVAL_S * 1000):
                break
    finally:
        os._exit(0)


def _look(index: int, path: Path, watchers: dict[int, Watcher], channel: socket.socket) -> None:
    try:
        if index not in watchers:
            watchers[index] = Watcher(path)
        if not watchers[index].has_changed():
            return
        ruleset = watchers[index].ruleset()
    except TracerError as error:
        # The namespace is gone, or was never there: the tracer finds out by itself.
        ruleset = Ruleset(unread=(str(error),))
        if index in watchers:
            return
    message = pickle.dumps((index, ruleset))
    channel.sendall(_LENGTH.pack(len(message)) + message)


_ENDED = "the child that reads rules has ended: changes since then are not known"
