"""
Records what kube-proxy's IPVS mode does in the lab: ``tests/data/ipvs``.

    tests/vm/vmrun.sh --mem 3G 6.12 -- .venv/bin/python -m tests.vm.record_ipvs >ipvs.tar
    tar -x -f ipvs.tar -C tests/data/ipvs
"""

import io
import json
import sys
import tarfile
import time
from contextlib import closing
from dataclasses import asdict
from enum import Enum

from lab import kube_proxy, probe, topology
from lab.hosts import NODES
from lab.scenarios import address, cases
from tracer.decode import decode
from tracer.kernel import netns
from tracer.kernel.interfaces import InterfaceWatcher
from tracer.kernel.source import KernelSource, Settings
from tracer.model import Connection, Drop

# How each node is asked what it has.
COMMANDS = {
    "iptables": ("iptables-nft-save",),
    "ip6tables": ("ip6tables-nft-save",),
    "nft.json": ("nft", "-j", "list", "table", "inet", "lab-masq"),
    "ipset": ("ipset", "-sorted", "save"),
    "ipvs": ("ipvsadm", "--save", "--numeric"),
}
_QUIET_S = 1.0


def main():
    files = {}
    with topology.build() as lab:
        kube_proxy.load(lab, "ipvs")
        namespaces = [netns.find(f"{lab.netns(node)}={node}", node) for node in NODES]
        with closing(KernelSource(namespaces, Settings())) as source:
            answers = probe.run(lab, cases(modes=["ipvs"]))
            files["records.jsonl"] = _lines(_records(source, namespaces))
        files["observed.jsonl"] = _lines(_observed(case, answers[case]) for case in answers)
        for node in NODES:
            for suffix, command in COMMANDS.items():
                files[f"{node}.{suffix}"] = lab.run(node, *command)
        files["addresses.json"] = _lines([_addresses(namespaces)])
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))


def _observed(case, answer):
    """Write down an answer as ``lab/data/observed.jsonl`` has it."""
    scenario = case.scenario
    return {
        "mode": case.mode,
        "scenario": scenario.id,
        "what": scenario.title,
        "from": scenario.client,
        "from_address": str(address(scenario.client, case.family)),
        "from_socket": [str(answer.local[0]), answer.local[1]],
        "to": str(case.destination),
        "port": case.port,
        "via": scenario.through,
        "family": case.family,
        "proto": case.proto,
        "client_address": str(answer.client_address or answer.outcome.upper()),
        "pod": answer.pod,
    }


def _records(source, namespaces):
    """Read until nothing comes any more; yield the connections and drops of the nodes."""
    names = {each.inode: InterfaceWatcher(each).snapshot().names for each in namespaces}
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < _QUIET_S:
        for record in map(decode, source.read(0.1) or []):
            quiet_since = time.monotonic()
            if isinstance(record, Connection | Drop):
                yield _record(record, source, names[record.netns])


def _record(record, source, names):
    told = {key: _plain(value) for key, value in asdict(record).items()}
    node = source.info.nodes[record.netns]
    del told["ktime_ns"], told["netns"]
    if isinstance(record, Drop):
        told["reason"] = source.info.drop_reasons[record.reason]
        told["place"] = source.symbol(record.location)
        told["dst_input"] = source.symbol(record.dst_input) if record.dst_input else None
        del told["location"]
    for key in ("iif", "oif", "ifindex", "dst_ifindex"):
        if key in told:
            told[key] = names.get(told[key], "")
    return {"kind": type(record).__name__.lower(), "node": node, **told}


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, Enum):
        return int(value)
    return value if isinstance(value, int | None) else str(value)


def _addresses(namespaces):
    found = {}
    for each in namespaces:
        addresses = InterfaceWatcher(each).snapshot().addresses
        # Those of the link are made by chance.
        found[each.node] = sorted(str(one) for one in addresses if not one.is_link_local)
    return found


def _lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
