"""
The parts of the bpf() system call that srcip uses, through the libbpf that Debian's BCC installs.

Netfilter and TCX links use the bare system call, because libbpf 1.1 does not know their options.
"""

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator
from functools import lru_cache

from tracer.errors import LoadError
from tracer.kernel.btf import libbpf

# enum bpf_cmd, enum bpf_attach_type, enum bpf_link_type: include/uapi/linux/bpf.h
_BPF_PROG_QUERY, _BPF_LINK_CREATE = 16, 28
_BPF_NETFILTER = 45
TCX_INGRESS, TCX_EGRESS = 46, 47
_BPF_F_BEFORE, _BPF_F_AFTER = 1 << 3, 1 << 4
LINK_TYPE_NETFILTER = 10

# bpf()'s number: arch/x86/entry/syscalls, and include/uapi/asm-generic/unistd.h for the rest.
_SYSCALL = {"x86_64": 321, "s390x": 351, "ppc64le": 361}.get(platform.machine(), 280)
_ATTR_SIZE = 128
# bpf_mprog_max() of kernel/bpf/mprog.c
_TCX_PROGRAMS = 63

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def create_netfilter_link(program: int, family: int, hook: int, priority: int) -> int:
    """
    Attach a netfilter program in this thread's network namespace.

    Args:
        program: The program's descriptor.
        family: NFPROTO_IPV4 or NFPROTO_IPV6.
        hook: ``enum nf_inet_hooks``.
        priority: Its place among the hook's functions; must be free for that family.

    Returns:
        The link's descriptor. Closing it detaches the program.

    Raises:
        OSError: EBUSY if the priority is taken, EINVAL if the kernel has no such links.
    """
    attr = struct.pack("=IIII IIiI", program, 0, _BPF_NETFILTER, 0, family, hook, priority, 0)
    buffer = ctypes.create_string_buffer(attr, _ATTR_SIZE)
    fd = _libc.syscall(_SYSCALL, _BPF_LINK_CREATE, buffer, _ATTR_SIZE)
    if fd < 0:
        raise _os_error("create a netfilter link")
    return int(fd)


def create_tcx_link(program: int, ifindex: int, attach_type: int) -> int:
    """
    Attach a program to an interface's tc hook, in this thread's network namespace.

    It runs before all other programs at ingress, and after all at egress.

    Args:
        program: The program's descriptor.
        ifindex: The interface.
        attach_type: ``TCX_INGRESS`` or ``TCX_EGRESS``.

    Returns:
        The link's descriptor. Closing it detaches the program.

    Raises:
        OSError: ENODEV if there is no such interface, EINVAL if the kernel has no such links.
    """
    order = _BPF_F_BEFORE if attach_type == TCX_INGRESS else _BPF_F_AFTER
    attr = struct.pack("=IIII IIQ", program, ifindex, attach_type, order, 0, 0, 0)
    buffer = ctypes.create_string_buffer(attr, _ATTR_SIZE)
    fd = _libc.syscall(_SYSCALL, _BPF_LINK_CREATE, buffer, _ATTR_SIZE)
    if fd < 0:
        raise _os_error("create a TCX link")
    return int(fd)


def is_tcx_attached(link: int) -> bool:
    """Whether a TCX link still has its interface, which may be gone, or was detached by others."""
    # struct bpf_link_info: tcx.ifindex is at offset 16.
    return bool(struct.unpack_from("=I", _info(link), 16)[0])


def tcx_programs(ifindex: int, attach_type: int) -> list[int]:
    """
    Return the IDs of the TCX programs of an interface, in this thread's network namespace.

    Raises:
        OSError: If there is no such interface, it is not permitted, or the kernel has no TCX.
    """
    ids = (ctypes.c_uint32 * _TCX_PROGRAMS)()
    attr = struct.pack(
        "=IIII QII", ifindex, attach_type, 0, 0, ctypes.addressof(ids), _TCX_PROGRAMS, 0
    )
    buffer = ctypes.create_string_buffer(attr, _ATTR_SIZE)
    if _libc.syscall(_SYSCALL, _BPF_PROG_QUERY, buffer, _ATTR_SIZE) < 0:
        raise _os_error("query the programs at tc")
    count: int = struct.unpack_from("=I", buffer.raw, 24)[0]
    return list(ids[:count])


def open_raw_tracepoint(name: str, program: int) -> int:
    """
    Attach a raw tracepoint program; closing the returned descriptor detaches it.

    Raises:
        OSError: ENOENT if the kernel has no such tracepoint.
    """
    fd = libbpf().bpf_raw_tracepoint_open(name.encode(), program)
    if fd < 0:
        raise _os_error(f"attach to the tracepoint {name}")
    return int(fd)


