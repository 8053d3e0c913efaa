"""Loads the recorded rules of a real kube-proxy into the lab's nodes."""

import re
from collections import Counter
from pathlib import Path
from typing import Literal

from lab.hosts import NODES, Family
from lab.topology import Lab
from tracer.errors import LabError

Mode = Literal["iptables", "nftables"]
MODES: tuple[Mode, ...] = ("iptables", "nftables")

DATA = Path(__file__).with_name("data")

_RESTORE = {"iptables": "iptables-nft-restore", "ip6tables": "ip6tables-nft-restore"}
_SAVE: dict[Family, str] = {"ipv4": "iptables-nft-save", "ipv6": "ip6tables-nft-save"}
_ROUTE_LOCALNET = "ipv4/conf/all/route_localnet"
_ACCOUNTING = re.compile(r" -m nfacct --nfacct-name +(\S+)")
_DROP = re.compile(r'^\[(\d+):\d+\] .* --comment "([^"]+)" .*-j (?:DROP|REJECT)\b', re.MULTILINE)


def load(lab: Lab, mode: Mode) -> None:
    """
    Make the lab's nodes forward as kube-proxy in this mode does, in place of any earlier rules.

    The masquerade of pod egress, which is not kube-proxy's, comes with it.

    Raises:
        LabError: If the kernel or the tools refuse the rules.
    """
    for node in NODES:
        if mode == "iptables":
            _load_iptables(lab, node)
        else:
            _load_nftables(lab, node)


def drops(lab: Lab, node: str, family: Family) -> Counter[str]:
    """
    Return how many packets the rules that drop or reject have taken, by the rules' comment.

    In iptables mode only: kube-proxy's nftables rules do not count.
    """
    packets: Counter[str] = Counter()
    for count, comment in _DROP.findall(lab.run(node, _SAVE[family], "-c")):
        packets[comment] += int(count)
    return packets


def _load_nftables(lab: Lab, node: str) -> None:
    lab.set(node, _ROUTE_LOCALNET, "0")
    _replace_ruleset(lab, node, DATA / "nftables" / f"{node}.nft")


def _load_iptables(lab: Lab, node: str) -> None:
    # kube-proxy in iptables mode sets it so that a NodePort answers on loopback.
    lab.set(node, _ROUTE_LOCALNET, "1")
    _replace_ruleset(lab, node, DATA / "iptables" / f"{node}.masquerade.nft")
    for family, restore in _RESTORE.items():
        rules = (DATA / "iptables" / f"{node}.{family}").read_text()
        try:
            _make_accounts(lab, node, set(_ACCOUNTING.findall(rules)))
            lab.run(node, restore, stdin=rules)
        except LabError:
            # Neither the tool nor the kernel's part is common. It only counts: kube-proxy, too,
            # leaves the match out where there is none.
            lab.run(node, restore, stdin=_ACCOUNTING.sub("", rules))


def _replace_ruleset(lab: Lab, node: str, rules: Path) -> None:
    # One transaction. What iptables' nft back end made is in the rule set too.
    lab.run(node, "nft", "-f", "-", stdin=f"flush ruleset\n{rules.read_text()}")


def _make_accounts(lab: Lab, node: str, names: set[str]) -> None:
    # They outlive the rules that use them, so a second load finds them there.
    present = lab.run(node, "nfacct", "list")
    lines = [
        f"{{ pkts = 0, bytes = 0 }} = {name};\n"
        for name in sorted(names)
        if f"= {name};" not in present
    ]
    if lines:
        lab.run(node, "nfacct", "restore", stdin="".join(lines))
