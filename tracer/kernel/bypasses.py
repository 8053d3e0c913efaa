"""Find what carries packets past netfilter: XDP, tc, flowtables, Open vSwitch."""

import json
import socket
import struct
from collections.abc import Iterator

from tracer.errors import NetnsError
from tracer.kernel import bpf_syscall, netlink
from tracer.kernel.netns import Netns, inside
from tracer.ruleset.tool import Limits, run

# include/uapi/linux/rtnetlink.h, if_link.h
_NETLINK_ROUTE = 0
_RTM_GETLINK, _RTM_GETQDISC = 18, 38
_IFINFOMSG, _TCMSG = struct.Struct("=BBHiII"), struct.Struct("=BBHiIII")
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_XDP = 3, 18, 43
_IFLA_INFO_KIND, _IFLA_XDP_ATTACHED, _TCA_KIND = 1, 2, 1
_TOOL = Limits(timeout_s=10.0, output_bytes=1 << 20)


def find(netns: Netns) -> list[str]:
    """
    Return what may carry a namespace's packets past netfilter, a line each.

    Finds XDP programs, other programs and classifiers at tc, flowtables, and interfaces of Open
    vSwitch. Hardware offload cannot be detected from here.

    Raises:
        NetnsError: If the namespace cannot be entered or queried.
    """
    try:
        with (
            inside(netns.path),
            socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE) as channel,
        ):
            channel.settimeout(5)
            links = dict(_links(channel))
            names = {index: _text(link.get(_IFLA_IFNAME, b"")) for index, link in links.items()}
            return [
                *_xdp(links, names),
                *_open_vswitch(links, names),
                *_programs_at_tc(names),
                *_classifiers(channel, names),
                *flowtables(run(("nft", "-j", "list", "flowtables"), _TOOL).text),
            ]
    except OSError as error:
        raise NetnsError(
            f"cannot check {netns.node} for what bypasses netfilter: {error.strerror}"
        ) from error


def _links(channel: socket.socket) -> Iterator[tuple[int, netlink.Attributes]]:
    for _, payload in netlink.dump(channel, _RTM_GETLINK, _IFINFOMSG.pack(0, 0, 0, 0, 0, 0)):
        index = _IFINFOMSG.unpack_from(payload)[3]
        yield index, netlink.attributes(payload[_IFINFOMSG.size :])


def _xdp(links: dict[int, netlink.Attributes], names: dict[int, str]) -> Iterator[str]:
    for index, link in links.items():
        attached = netlink.attributes(link.get(_IFLA_XDP, b"")).get(_IFLA_XDP_ATTACHED, b"\0")
        if attached[:1] != b"\0":
            yield f"an XDP program on {names[index]} handles packets before netfilter"


def _open_vswitch(links: dict[int, netlink.Attributes], names: dict[int, str]) -> Iterator[str]:
    for index, link in links.items():
        kind = netlink.attributes(link.get(_IFLA_LINKINFO, b"")).get(_IFLA_INFO_KIND, b"")
        if _text(kind) == "openvswitch":
            yield f"Open vSwitch ({names[index]}) forwards packets and does NAT itself"


def _programs_at_tc(names: dict[int, str]) -> Iterator[str]:
    for index, name in names.items():
        for attach_type in (bpf_syscall.TCX_INGRESS, bpf_syscall.TCX_EGRESS):
            try:
                ids = bpf_syscall.tcx_programs(index, attach_type)
            except OSError:
                return  # the kernel has no TCX
            programs = [bpf_syscall.program_name(each) or "?" for each in ids]
            others = [each for each in programs if not each.startswith("srcip_")]
            if others:
                yield f"eBPF at tc of {name} ({', '.join(others)}) may redirect packets or do NAT"


def _classifiers(channel: socket.socket, names: dict[int, str]) -> Iterator[str]:
    request = _TCMSG.pack(0, 0, 0, 0, 0, 0, 0)
    for _, payload in netlink.dump(channel, _RTM_GETQDISC, request):
        index = _TCMSG.unpack_from(payload)[3]
        kind = netlink.attributes(payload[_TCMSG.size :]).get(_TCA_KIND, b"")
        if _text(kind) in ("clsact", "ingress"):
            yield f"filters at tc of {names.get(index, index)} ({_text(kind)}) may redirect packets"


def flowtables(printed: str) -> Iterator[str]:
    """Yield a line for each flowtable in the output of ``nft -j list flowtables``."""
    try:
        found = json.loads(printed)["nftables"] if printed else []
        tables = [each["flowtable"] for each in found if "flowtable" in each]
        for table in tables:
            name = f"{table['family']} {table['table']} {table['name']}"
            yield f"flowtable {name} forwards established connections past netfilter's hooks"
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        yield "perhaps flowtables: nft's list of them cannot be parsed"


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("utf-8", "replace")
