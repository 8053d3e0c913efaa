"""Create the Unix socket of the live stream, with its group, in place of a stale one."""

import errno
import os
import socket
from pathlib import Path

from tracer.stream.errors import StreamError
from tracer.stream.protocol import DEFAULT_SOCKET


def listen(path: Path, group: int | None, backlog: int) -> socket.socket:
    """
    Create the socket and listen, in place of one that an ended agent left behind.

    Args:
        path: Where to create it.
        group: Group ID that owns it; None for the process's own.
        backlog: How many connections may wait to be accepted.

    Raises:
        StreamError: If it cannot be created, or another agent listens there.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        # Create no other directory: a missing one may be a typing error.
        if path == Path(DEFAULT_SOCKET):
            path.parent.mkdir(mode=0o755, exist_ok=True)
        if path.is_socket():
            _remove_stale(path)
        # Nobody may connect before the group is set.
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        if group is not None:
            _give(path, group)
        path.chmod(0o660)
        listener.listen(backlog)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        why = error.strerror or error
        if isinstance(error, FileNotFoundError):
            why = f"there is no directory {path.parent}"
        elif error.errno == errno.EADDRINUSE and not path.is_socket():
            why = "something that is not a socket has that name"
        raise StreamError(
            f"cannot listen on {path}: {why}; choose another with --stream-socket, or --no-stream"
        ) from error
    except StreamError:
        listener.close()
        raise
    return listener


def _give(path: Path, group: int) -> None:
    try:
        os.chown(path, -1, group)
    except PermissionError:
        path.unlink()
        raise StreamError(
            f"cannot give {path} to group {group}: this needs CAP_CHOWN, or membership in the group"
        ) from None


def _remove_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as probe:
        # EAGAIN means that the backlog is full: an agent listens there, so it is not stale.
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass
    raise StreamError(
        f"another agent listens on {path}; choose another with --stream-socket, or --no-stream"
    )
