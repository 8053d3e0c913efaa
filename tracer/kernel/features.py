"""What the running kernel supports, found by trying it, never by its version."""

import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

from tracer.errors import ConntrackError, LoadError, NetnsError
from tracer.kernel import (
    bpf_syscall,
    btf,
    bypasses,
    conntrack,
    kprobe,
    ladder,
    privileges,
    programs,
    proxy_mode,
)
from tracer.kernel.conntrack import ConntrackSource
from tracer.kernel.interfaces import InterfaceWatcher
from tracer.kernel.ladder import Rung
from tracer.kernel.netns import Netns
from tracer.kernel.probes import has_netfilter_links, has_tcx_links
from tracer.kernel.source import Settings
from tracer.ruleset import reader
from tracer.ruleset.model import IPVS_DEVICE, Ruleset


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was tried. ``is_needed`` says whether tracing fails without it."""

    name: str
    is_ok: bool
    detail: str
    is_needed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What srcip can see on this node. ``rung`` is None if it can see nothing."""

    checks: Sequence[Check]
    rung: str | None
    not_seen: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """A rung that was tried, and what it cannot see."""

    check: Check
    rung: str | None = None
    not_seen: Sequence[str] = ()


def examine(namespaces: Sequence[Netns], asked: Rung | None = None) -> Report:
    """
    Try everything that tracing needs. Attaches programs for a moment; changes nothing.

    Args:
        namespaces: What would be traced.
        asked: The only rung to try, if the user named one.
    """
    checks = [*_kernel_checks()]
    if privileges.missing_for_tracing():
        # Every further check would only fail for lack of privileges.
        return Report(checks=checks, rung=None, not_seen=["anything, without privileges"])
    checks += [*_program_checks(), *_conntrack_checks(namespaces)]
    attempts = list(_attempts(namespaces, asked))
    checks += [*(attempt.check for attempt in attempts), *_rule_checks(namespaces)]
    checks += [*_bypass_checks(namespaces), *_other_tracers()]
    used = attempts[-1]
    if not used.check.is_ok:
        return Report(checks=checks, rung=None, not_seen=["anything"])
    not_seen = [*used.not_seen, *_blind_spots(namespaces)]
    return Report(checks=checks, rung=used.rung, not_seen=not_seen)


def _kernel_checks() -> Iterator[Check]:
    system = os.uname()
    yield Check(name="kernel", is_ok=True, detail=f"{system.release} ({system.machine})")
    missing = privileges.missing_for_tracing()
    yield Check(
        name="privileges",
        is_ok=not missing,
        detail=f"missing {', '.join(missing)}; run as root" if missing else "sufficient",
    )
    has_btf = btf.VMLINUX.exists()
    yield Check(
        name="kernel types (BTF)",
        is_ok=has_btf,
        detail=str(btf.VMLINUX) if has_btf else f"no {btf.VMLINUX}",
    )
    yield _bcc_check()


