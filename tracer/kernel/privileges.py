"""The capabilities that tracing needs, and dropping them once everything is attached."""

import ctypes
import errno
import logging
import os
import struct
import threading
from collections.abc import Iterable
from enum import IntEnum
from functools import cache
from pathlib import Path

from tracer.errors import LoadError
from tracer.kernel import probes


class Capability(IntEnum):
    """The capabilities used here: include/uapi/linux/capability.h."""

    CAP_SETGID = 6
    CAP_SETUID = 7
    CAP_SETPCAP = 8
    CAP_NET_ADMIN = 12
    CAP_NET_RAW = 13
    CAP_SYS_PTRACE = 19
    CAP_SYS_ADMIN = 21
    CAP_SYSLOG = 34
    CAP_PERFMON = 38
    CAP_BPF = 39


_VERSION_3 = 0x20080522
_PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 8, 38, 24
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 47, 2
_NOBODY = 65534
# Becoming nobody needs both.
_IDENTITY = frozenset({Capability.CAP_SETUID, Capability.CAP_SETGID})
_NONE: frozenset[Capability] = frozenset()

_log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)


def effective_capabilities() -> int:
    """Return this thread's effective capabilities as a bit mask."""
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def missing_for_tracing() -> list[str]:
    """Return the capabilities that loading and attaching need and this thread lacks."""
    # Without CAP_SYSLOG the kernel hides the symbols by which BCC finds the helpers it may call.
    needed = [Capability.CAP_NET_ADMIN, Capability.CAP_SYSLOG]
    if not _has({Capability.CAP_SYS_ADMIN}):
        needed += [Capability.CAP_BPF, Capability.CAP_PERFMON]
    elif maps_take_bpf():
        needed.append(Capability.CAP_BPF)
    return [each.name for each in needed if not _has({each})]


def require_for_tracing() -> None:
    """
    Fail early and with a reason, where the kernel would only say EPERM.

    Raises:
        LoadError: If a capability is missing, bpf() is forbidden, or the user is not root.
    """
    missing = missing_for_tracing()
    if missing:
        raise LoadError(f"tracing needs root: {', '.join(missing)} missing; try with sudo")
    if not probes.may_load():
        raise LoadError(
            "bpf() is not permitted, though no capability is missing: a seccomp profile (some want"
            " CAP_SYS_ADMIN for it), a security module or lockdown forbids it; see docs/install.md"
        )
    if os.geteuid() != 0:
        # As another user BCC reads no kernel symbols, and would call helpers that do not exist.
        raise LoadError(
            "tracing needs the user root besides these capabilities, because BCC compiles for no "
            "other; try with sudo"
        )


def drop(*, is_quiet: bool = False, reads_maps: bool = False) -> None:
    """
    Drop root for good: become nobody, without capabilities or a way to regain them.

    Open descriptors keep working: links stay attached, rings and counters stay readable. New files
    can be opened only where nobody may. Other threads become nobody, too, if they started with
    `restrict_thread`. What cannot be dropped for lack of a capability is a warning, unless
    ``is_quiet``. This thread keeps CAP_BPF if it ``reads_maps`` and the kernel requires it for
    that.
    """
    can_change = os.geteuid() == 0 and _has(_IDENTITY)
    kept = frozenset({Capability.CAP_BPF}) if reads_maps and maps_take_bpf() else _NONE
    if not is_quiet:
        _warn_of_what_stays()
    _limit_bounding_set(_NONE)
    # A container may lack CAP_SETUID: then the process stays user root, without capabilities.
    if can_change:
        # The C library makes every thread do the same, and aborts the process if one cannot.
        os.setgroups([])
        if kept:
            _libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _set_capabilities(kept)
    _forbid_regaining()


@cache
def maps_take_bpf() -> bool:
    """
    Whether reading maps needs CAP_BPF. Call it before dropping privileges.

    Before Linux 5.19 (bpf: refine kernel.unprivileged_bpf_disabled behaviour) that sysctl, which
    distributions set, forbids every bpf() call without the capability.
    """
    answers: list[int] = []

    def ask() -> None:
        # This thread may still be exiting when all threads become nobody, so it must be able to.
        _set_capabilities(frozenset(each for each in _IDENTITY if _has({each})))
        answers.append(probes.lookup_error())

    # Capabilities are per thread: this one drops its own, then ends.
    asking = threading.Thread(target=ask)
    asking.start()
    asking.join()
    return answers == [errno.EPERM]


def restrict_thread() -> None:
    """
    Drop, in a thread that starts before `drop`, everything that becoming nobody does not need.

    Capabilities are per thread, and no thread can drop those of another.
    """
    can_change = os.geteuid() == 0 and _has(_IDENTITY)
    _limit_bounding_set(_NONE)
    _set_capabilities(_IDENTITY if can_change else _NONE)
    _forbid_regaining()


def restrict_to(kept: Iterable[Capability]) -> None:
    """Drop all but some capabilities, for this thread and the programs that it executes."""
    held = frozenset(each for each in kept if _has({each}))
    _limit_bounding_set(held)
    # Programs executed by root get the bounding set, those of other users the ambient set.
    is_root = os.geteuid() == 0
    _set_capabilities(held, _NONE if is_root else held)
    for number in () if is_root else held:
        _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0)
    _forbid_regaining()


def _warn_of_what_stays() -> None:
    missing = [each.name for each in sorted(_IDENTITY) if not _has({each})]
    if missing and os.geteuid() == 0:
        _log.warning(
            "%s missing: srcip keeps running as user root, without capabilities", ", ".join(missing)
        )
    if not _has({Capability.CAP_SETPCAP}):
        _log.warning(
            "CAP_SETPCAP missing: the bounding set cannot be dropped; srcip relies on no_new_privs"
        )


def _has(wanted: Iterable[Capability]) -> bool:
    mask = effective_capabilities()
    return all(mask >> number & 1 for number in wanted)


def _limit_bounding_set(kept: frozenset[Capability]) -> None:
    for number in range(64):
        # Fails with EINVAL past the kernel's last capability, and with EPERM without CAP_SETPCAP:
        # then no_new_privs has to do.
        if number not in kept and _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0):
            break


def _set_capabilities(
    kept: frozenset[Capability], inheritable: frozenset[Capability] = _NONE
) -> None:
    masks = [sum(1 << number for number in each) for each in (kept, kept, inheritable)]
    header = struct.pack("=Ii", _VERSION_3, 0)
    # Effective, permitted, inheritable: the lower 32 bits of each, then the upper.
    halves = [mask >> shift & 0xFFFFFFFF for shift in (0, 32) for mask in masks]
    if _libc.capset(header, struct.pack("=6I", *halves)):
        raise LoadError(f"cannot drop privileges: {os.strerror(ctypes.get_errno())}")


def _forbid_regaining() -> None:
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise LoadError(f"cannot drop privileges: {os.strerror(ctypes.get_errno())}")
