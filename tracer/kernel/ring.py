"""Reading BPF ring buffers through libbpf."""

import ctypes
import os
import select
from collections.abc import Sequence

from tracer.errors import LoadError
from tracer.kernel.btf import libbpf

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
# Stop after this many, so that a kernel that writes faster than we read cannot hold us in one call.
_BATCH = 16384
_STOP = -105  # ENOBUFS: any negative number ends ring_buffer__consume()


class RingReader:
    """Reads several ring buffers as one."""

    def __init__(self, map_fds: Sequence[int]) -> None:
        self._lib = libbpf()
        self._lib.ring_buffer__new.restype = ctypes.c_void_p
        self._batch: list[bytes] = []
        # Keep a reference: ctypes frees a callback without one.
        self._callback = _CALLBACK(self._take)
        manager = None
        for fd in map_fds:
            if manager is None:
                manager = self._lib.ring_buffer__new(fd, self._callback, None, None)
                failed = not manager
            else:
                failed = self._lib.ring_buffer__add(
                    ctypes.c_void_p(manager), fd, self._callback, None
                )
            if failed:
                raise LoadError(
                    f"cannot map a ring buffer into memory: {os.strerror(ctypes.get_errno())}"
                )
        self._manager = ctypes.c_void_p(manager)
        self._epoll_fd = self._lib.ring_buffer__epoll_fd(self._manager)
        self._poll = select.poll()
        self._poll.register(self._epoll_fd, select.POLLIN)

    def wake_on(self, fd: int) -> None:
        """Make `read` also return early when a descriptor becomes readable."""
        self._poll.register(fd, select.POLLIN)

    def read(self, timeout_s: float) -> list[bytes]:
        """
        Wait, then return the available records in order of time.

        The programs wake the reader only when a ring fills up, so a record may wait for the whole
        time-out.

        Args:
            timeout_s: How long to wait at most. A signal handler that raises ends it early.
        """
        self._poll.poll(timeout_s * 1000)
        self._lib.ring_buffer__consume(self._manager)
        batch, self._batch = self._batch, []
        # The rings were drained one after the other.
        batch.sort(key=_ktime_ns)
        return batch

    def close(self) -> None:
        """Unmap the rings."""
        self._lib.ring_buffer__free(self._manager)

    def _take(self, _context: int, data: int, size: int) -> int:
        self._batch.append(ctypes.string_at(data, size))
        return _STOP if len(self._batch) >= _BATCH else 0


def _ktime_ns(record: bytes) -> bytes:
    # A record starts with its time, in little endian; reversed, the bytes compare as numbers.
    return record[7::-1]