def _bcc_check() -> Check:
    python = programs.bcc_python()
    try:
        answer = subprocess.run(
            [python, "-I", "-c", "import bcc; print(bcc.__version__)"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        return Check(name="BCC", is_ok=False, detail=f"cannot run {python}: {error.strerror}")
    if answer.returncode:
        return Check(
            name="BCC",
            is_ok=False,
            detail=f"{python} cannot import bcc; install the package python3-bpfcc",
        )
    return Check(name="BCC", is_ok=True, detail=f"{answer.stdout.strip()}, run by {python}")


def _program_checks() -> Iterator[Check]:
    has_links = has_netfilter_links()
    yield Check(
        name="netfilter programs",
        is_ok=has_links,
        detail="connections with their marks" if has_links else "none in this kernel (Linux 6.4)",
        is_needed=False,
    )
    yield _probes_check()
    has_tcx = has_tcx_links()
    yield Check(
        name="TCX programs",
        is_ok=has_tcx,
        detail="hops at every interface" if has_tcx else "none in this kernel (Linux 6.6)",
        is_needed=False,
    )


def _probes_check() -> Check:
    try:
        kprobe.require()
    except LoadError as error:
        return Check(name="probes", is_ok=False, detail=str(error), is_needed=False)
    return Check(
        name="probes",
        is_ok=True,
        detail="connections with their marks, where there are no netfilter programs",
        is_needed=False,
    )


def _conntrack_checks(namespaces: Sequence[Netns]) -> Iterator[Check]:
    for netns in namespaces:
        try:
            entries = sum(1 for _ in islice(conntrack.dump(netns), 1))
            held, room = _conntrack_fill(netns)
        except (ConntrackError, NetnsError, OSError) as error:
            yield Check(name=f"conntrack netlink of {netns.node}", is_ok=False, detail=str(error))
            continue
        detail = f"{held} of {room} entries ({100 * held // max(1, room)} %)"
        if not entries:
            detail += "; if it stays empty under traffic, no rule here uses conntrack"
        yield Check(name=f"conntrack netlink of {netns.node}", is_ok=True, detail=detail)


def _conntrack_fill(netns: Netns) -> tuple[int, int]:
    return conntrack.setting(netns, "count"), conntrack.setting(netns, "max")


def _attempts(namespaces: Sequence[Netns], asked: Rung | None) -> Iterator[_Attempt]:
    """Try the rungs from the top, as 'srcip trace' does. The last one yielded is used."""
    if asked is Rung.LINKS or (asked is None and has_netfilter_links()):
        yield _attach_attempt(namespaces, Rung.LINKS)
        return
    if asked is not Rung.EVENTS:
        attempt = _attach_attempt(namespaces, Rung.PROBES, is_needed=asked is not None)
        yield attempt
        if attempt.check.is_ok or asked is not None:
            return
    yield _Attempt(
        check=_events_check(namespaces),
        rung=ConntrackSource.RUNG,
        not_seen=ConntrackSource.NOT_SEEN,
    )


def _attach_attempt(namespaces: Sequence[Netns], rung: Rung, *, is_needed: bool = True) -> _Attempt:
    name = "attach" if rung is Rung.LINKS else "attach probes"
    start_ns = time.monotonic_ns()
    try:
        source = ladder.open_programs(namespaces, Settings(), rung)
    except (LoadError, NetnsError) as error:
        check = Check(name=name, is_ok=False, detail=str(error), is_needed=is_needed)
        return _Attempt(check=check)
    took_ms = (time.monotonic_ns() - start_ns) // 1_000_000
    source.close()
    names = ", ".join(netns.node for netns in namespaces)
    check = Check(
        name=name,
        is_ok=True,
        detail=f"compiled, loaded and attached all programs in {names} in {took_ms} ms, then"
        " detached them",
    )
    return _Attempt(check=check, rung=source.info.rung, not_seen=source.info.not_seen)


def _events_check(namespaces: Sequence[Netns]) -> Check:
    """Try the rung of kernels with neither netfilter links nor probes."""
    try:
        ConntrackSource(namespaces, 0).close()
    except (ConntrackError, NetnsError) as error:
        return Check(name="conntrack events", is_ok=False, detail=str(error))
    names = ", ".join(netns.node for netns in namespaces)
    return Check(name="conntrack events", is_ok=True, detail=f"subscribed in {names}")


def _rule_checks(namespaces: Sequence[Netns]) -> Iterator[Check]:
    """Report kube-proxy's mode, and the owners of rules that replace sources."""
    for netns in namespaces:
        rules = reader.read(netns.path)
        answer = proxy_mode.ask(netns)
        mode = answer or rules.proxy_mode or _mode_by_device(netns)
        if answer:
            detail = f"{answer}, as it says on localhost:10249"
        elif mode:
            by = "rules" if rules.proxy_mode else f"device {IPVS_DEVICE}"
            detail = f"{mode}, by its {by} (localhost:10249 does not answer)"
        else:
            detail = "none found: localhost:10249 does not answer, and no rule is kube-proxy's"
        if answer and rules.proxy_mode and answer != rules.proxy_mode:
            detail += f"; but the rules are those of {rules.proxy_mode} mode"
        yield Check(
            name=f"kube-proxy of {netns.node}", is_ok=bool(mode), detail=detail, is_needed=False
        )
        yield _masquerade_check(netns, rules)


def _mode_by_device(netns: Netns) -> str | None:
    with closing(InterfaceWatcher(netns)) as watcher:
        return "ipvs" if IPVS_DEVICE in watcher.snapshot().names.values() else None


def _masquerade_check(netns: Netns, rules: Ruleset) -> Check:
    counts = Counter(str(rule.owner) for rule in rules.rules if rule.is_snat)
    owners = ", ".join(f"{owner} ({count})" for owner, count in sorted(counts.items()))
    detail = owners or "none"
    if rules.unread:
        detail += f"; not read: {'; '.join(rules.unread)}"
    return Check(
        name=f"masquerade rules of {netns.node}",
        is_ok=not rules.unread,
        detail=detail,
        is_needed=False,
    )


def _other_tracers() -> Iterator[Check]:
    """Report other netfilter programs on this machine; srcip takes another priority beside them."""
    names: Counter[str] = Counter()
    for link_id in bpf_syscall.link_ids():
        info = bpf_syscall.link_info(link_id)
        if info and info[0] == bpf_syscall.LINK_TYPE_NETFILTER:
            names[bpf_syscall.program_name(info[1]) or "?"] += 1
    ours = sum(count for name, count in names.items() if name.startswith("srcip_"))
    others = [f"{name} ({n})" for name, n in names.items() if not name.startswith("srcip_")]
    # Probes are attached by perf events, not links: only their programs can be listed.
    programs = map(bpf_syscall.program_name, bpf_syscall.program_ids())
    probing = sum(name == "srcip_confirm" for name in programs)
    found = [f"{ours} netfilter links of running srcip"] if ours else []
    found += [f"{probing} running srcip with probes"] if probing else []
    detail = "; ".join(found) or "no running srcip"
    if others:
        detail += f"; netfilter programs of others: {', '.join(sorted(others))}"
    yield Check(name="other tracers", is_ok=True, detail=detail, is_needed=False)


def _bypass_checks(namespaces: Sequence[Netns]) -> Iterator[Check]:
    """Report what was found that carries packets past netfilter."""
    for netns in namespaces:
        try:
            found = bypasses.find(netns)
        except NetnsError as error:
            found = [str(error)]
        yield Check(
            name=f"all through netfilter on {netns.node}",
            is_ok=not found,
            detail="; ".join(found) or "no XDP, tc program, flowtable or Open vSwitch was found",
            is_needed=False,
        )


def _blind_spots(namespaces: Sequence[Netns]) -> Iterator[str]:
    yield "traffic that bypasses netfilter: XDP, eBPF datapaths, OVS, flowtables, hardware offload"
    yield f"network namespaces other than {', '.join(netns.node for netns in namespaces)}"
