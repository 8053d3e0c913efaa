"""make outage: the API server is away for minutes, twice, and comes back as another."""

import argparse
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from lab import topology
from tests.bench.away import (
    CUT,
    GONE,
    MEND,
    NODE,
    Cluster,
    Traffic,
    agent,
    conntrack_events,
    gate,
    wait_for,
)
from tests.bench.served import samples
from tests.lab.kube_proxy_port import kube_proxy_of
from tracer.tally import KEEP_S

AWAY_S, BETWEEN_S = 190, 30
LOOK_S = 1.0
STALE = "cluster changes since the API server last answered"


@dataclass(slots=True, kw_only=True)
class Outage:
    """What was seen while the API server was away, and after."""

    seconds: float = 0.0
    attempts: int = 0
    most_in_10_s: int = 0
    oldest_s: float = 0.0
    was_stale: bool = False
    cpu_share: float = 0.0
    back_s: float = 0.0
    back_requests: Counter = field(default_factory=Counter)


@dataclass(slots=True, kw_only=True)
class Seen:
    """What the kernel has seen, what the agent has counted, and how it was meanwhile."""

    made: Counter = field(default_factory=Counter)
    counted: Counter = field(default_factory=Counter)
    lost: dict = field(default_factory=dict)
    outages: list = field(default_factory=list)
    seconds: float = 0.0
    looks: int = 0
    backwards: list = field(default_factory=list)
    unwell: list = field(default_factory=list)
    modes: list = field(default_factory=list)
    gone_series: int = 0
    removed_series: int = 0
    resident_mib: list = field(default_factory=list)
    files: list = field(default_factory=list)

    @property
    def missing(self):
        return self.made.total() - self.counted.total() - self.lost.get("unreadable", 0)


class Watcher:
    """Looks at the agent every second: totals, health, age, and what became of each series."""

    def __init__(self, served, seen):
        self._served, self._seen = served, seen
        self._last = {}
        # Totals of series that were removed: what was counted stays counted.
        self.removed = Counter()
        self.age_s = None
        self.ages = []
        self.is_stale = False

    def look(self):
        text = self._served.page()
        told = samples(text, "srcip_connections_total")
        for series, number in told.items():
            if number < self._last.get(series, 0):
                self._seen.backwards.append(series)
        for series in self._last.keys() - told.keys():
            self.removed[series] += self._last[series]
        self._last = told
        (self.age_s,) = samples(text, "srcip_cluster_age_seconds").values()
        self.ages.append(self.age_s)
        self.is_stale |= STALE in text
        (mode,) = samples(text, "srcip_kube_proxy_info")
        mode = re.search(r'mode="(\w+)"', mode)[1]
        if self._seen.modes[-1:] != [mode]:
            self._seen.modes.append(mode)
        for path in ("/healthz", "/readyz"):
            if (status := self._served.status(path)) != 200:
                self._seen.unwell.append((path, status))
        self._seen.looks += 1

    def totals(self):
        """Connections by protocol, removed series among them."""
        counted = Counter()
        for series, number in (Counter(self._last) + self.removed).items():
            counted[re.search(r'proto="(\w+)"', series)[1]] += int(number)
        return counted

    def series_of(self, service):
        return [series for series in self._last if f'service="{service}"' in series]


def outage(directory, *, away_s, between_s, keeps_gone_s=None):
    """
    Let the API server be away twice: first it refuses, then nothing answers at all.

    Args:
        directory: For files, also of who is nobody.
        away_s: How long it is away each time.
        between_s: How long it is there before, between, and after.
        keeps_gone_s: When series of a Service that is gone must be removed; None not to wait.
    """
    seen = Seen()
    with ExitStack() as stack:
        lab = stack.enter_context(topology.build())
        gate_ = stack.enter_context(gate())
        cluster = stack.enter_context(closing(Cluster(gate_)))
        threading.Thread(target=cluster.bookmarks, daemon=True).start()
        proxy = stack.enter_context(kube_proxy_of(lab, NODE))
        traffic = Traffic(lab, proxy)
        events = stack.enter_context(conntrack_events(lab, directory))
        served = stack.enter_context(agent(lab, gate_, directory, cluster))
        watcher = Watcher(served, seen)
        before = settled(events)
        began_s = time.monotonic()
        with traffic:
            look_for(watcher, between_s)
            usage(served, seen)
            for number, mode in enumerate(("nftables", "iptables")):
                seen.outages.append(
                    away(watcher, cluster, gate_, traffic, mode, away_s, is_cut=number > 0)
                )
                if number == 0:
                    back_s = time.monotonic()
                    seen.gone_series = len(watcher.series_of(GONE))
                look_for(watcher, between_s)
            if keeps_gone_s is not None:
                look_for(watcher, back_s + keeps_gone_s - time.monotonic())
            usage(served, seen)
        seen.seconds = time.monotonic() - began_s
        seen.made = settled(events) - before
        for _ in range(2):
            served.drained()
        watcher.look()
        seen.removed_series = seen.gone_series - len(watcher.series_of(GONE))
        seen.counted = watcher.totals()
        lost = served.samples("srcip_lost_records_total")
        seen.lost = {
            re.search(r'reason="(\w+)"', series)[1]: int(number)
            for series, number in lost.items()
            if 'stage="connections"' in series
        }
    return seen


