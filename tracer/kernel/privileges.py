"""What tracing takes, and giving it up once everything is attached."""

import ctypes
import os
import struct
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path

from tracer.errors import LoadError
from tracer.kernel import probes


class Capability(IntEnum):
    """Those that play a part here: include/uapi/linux/capability.h."""

    CAP_SETGID = 6
    CAP_SETUID = 7
    CAP_NET_ADMIN = 12
    CAP_NET_RAW = 13
    CAP_SYS_PTRACE = 19
    CAP_SYS_ADMIN = 21
    CAP_SYSLOG = 34
    CAP_PERFMON = 38
    CAP_BPF = 39


_VERSION_3 = 0x20080522
_PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 38, 24
_NOBODY = 65534
# To become nobody takes both.
_IDENTITY = frozenset({Capability.CAP_SETUID, Capability.CAP_SETGID})
_NONE: frozenset[Capability] = frozenset()

_libc = ctypes.CDLL(None, use_errno=True)


def effective_capabilities() -> int:
    """Return this thread's effective capabilities as a bit mask."""
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def missing_for_tracing() -> list[str]:
    """Return the capabilities that loading and attaching take and we lack."""
    # Without CAP_SYSLOG the kernel hides the symbols by which BCC tells what it may call.
    needed = [Capability.CAP_NET_ADMIN, Capability.CAP_SYSLOG]
    if not _has({Capability.CAP_SYS_ADMIN}):
        needed += [Capability.CAP_BPF, Capability.CAP_PERFMON]
    return [each.name for each in needed if not _has({each})]


def require_for_tracing() -> None:
    """
    Refuse early and in one line, where the kernel would say only EPERM.

    Raises:
        LoadError: If a capability is missing.
    """
    missing = missing_for_tracing()
    if missing:
        raise LoadError(f"tracing takes root: {', '.join(missing)} missing; try with sudo")
    if not probes.may_load():
        raise LoadError(
            "bpf() is not permitted, though no capability is missing: a seccomp profile that wants"
            " CAP_SYS_ADMIN for it, a security module or lockdown forbids it; see docs/install.md"
        )


def drop() -> None:
    """
    Give up root for good: become nobody, without capabilities or a way to regain them.

    Open descriptors keep working: links stay attached, rings and counters stay readable. Files
    cannot be opened or made any more that nobody may not. Other threads become nobody, too, if they
    have begun by `restrict_thread`.
    """
    can_change = os.geteuid() == 0 and _has(_IDENTITY)
    _limit_bounding_set(_NONE)
    # A container may give root no CAP_SETUID: then it stays root by name, without powers.
    if can_change:
        # The C library has every thread do the same, and ends the process where one cannot.
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _set_capabilities(_NONE)
    _forbid_regaining()


def restrict_thread() -> None:
    """
    Give up, in a thread that starts before `drop`, all that it does not take to become nobody.

    Capabilities belong to threads, and nobody can take them from another.
    """
    can_change = os.geteuid() == 0 and _has(_IDENTITY)
    _limit_bounding_set(_NONE)
    _set_capabilities(_IDENTITY if can_change else _NONE)
    _forbid_regaining()


def restrict_to(kept: Iterable[Capability]) -> None:
    """Give up everything but some capabilities, for this thread and the programs that it runs."""
    held = frozenset(each for each in kept if _has({each}))
    _limit_bounding_set(held)
    _set_capabilities(held)
    _forbid_regaining()


def _has(wanted: Iterable[Capability]) -> bool:
    mask = effective_capabilities()
    return all(mask >> number & 1 for number in wanted)


def _limit_bounding_set(kept: frozenset[Capability]) -> None:
    for number in range(64):
        # Fails with EINVAL past the last capability that the kernel knows; and with EPERM without
        # CAP_SETPCAP: then what forbids regaining has to do alone.
        if number not in kept and _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0):
            break


def _set_capabilities(kept: frozenset[Capability]) -> None:
    mask = sum(1 << number for number in kept)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    header = struct.pack("=Ii", _VERSION_3, 0)
    # Effective, permitted, inheritable; the lower half of each, then the upper.
    if _libc.capset(header, struct.pack("=6I", low, low, 0, high, high, 0)):
        raise LoadError(f"cannot drop privileges: {os.strerror(ctypes.get_errno())}")


def _forbid_regaining() -> None:
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise LoadError(f"cannot drop privileges: {os.strerror(ctypes.get_errno())}")
