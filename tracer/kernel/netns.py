"""Network namespaces: find one by name, PID or path, and work inside it."""

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tracer.errors import NetnsError

NETNS_DIR = Path("/run/netns")
SELF = Path("/proc/thread-self/ns/net")
CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Netns:
    """
    A network namespace to trace, and the node it belongs to.

    ``inode`` is its inode number (``lsns -t net``), which identifies it in records.
    """

    path: Path
    inode: int
    node: str

    def is_present(self) -> bool:
        """Whether the path still refers to this namespace."""
        try:
            return self.path.stat().st_ino == self.inode
        except (FileNotFoundError, ProcessLookupError):
            return False
        except PermissionError:
            # /proc/PID/ns of another user's process, after dropping root: the process still exists.
            return True


def find(spec: str, default_node: str) -> Netns:
    """
    Look up a namespace by what the user typed: ``NAME|PID|PATH[=NODE]``.

    Args:
        spec: A name in /run/netns, a process ID, or a path that contains a slash.
        default_node: The node's name if the user gave none and the namespace has no name.

    Raises:
        NetnsError: If there is no such namespace.
    """
    where, _, node = spec.partition("=")
    if not where:
        raise NetnsError("no network namespace '': a name, a process ID or a path is missing")
    if "/" in where:
        path, fallback = Path(where), default_node
    elif where.isdecimal():
        path, fallback = Path(f"/proc/{where}/ns/net"), default_node
    else:
        path, fallback = NETNS_DIR / where, where
    try:
        inode = path.stat().st_ino
    except OSError as error:
        hint = "; see 'ip netns list'" if path.parent == NETNS_DIR else ""
        raise NetnsError(
            f"no network namespace {where!r}: {error.strerror} ({path}){hint}"
        ) from error
    return Netns(path=path, inode=inode, node=node or fallback)


def current(node: str) -> Netns:
    """Return this thread's namespace."""
    return Netns(path=SELF, inode=SELF.stat().st_ino, node=node)


@contextmanager
def inside(path: Path) -> Iterator[None]:
    """
    Move the calling thread into a namespace, and back afterwards.

    Sockets and links created inside stay in that namespace. Entering the current namespace needs no
    privilege, so the node's own can be traced without CAP_SYS_ADMIN.

    Raises:
        NetnsError: If the namespace is gone or cannot be entered.
    """
    if _is_here(path):
        yield
        return
    home = os.open(SELF, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(path)
        try:
            yield
        finally:
            _setns(home, SELF)
    finally:
        os.close(home)


def _is_here(path: Path) -> bool:
    try:
        return path.samefile(SELF)
    except OSError:
        return False


def _enter(path: Path) -> None:
    try:
        target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NetnsError(f"cannot open network namespace {path}: {error.strerror}") from error
    try:
        _setns(target, path)
    finally:
        os.close(target)


def _setns(fd: int, path: Path) -> None:
    # os.setns came with Python 3.12.
    if _libc.setns(fd, CLONE_NEWNET):
        error = ctypes.get_errno()
        # EINVAL: the file is not a network namespace; see setns(2).
        hint = (
            "that file is not a network namespace"
            if error == errno.EINVAL
            else "this needs root (CAP_SYS_ADMIN)"
        )
        raise NetnsError(f"cannot enter network namespace {path}: {os.strerror(error)}; {hint}")
