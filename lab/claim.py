"""The names of labs, and which labs are alive: one locked file for each."""

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tracer.errors import LabError
from tracer.kernel.netns import NETNS_DIR

PREFIX = "srcip-lab-"
LOCK_DIR = Path("/run/srcip-lab")

_NAME = re.compile(rf"({PREFIX}[0-9a-f]{{6}})\.lock")


@contextmanager
def claim() -> Iterator[str]:
    """
    Hold a new lab's name.

    The kernel releases the lock when the process dies, however it dies. That distinguishes a
    leftover from a living lab.

    Raises:
        LabError: If the lock cannot be made, which needs root.
    """
    with _registry():
        name = f"{PREFIX}{secrets.token_hex(3)}"
        path = LOCK_DIR / f"{name}.lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield name
    finally:
        # If removing the lab was interrupted, the file stays to tell the next start.
        if not namespaces(name):
            path.unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def dead() -> Iterator[list[str]]:
    """
    Yield the names of labs whose process has died, and forget them at the end.

    No lab can be claimed meanwhile. If the caller fails to remove them, they are remembered.
    """
    with _registry():
        paths = [path for path in sorted(LOCK_DIR.iterdir()) if _is_dead(path)]
        yield [path.stem for path in paths]
        for path in paths:
            path.unlink()


def namespaces(name: str) -> list[Path]:
    """Return the network namespaces that a lab has now."""
    return sorted(NETNS_DIR.glob(f"{name}-*"))


def _is_dead(path: Path) -> bool:
    if not _NAME.fullmatch(path.name):
        return False
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False  # its lab has just ended, which does not need the registry
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return path.exists()


@contextmanager
def _registry() -> Iterator[None]:
    # Without this lock, a new lab's file could look dead before it is locked.
    try:
        LOCK_DIR.mkdir(mode=0o700, exist_ok=True)
        directory = os.open(LOCK_DIR, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise LabError(f"cannot use {LOCK_DIR}: {error.strerror}; the lab needs root") from error
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)
