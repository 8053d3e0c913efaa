"""Probes on kernel functions through perf_event_open(), which go away with the process."""

import ctypes
import fcntl
import os
import platform
import struct
from contextlib import suppress
from pathlib import Path

from tracer.errors import LoadError

_PMU_TYPE = Path("/sys/bus/event_source/devices/kprobe/type")
# Switches that disable all probes, where readable: Documentation/trace/kprobes.rst, and
# Documentation/admin-guide/sysctl/kernel.rst for ftrace, which most probes use.
_SWITCHES = (Path("/sys/kernel/debug/kprobes/enabled"), Path("/proc/sys/kernel/ftrace_enabled"))

# struct perf_event_attr up to config2, PERF_ATTR_SIZE_VER1: include/uapi/linux/perf_event.h
_ATTR = struct.Struct("=II 5Q II QQ")
_FLAG_FD_CLOEXEC = 8
_IOC_ENABLE, _IOC_SET_BPF = 0x2400, 0x40042408
# arch/x86/entry/syscalls, and include/uapi/asm-generic/unistd.h for the rest.
_SYSCALL = {"x86_64": 298, "s390x": 331, "ppc64le": 319}.get(platform.machine(), 241)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def require() -> None:
    """
    Check that the kernel has probes and that they are not switched off.

    Raises:
        LoadError: If not; it says why.
    """
    if not _PMU_TYPE.exists():
        raise LoadError(f"this kernel ({os.uname().release}) has no kprobes")
    for switch in _SWITCHES:
        with suppress(OSError):
            if switch.read_text().strip() == "0":
                raise LoadError(f"probes are switched off: {switch} is 0")


def attach(function: str, program: int) -> int:
    """
    Run a program at the first instruction of a kernel function, in every namespace.

    Args:
        function: The function; may be one of a loaded module.
        program: The descriptor of a kprobe program.

    Returns:
        A descriptor. Closing it detaches the program.

    Raises:
        OSError: If there is no such function, or it cannot be probed.
    """
    fd = _open(function)
    try:
        fcntl.ioctl(fd, _IOC_SET_BPF, program)
        fcntl.ioctl(fd, _IOC_ENABLE, 0)
    except OSError as error:
        os.close(fd)
        raise _cannot(function, error.errno or 0) from error
    return fd


def _open(function: str) -> int:
    name = ctypes.create_string_buffer(function.encode())
    kind = int(_PMU_TYPE.read_text())
    # config1 points to the function's name, config2 is the offset in it.
    attr = _ATTR.pack(kind, _ATTR.size, 0, 0, 0, 0, 0, 0, 0, ctypes.addressof(name), 0)
    # The program runs on every CPU, whichever CPU the event names.
    fd = _libc.syscall(_SYSCALL, attr, -1, 0, -1, _FLAG_FD_CLOEXEC)
    if fd < 0:
        raise _cannot(function, ctypes.get_errno())
    return int(fd)


def _cannot(function: str, number: int) -> OSError:
    return OSError(number, f"cannot probe {function}: {os.strerror(number)}")