def away(watcher, cluster, gate_, traffic, mode, away_s, *, is_cut):
    """Take the API server away, change kube-proxy's mode meanwhile, bring another one back."""
    told = Outage()
    # It is ahead of the versions of another server that begins anew.
    cluster.api.bookmark()
    watcher.ages, watcher.is_stale = [], False
    began, cpu_s, asked = time.monotonic(), watcher._served.cpu_s(), [gate_.attempts()]
    if is_cut:
        gate_.nft(CUT)
    else:
        cluster.leave()
    for half in range(2):
        end_s = began + away_s * (half + 1) / 2
        while time.monotonic() < end_s:
            watcher.look()
            asked.append(gate_.attempts())
            time.sleep(LOOK_S)
        if half == 0:
            traffic.change(mode)
    told.seconds = time.monotonic() - began
    told.cpu_share = (watcher._served.cpu_s() - cpu_s) / told.seconds
    told.attempts = asked[-1] - asked[0]
    told.most_in_10_s = max(b - a for a, b in zip(asked, asked[10:] or asked[-1:], strict=False))
    told.oldest_s, told.was_stale = max(watcher.ages), watcher.is_stale
    if is_cut:
        cluster.leave()
    cluster.come_back()
    if is_cut:
        gate_.nft(MEND)
    returned_s = time.monotonic()

    def is_known():
        # Each resource was heard since then.
        watcher.look()
        return is_listed(cluster.api) and watcher.age_s < time.monotonic() - returned_s

    wait_for(is_known, 60)
    told.back_s = time.monotonic() - returned_s
    told.back_requests = Counter(verb for verb, _, _ in cluster.api.requests)
    return told


def is_listed(api):
    """Whether all four resources were listed in full and are watched."""
    listed = {p for verb, p, query in api.requests if verb == "list" and query["limit"] != "1"}
    return len(listed) == 4 and api.open_watches == 4


def look_for(watcher, seconds):
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        watcher.look()
        time.sleep(LOOK_S)


def usage(served, seen):
    seen.resident_mib.append(served.resident_mib())
    seen.files.append(len(list(Path(f"/proc/{served.pid}/fd").iterdir())))


def settled(events):
    """The state once nothing new is reported."""
    before, told = None, events()
    while told != before:
        time.sleep(1)
        before, told = told, events()
    return told


def well(seen, is_long):
    """What is not as it must be, a line each."""
    checks = {
        "made - counted - lost is 0": seen.missing == 0,
        "no series went backwards": not seen.backwards,
        "/healthz and /readyz answered 200": not seen.unwell,
        "kube-proxy's modes were followed": seen.modes == ["iptables", "nftables", "iptables"],
        "the age grew": all(each.oldest_s > each.seconds * 0.6 for each in seen.outages),
        "nothing was left open": seen.files[-1] <= seen.files[0] + 4,
    }
    if is_long:
        checks["it said that the snapshot is stale"] = all(e.was_stale for e in seen.outages)
        checks["series of the Service that is gone were removed"] = (
            0 < seen.gone_series == seen.removed_series
        )
        checks["memory did not grow by more than 2 MiB"] = (
            seen.resident_mib[-1] < seen.resident_mib[0] + 2
        )
    return [what for what, is_met in checks.items() if not is_met]


def main():
    """Run it and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--away", type=float, default=AWAY_S)
    arguments.add_argument("--between", type=float, default=BETWEEN_S)
    arguments.add_argument("--short", action="store_true", help="do not wait for removed series")
    chosen = arguments.parse_args()
    print(f"Linux {os.uname().release}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        seen = outage(
            Path(directory),
            away_s=chosen.away,
            between_s=chosen.between,
            keeps_gone_s=None if chosen.short else KEEP_S + 60,
        )
        log = (Path(directory) / "log").read_text()
    tell(seen)
    print(f"\nThe agent's log:\n\n```\n{log}```")
    wrong = well(seen, is_long=not chosen.short)
    print("\n".join(f"not so: {each}" for each in wrong))
    sys.exit(bool(wrong))


def tell(seen):
    """Print the tables of docs/performance.md."""
    rows = {
        "away, s": [f"{each.seconds:.0f}" for each in seen.outages],
        "connections asked of the API server, SYNs": [each.attempts for each in seen.outages],
        "of these within 10 s, at most": [each.most_in_10_s for each in seen.outages],
        "`srcip_cluster_age_seconds`, at most": [f"{each.oldest_s:.0f}" for each in seen.outages],
        "CPU of the agent and its child, % of a core": [
            f"{100 * each.cpu_share:.2f}" for each in seen.outages
        ],
        "from its return to the new objects, s": [f"{each.back_s:.1f}" for each in seen.outages],
        "requests by then: lists, watches": [
            f"{each.back_requests['list']}, {each.back_requests['watch']}" for each in seen.outages
        ],
    }
    print("| | refused | cut off |\n|---|---:|---:|")
    for what, (one, other) in rows.items():
        print(f"| {what} | {one} | {other} |")
    print(f"\nIn {seen.seconds:.0f} s, {seen.looks} looks:\n\n| | |\n|---|---:|")
    for proto in sorted(seen.made):
        print(f"| new entries, `conntrack -E`: {proto} | {seen.made[proto]:,} |")
        print(f"| counted by `srcip serve`: {proto} | {seen.counted[proto]:,} |")
    print(f"| counted as lost | {seen.lost} |")
    print(f"| made - counted - counted as lost | {seen.missing} |")
    print(f"| series that went backwards | {len(seen.backwards)} |")
    print(f"| answers of /healthz and /readyz that were not 200 | {len(seen.unwell)} |")
    print(f"| series of the Service that is gone: then, removed | {seen.gone_series}, ", end="")
    print(f"{seen.removed_series} |")
    print(f"| resident, MiB: before, after | {seen.resident_mib} |")
    print(f"| open files: before, after | {seen.files} |")
    print(f"| kube-proxy's mode, as it was told | {', '.join(seen.modes)} |")


if __name__ == "__main__":
    main()
