"""Which program types the running kernel supports, found by loading one that does nothing."""

import ctypes
import errno
import os
import struct

from tracer.kernel import btf

# enum bpf_prog_type, enum bpf_attach_type: include/uapi/linux/bpf.h
SCHED_CLS, NETFILTER = 3, 32
ATTACH_NETFILTER, ATTACH_TCX_INGRESS = 45, 46
# r0 = 1 (NF_ACCEPT, and harmless elsewhere); exit
_RETURN_1 = struct.pack("=BBhi BBhi", 0xB7, 0, 0, 1, 0x95, 0, 0, 0)


def load_trivial(program_type: int, attach_type: int) -> int:
    """
    Load a program that only returns 1, which is NF_ACCEPT.

    Returns:
        Its descriptor.

    Raises:
        OSError: If the kernel has no such program type, or loading is not permitted.
    """
    # The beginning of struct bpf_prog_load_opts.
    options = struct.pack("=QiI", 16, 0, attach_type)
    fd = btf.libbpf().bpf_prog_load(
        program_type, b"srcip_probe", b"GPL", _RETURN_1, ctypes.c_size_t(2), options
    )
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(fd)


def may_load() -> bool:
    """Whether programs can be loaded at all: not only a missing capability can forbid it."""
    try:
        os.close(load_trivial(SCHED_CLS, 0))
    except OSError as error:
        return error.errno not in (errno.EPERM, errno.EACCES)
    return True


def lookup_error() -> int:
    """Look up an element with an invalid descriptor: EBADF, or why bpf() is not permitted."""
    btf.libbpf().bpf_map_lookup_elem(-1, bytes(8), ctypes.create_string_buffer(8))
    return ctypes.get_errno()


def has_netfilter_links() -> bool:
    """Whether the kernel loads netfilter programs; it then also has links for them (6.4)."""
    return _loads(NETFILTER, ATTACH_NETFILTER)


def has_tcx_links() -> bool:
    """Whether the kernel has TCX links (6.6): it then complains of the missing interface."""
    # Loading a program proves nothing: before 6.6 any attach type is accepted.
    try:
        program = load_trivial(SCHED_CLS, 0)
    except OSError:
        return False
    try:
        link = btf.libbpf().bpf_link_create(program, 0, ATTACH_TCX_INGRESS, None)
        return bool(link == -errno.ENODEV)
    finally:
        os.close(program)


def _loads(program_type: int, attach_type: int) -> bool:
    """Whether a program that does nothing can be loaded."""
    try:
        os.close(load_trivial(program_type, attach_type))
    except OSError:
        return False
    return True
