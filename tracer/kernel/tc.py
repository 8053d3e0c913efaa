"""Programs at tc of every interface of a namespace, also of those that come later."""

import errno
import logging
import os
import select
import threading
from collections import Counter
from collections.abc import Mapping

from tracer.errors import LoadError, NetnsError, TracerError
from tracer.kernel import bpf_syscall
from tracer.kernel.interfaces import InterfaceWatcher
from tracer.kernel.netns import Netns, inside

_log = logging.getLogger(__name__)


class TcLinks:
    """
    TCX links at every interface of one namespace.

    A thread stays in the namespace for interfaces that appear later: an interface is attached to
    from inside. It needs no privilege once it is there, so it works on after root was given up.
    Make it after everything that forks.

    Raises:
        LoadError: If an interface cannot be attached to.
        NetnsError: If the namespace cannot be entered.
    """

    def __init__(self, netns: Netns, programs: Mapping[int, int]) -> None:
        """
        Args:
            netns: The namespace.
            programs: The descriptor of a program by ``TCX_INGRESS`` or ``TCX_EGRESS``.
        """
        self._netns = netns
        self._programs = dict(programs)
        self._links: dict[int, list[int]] = {}
        self._refused: Counter[str] = Counter()
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
        """How many interfaces are attached to."""
        return len(self._links)

    @property
    def refused(self) -> Mapping[str, int]:
        """Why interfaces that came later could not be attached to, and how often."""
        return dict(self._refused)

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
            self._attach_missing(watcher.snapshot().names)
            self._is_attached.set()
            poll = select.poll()
            poll.register(watcher, select.POLLIN)
            poll.register(self._stop, select.POLLIN | select.POLLHUP)
            while self._stop not in dict(poll.poll()):
                try:
                    self._attach_missing(watcher.snapshot().names)
                except (LoadError, NetnsError) as error:
                    self._refuse(str(error))
        finally:
            watcher.close()

    def _attach_missing(self, names: Mapping[int, str]) -> None:
        for ifindex in self._links.keys() - names.keys():
            self._detach(ifindex)
        for ifindex in names.keys() - self._links.keys():
            self._attach(ifindex, names[ifindex])

    def _attach(self, ifindex: int, name: str) -> None:
        fds = self._links[ifindex] = []
        for attach_type, program in self._programs.items():
            try:
                fds.append(bpf_syscall.create_tcx_link(program, ifindex, attach_type))
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return  # it has gone again
                raise LoadError(
                    f"cannot attach to tc of {name} in the namespace of {self._netns.node}: "
                    f"{os.strerror(error.errno or 0)}"
                ) from error

    def _detach(self, ifindex: int) -> None:
        for fd in self._links.pop(ifindex, ()):
            os.close(fd)

    def _refuse(self, why: str) -> None:
        self._refused[why] += 1
        if self._refused[why] == 1:
            _log.warning("%s", why)
