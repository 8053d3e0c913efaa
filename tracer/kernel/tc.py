"""Programs at tc of every interface of a namespace, including those that appear later."""

import errno
import logging
import os
import select
import threading
from collections.abc import Mapping, Sequence

from tracer.errors import LoadError, NetnsError, TracerError
from tracer.kernel import bpf_syscall
from tracer.kernel.interfaces import InterfaceWatcher
from tracer.kernel.netns import Netns, inside

_log = logging.getLogger(__name__)

_RETRY_MS = 1000


class TcLinks:
    """
    TCX links on every interface of one namespace.

    A thread stays in the namespace to attach to interfaces that appear later, which must be done
    from inside. Once there it needs no privilege, so it keeps working after root was dropped.
    Create it after everything that forks.

    Raises:
        LoadError: If an interface cannot be attached to.
        NetnsError: If the namespace cannot be entered.
    """

    def __init__(self, netns: Netns, programs: Mapping[int, int]) -> None:
        """
        Args:
            netns: The namespace.
            programs: Program descriptors, by ``TCX_INGRESS`` or ``TCX_EGRESS``.
        """
        self._netns = netns
        self._programs = dict(programs)
        self._links: dict[int, list[int]] = {}
        # By reason: how many interfaces, and the name of the last.
        self._refused: dict[str, tuple[int, str]] = {}
        self._error: TracerError | None = None
        self._is_attached = threading.Event()
        self._stop, self._stopper = os.pipe()
        self._thread = threading.Thread(
            target=self._run, name=f"srcip-tc-{netns.inode}", daemon=True
        )
        self._thread.start()
        self._is_attached.wait()
        if self._error is not None:
            self.close()
            raise self._error

    @property
    def devices(self) -> int:
        """How many interfaces have both programs attached."""
        return sum(len(fds) == len(self._programs) for fds in list(self._links.values()))

    @property
    def refused(self) -> Sequence[str]:
        """What is not seen of interfaces that appeared later, a line per reason."""
        return tuple(
            f"tc of {_interfaces(count, name)} of {self._netns.node}, added after the start: {why}"
            for why, (count, name) in list(self._refused.items())
        )

    def close(self) -> None:
        """Detach from all interfaces, and end the thread."""
        if self._stopper >= 0:
            os.close(self._stopper)
            self._stopper = -1
            self._thread.join()
            os.close(self._stop)

    def _run(self) -> None:
        try:
            with inside(self._netns.path):
                self._follow()
        except TracerError as error:
            self._error = error
        finally:
            self._is_attached.set()
            for ifindex in list(self._links):
                self._detach(ifindex)

    def _follow(self) -> None:
        watcher = InterfaceWatcher(self._netns)
        try:
            for ifindex, name in watcher.snapshot().names.items():
                try:
                    self._attach(ifindex)
                except OSError as error:
                    raise LoadError(self._cannot(name, error)) from error
            self._is_attached.set()
            poll = select.poll()
            poll.register(watcher, select.POLLIN)
            poll.register(self._stop, select.POLLIN | select.POLLHUP)
            wait_ms = None
            while self._stop not in dict(poll.poll(wait_ms)):
                wait_ms = None if self._has_followed(watcher) else _RETRY_MS
        finally:
            watcher.close()

    def _has_followed(self, watcher: InterfaceWatcher) -> bool:
        """Attach to new interfaces; return False if the kernel did not list them."""
        try:
            names = watcher.snapshot().names
        except NetnsError as error:
            _log.warning("%s", error)
            return False
        for ifindex in list(self._links):
            if ifindex not in names or self._was_replaced(ifindex):
                self._detach(ifindex)
        for ifindex in names.keys() - self._links.keys():
            try:
                self._attach(ifindex)
            except OSError as error:
                self._refuse(names[ifindex], error)
        return True

    def _attach(self, ifindex: int) -> None:
        fds = self._links[ifindex] = []
        for attach_type, program in self._programs.items():
            try:
                fds.append(bpf_syscall.create_tcx_link(program, ifindex, attach_type))
            except OSError as error:
                if error.errno == errno.ENODEV:
                    self._detach(ifindex)  # it is gone again
                    return
                raise

    def _was_replaced(self, ifindex: int) -> bool:
        """Whether the interface is another than we attached to: numbers are used again."""
        return not all(map(bpf_syscall.is_tcx_attached, self._links[ifindex]))

    def _detach(self, ifindex: int) -> None:
        for fd in self._links.pop(ifindex, ()):
            os.close(fd)

    def _cannot(self, name: str, error: OSError) -> str:
        why = os.strerror(error.errno or 0)
        return f"cannot attach to tc of {name} in the namespace of {self._netns.node}: {why}"

    def _refuse(self, name: str, error: OSError) -> None:
        why = os.strerror(error.errno or 0)
        count, _ = self._refused.get(why, (0, name))
        self._refused[why] = count + 1, name
        if not count:
            _log.warning("%s", self._cannot(name, error))


def _interfaces(count: int, last: str) -> str:
    return last if count == 1 else f"{count} interfaces (the last is {last})"
