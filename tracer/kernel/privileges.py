"""What tracing takes, and giving it up once everything is attached."""

import ctypes
import os
import struct
from contextlib import suppress
from pathlib import Path

from tracer.errors import LoadError

# include/uapi/linux/capability.h
_CAP_NET_ADMIN, _CAP_SYS_ADMIN, _CAP_SYSLOG, _CAP_PERFMON, _CAP_BPF = 12, 21, 34, 38, 39
_VERSION_3 = 0x20080522
_PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 38, 24
_NOBODY = 65534

_libc = ctypes.CDLL(None, use_errno=True)


def effective_capabilities() -> int:
    """Return this thread's effective capabilities as a bit mask."""
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def missing_for_tracing() -> list[str]:
    """Return the capabilities that loading and attaching take and we lack."""
    mask = effective_capabilities()

    def has(number: int) -> bool:
        return bool(mask >> number & 1)

    # Without CAP_SYSLOG the kernel hides the symbols by which BCC tells what it may call.
    missing = [
        name
        for name, number in (("CAP_NET_ADMIN", _CAP_NET_ADMIN), ("CAP_SYSLOG", _CAP_SYSLOG))
        if not has(number)
    ]
    if not has(_CAP_SYS_ADMIN):
        missing += [
            name
            for name, number in (("CAP_BPF", _CAP_BPF), ("CAP_PERFMON", _CAP_PERFMON))
            if not has(number)
        ]
    return missing


def require_for_tracing() -> None:
    """
    Refuse early and in one line, where the kernel would say only EPERM.

    Raises:
        LoadError: If a capability is missing.
    """
    missing = missing_for_tracing()
    if missing:
        raise LoadError(f"tracing takes root: {', '.join(missing)} missing; try with sudo")


def drop() -> None:
    """
    Give up root for good: become nobody, without capabilities or a way to regain them.

    Open descriptors keep working: links stay attached, rings and counters stay readable. Files
    cannot be opened or made any more that nobody may not.
    """
    if os.geteuid() == 0:
        for capability in range(64):
            # Fails with EINVAL past the last capability that the kernel knows.
            if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
                break
        # A container may give root no CAP_SETUID: then it stays root by name, without powers.
        with suppress(PermissionError):
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    header = struct.pack("=Ii", _VERSION_3, 0)
    if _libc.capset(header, bytes(24)) or _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise LoadError(f"cannot drop privileges: {os.strerror(ctypes.get_errno())}")
