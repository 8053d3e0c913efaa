"""Makes the lab's nodes forward as kube-proxy does: by its recorded rules, or in IPVS mode."""

import re
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from lab import ipvs
from lab.hosts import NODES, Family
from lab.topology import Lab
from tracer.errors import LabError
from tracer.kernel import netns

Mode = Literal["iptables", "nftables", "ipvs"]
ALL_MODES: tuple[Mode, ...] = get_args(Mode)
# The modes that run on every kernel, with rules recorded from a real kube-proxy.
MODES: tuple[Mode, ...] = ("iptables", "nftables")

DATA = Path(__file__).with_name("data")

_RESTORE = {"iptables": "iptables-nft-restore", "ip6tables": "ip6tables-nft-restore"}
_SAVE: dict[Family, str] = {"ipv4": "iptables-nft-save", "ipv6": "ip6tables-nft-save"}
_ROUTE_LOCALNET = "ipv4/conf/all/route_localnet"
_ACCOUNTING = re.compile(r" -m nfacct --nfacct-name +(\S+)")
_DROP = re.compile(r'^\[(\d+):\d+\] .* --comment "([^"]+)" .*-j (?:DROP|REJECT)\b', re.MULTILINE)


def load(lab: Lab, mode: Mode) -> None:
    """
    Make the lab's nodes forward as kube-proxy in this mode does, replacing earlier rules.

    This includes the masquerade of pod egress, which is not kube-proxy's.

    Raises:
        LabError: If the kernel or the tools refuse the rules.
    """
    require(mode)
    for node in NODES:
        _LOADERS[mode](lab, node)


def require(mode: Mode) -> None:
    """
    Check that this machine supports a mode: IPVS needs a kernel with IPVS, and two tools.

    Raises:
        LabError: If it cannot.
    """
    if mode != "ipvs":
        return
    for tool in ("ipvsadm", "ipset"):
        if shutil.which(tool) is None:
            raise LabError(f"kube-proxy's IPVS mode needs {tool}, which is not installed")
    # This loads the module, if there is one.
    done = subprocess.run(["ipvsadm", "-Ln"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError("kube-proxy's IPVS mode needs a kernel with IPVS (ip_vs), which this lacks")


def drops(lab: Lab, node: str, family: Family) -> Counter[str]:
    """
    Return how many packets matched rules that drop or reject, by the rules' comment.

    In iptables mode only: kube-proxy's nftables rules have no counters.
    """
    packets: Counter[str] = Counter()
    for count, comment in _DROP.findall(lab.run(node, _SAVE[family], "-c")):
        packets[comment] += int(count)
    return packets


def _load_nftables(lab: Lab, node: str) -> None:
    lab.set(node, _ROUTE_LOCALNET, "0")
    _replace_ruleset(lab, node, DATA / "nftables" / f"{node}.nft")


def _load_ipvs(lab: Lab, node: str) -> None:
    setup = ipvs.setup(node)
    lab.set(node, _ROUTE_LOCALNET, "0")
    _replace_ruleset(lab, node, DATA / "iptables" / f"{node}.masquerade.nft")
    for setting, value in ipvs.SYSCTLS.items():
        lab.set(node, setting, value)
    # As with kube-proxy, the device stays down. The node has its addresses all the same.
    lines = [f"link add {ipvs.DEVICE} type dummy"]
    lines += [f"address add {ip} dev {ipvs.DEVICE}" for ip in setup.addresses]
    lab.run(node, "ip", "-batch", "-", stdin="\n".join(lines))
    lab.run(node, "ipset", "restore", stdin=setup.sets)
    lab.run(node, "ipvsadm", "--restore", stdin=setup.servers)
    lab.run(node, _RESTORE["iptables"], "--noflush", stdin=setup.rules["ipv4"])
    lab.run(node, _RESTORE["ip6tables"], "--noflush", stdin=setup.rules["ipv6"])


def _unload_ipvs(lab: Lab, node: str) -> None:
    with netns.inside(lab.netns(node)):
        names = {name for _, name in socket.if_nameindex()}
    if ipvs.DEVICE in names:
        lab.run(node, "ipvsadm", "--clear")
        lab.run(node, "ipset", "destroy")
        lab.run(node, "ip", "link", "delete", ipvs.DEVICE)


def _load_iptables(lab: Lab, node: str) -> None:
    # kube-proxy in iptables mode sets this so that a NodePort is served on loopback.
    lab.set(node, _ROUTE_LOCALNET, "1")
    _replace_ruleset(lab, node, DATA / "iptables" / f"{node}.masquerade.nft")
    for family, restore in _RESTORE.items():
        rules = (DATA / "iptables" / f"{node}.{family}").read_text()
        try:
            _make_accounts(lab, node, set(_ACCOUNTING.findall(rules)))
            lab.run(node, restore, stdin=rules)
        except LabError:
            # Neither the tool nor the kernel's part is common. The match only counts, and
            # kube-proxy, too, leaves it out where it is missing.
            lab.run(node, restore, stdin=_ACCOUNTING.sub("", rules))


def _replace_ruleset(lab: Lab, node: str, rules: Path) -> None:
    # One transaction. The ruleset includes what iptables' nft back end made.
    lab.run(node, "nft", "-f", "-", stdin=f"flush ruleset\n{rules.read_text()}")
    # Sets can only be removed after the rules that use them.
    _unload_ipvs(lab, node)


def _make_accounts(lab: Lab, node: str, names: set[str]) -> None:
    # They outlive the rules that use them, so a second load finds them.
    present = lab.run(node, "nfacct", "list")
    lines = [
        f"{{ pkts = 0, bytes = 0 }} = {name};\n"
        for name in sorted(names)
        if f"= {name};" not in present
    ]
    if lines:
        lab.run(node, "nfacct", "restore", stdin="".join(lines))


_LOADERS: dict[Mode, Callable[[Lab, str], None]] = {
    "iptables": _load_iptables,
    "nftables": _load_nftables,
    "ipvs": _load_ipvs,
}