class Map:
    """A BPF map by its descriptor, with keys and values as bytes."""

    def __init__(self, fd: int, key_size: int, value_size: int, *, is_per_cpu: bool = False):
        self.fd = fd
        self.key_size = key_size
        self.value_size = value_size
        if is_per_cpu:
            # The kernel rounds each CPU's value up to 8 bytes.
            self.value_size = (value_size + 7) // 8 * 8 * possible_cpus()

    def update(self, key: bytes, value: bytes) -> None:
        """Set an element, creating it if needed."""
        if libbpf().bpf_map_update_elem(self.fd, key, value, ctypes.c_uint64(0)):
            raise _os_error("update a map")

    def delete(self, key: bytes) -> None:
        """Remove an element, if it exists."""
        if libbpf().bpf_map_delete_elem(self.fd, key) and ctypes.get_errno() != errno.ENOENT:
            raise _os_error("delete from a map")

    def lookup(self, key: bytes) -> bytes | None:
        """Return an element's value, or None; for a per-CPU map all CPUs' values, concatenated."""
        value = ctypes.create_string_buffer(self.value_size)
        if libbpf().bpf_map_lookup_elem(self.fd, key, value):
            if ctypes.get_errno() == errno.ENOENT:
                return None
            raise _os_error("look up in a map")
        return value.raw

    def items(self, batch: int = 1024) -> Iterator[tuple[bytes, bytes]]:
        """
        Read all elements in batches, one system call each.

        Elements that are added or removed meanwhile may or may not be included.
        """
        keys = ctypes.create_string_buffer(self.key_size * batch)
        values = ctypes.create_string_buffer(self.value_size * batch)
        # The kernel's cursor: four bytes for hash maps, a whole key for others.
        place = ctypes.create_string_buffer(max(self.key_size, 8))
        start = None
        while True:
            count = ctypes.c_uint32(batch)
            failed = libbpf().bpf_map_lookup_batch(
                self.fd, start, place, keys, values, ctypes.byref(count), None
            )
            if failed and ctypes.get_errno() == errno.ENOSPC:
                # One bucket holds more than a batch.
                yield from self.items(batch * 2)
                return
            if failed and ctypes.get_errno() != errno.ENOENT:
                raise _os_error("read a map")
            yield from zip(
                _split(keys.raw, self.key_size, count.value),
                _split(values.raw, self.value_size, count.value),
                strict=True,
            )
            if failed:
                return
            start = place


def _split(raw: bytes, size: int, count: int) -> list[bytes]:
    return [raw[at : at + size] for at in range(0, size * count, size)]


def sum_cpus(value: bytes) -> int:
    """Add up the counters of a per-CPU value."""
    return sum(struct.unpack(f"={len(value) // 8}Q", value))


@lru_cache(maxsize=1)
def possible_cpus() -> int:
    """
    Return the number of possible CPUs, which is how many values a per-CPU map holds.

    Raises:
        LoadError: If it cannot be determined.
    """
    count = libbpf().libbpf_num_possible_cpus()
    if count < 1:
        raise LoadError("cannot read the number of possible CPUs from /sys/devices/system/cpu")
    return int(count)


def link_ids() -> Iterator[int]:
    """Yield the IDs of all BPF links on this machine. Needs CAP_SYS_ADMIN."""
    link_id = ctypes.c_uint32(0)
    while not libbpf().bpf_link_get_next_id(link_id, ctypes.byref(link_id)):
        yield link_id.value


def program_ids() -> Iterator[int]:
    """Yield the IDs of all BPF programs on this machine. Needs CAP_SYS_ADMIN."""
    program_id = ctypes.c_uint32(0)
    while not libbpf().bpf_prog_get_next_id(program_id, ctypes.byref(program_id)):
        yield program_id.value


def link_info(link_id: int) -> tuple[int, int] | None:
    """Return a link's type and its program's ID; None if the link is gone."""
    fd = libbpf().bpf_link_get_fd_by_id(link_id)
    if fd < 0:
        return None
    try:
        raw = _info(fd)
        return struct.unpack_from("=III", raw)[0], struct.unpack_from("=III", raw)[2]
    finally:
        os.close(fd)


def program_name(program_id: int) -> str | None:
    """Return a program's name (15 characters at most); None if the program is gone."""
    fd = libbpf().bpf_prog_get_fd_by_id(program_id)
    if fd < 0:
        return None
    try:
        # struct bpf_prog_info: name[16] is at offset 64.
        return _info(fd)[64:80].split(b"\0")[0].decode("ascii", "replace")
    finally:
        os.close(fd)


def program_runs(program: int) -> tuple[int, int]:
    """Return a program's run time in ns and run count; 0 unless kernel.bpf_stats_enabled is set."""
    # struct bpf_prog_info: run_time_ns and run_cnt are at offsets 192 and 200.
    run_time_ns, runs = struct.unpack_from("=QQ", _info(program), 192)
    return run_time_ns, runs


def program_misses(program: int) -> int:
    """Return how often a program was skipped because another ran on its CPU; 0 if not counted."""
    # struct bpf_prog_info: recursion_misses is at offset 208. It counts probes since Linux 6.7
    # (bpf: Count missed stats in trace_call_bpf).
    misses: int = struct.unpack_from("=Q", _info(program), 208)[0]
    return misses


def _info(fd: int) -> bytes:
    info = ctypes.create_string_buffer(232)
    size = ctypes.c_uint32(len(info))
    if libbpf().bpf_obj_get_info_by_fd(fd, info, ctypes.byref(size)):
        raise _os_error("ask for an object's info")
    return info.raw


def _os_error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"cannot {what}: {os.strerror(number)}")
