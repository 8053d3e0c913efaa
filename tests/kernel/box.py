"""A client, a node that routes, and a server, as network namespaces with one cable each."""

import os
import re
import secrets
import socket
import struct
import subprocess
import time
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

from tracer.kernel import netns

CLIENT = {4: "198.51.100.10", 6: "2001:db8:c::10"}
NODE = {4: "198.51.100.1", 6: "2001:db8:c::1"}
NODE_INSIDE = {4: "10.9.0.1", 6: "2001:db8:9::1"}
SERVER = {4: "10.9.0.2", 6: "2001:db8:9::2"}
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
# Of a busy machine; nothing waits so long where all is well.
PATIENCE_S = float(os.environ.get("SRCIP_TEST_PATIENCE_S", "60"))

# Then the id of the process that made it.
_PREFIX = "srcip-test-of-"

# A device that has its peer's number gets its queue, without which IPv6 finds no neighbour, up to a
# second later (linkwatch_urgent_event() in the kernel's net/core/link_watch.c).
_LINKS = """\
link add c0 index 11 netns {client} type veth peer name n0 index 12 netns {node}
link add s0 index 13 netns {server} type veth peer name n1 index 14 netns {node}
"""
_ADDRESSES = {
    "client": """\
addr add 198.51.100.10/24 dev c0
addr add 2001:db8:c::10/64 dev c0 nodad
link set c0 up
link set lo up
route add default via 198.51.100.1
route add default via 2001:db8:c::1
""",
    "node": """\
addr add 198.51.100.1/24 dev n0
addr add 10.9.0.1/24 dev n1
addr add 2001:db8:c::1/64 dev n0 nodad
addr add 2001:db8:9::1/64 dev n1 nodad
link set n0 up
link set n1 up
link set lo up
""",
    "server": """\
addr add 10.9.0.2/24 dev s0
addr add 2001:db8:9::2/64 dev s0 nodad
link set s0 up
link set lo up
route add default via 10.9.0.1
route add default via 2001:db8:9::1
""",
}


class Box:
    """Three namespaces of one test."""

    def __init__(self, prefix):
        self.names = {host: f"{prefix}-{host}" for host in ("client", "node", "server")}

    def path(self, host):
        return netns.NETNS_DIR / self.names[host]

    def target(self, host="node"):
        """The namespace as the tracer wants it."""
        return netns.find(f"{self.names[host]}={host}", host)

    def run(self, host, *command, stdin=None):
        """Run a command inside and return what it printed."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.names[host], *command],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def set(self, host, knob, value):
        """Set a value below /proc/sys/net of a host; sysctl(8) need not be installed."""
        with netns.inside(self.path(host)):
            (Path("/proc/sys/net") / knob).write_text(str(value))

    def rules(self, text, host="node"):
        """Load nftables rules on a host, in place of those before; blocks may be on one line."""
        lines = text.replace("}", "\n}\n")
        self.run(host, "nft", "-f", "-", stdin=f"flush ruleset\n{lines}")

    def socket(self, host, version, kind, proto=0):
        """Make a socket inside a host."""
        with netns.inside(self.path(host)):
            sock = socket.socket(_FAMILIES[version], kind, proto)
        sock.settimeout(PATIENCE_S)
        return sock

    def conntrack(self, *options):
        """The node's conntrack as 'conntrack -L' prints it: a list of Entry."""
        entries = []
        for family in ("ipv4", "ipv6"):
            printed = self.run("node", "conntrack", "-L", "-f", family, *options)
            entries += [parse_entry(line) for line in printed.splitlines() if "src=" in line]
        return entries


@contextmanager
def built():
    """Make the namespaces and remove them."""
    remove_leftovers()
    box = Box(new_name())
    try:
        for name in box.names.values():
            _ip("netns", "add", name)
        for host in box.names:
            for knob in ("ipv6/conf/all/accept_dad", "ipv6/conf/default/accept_dad"):
                box.set(host, knob, 0)
        _ip("-batch", "-", stdin=_LINKS.format(**box.names))
        for host, lines in _ADDRESSES.items():
            _ip("-n", box.names[host], "-batch", "-", stdin=lines)
        box.set("node", "ipv4/ip_forward", 1)
        box.set("node", "ipv6/conf/all/forwarding", 1)
        yield box
    finally:
        for name in box.names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def new_name():
    """A name for namespaces of this process."""
    return f"{_PREFIX}{os.getpid()}-{secrets.token_hex(3)}"


def remove_leftovers():
    """Remove the namespaces of processes that were killed."""
    for path in netns.NETNS_DIR.glob(f"{_PREFIX}*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            subprocess.run(["ip", "netns", "del", path.name], capture_output=True, check=False)


def _ip(*arguments, stdin=None):
    subprocess.run(["ip", *arguments], input=stdin, text=True, check=True, capture_output=True)


def parse_entry(line):
    """
    Read a line of 'conntrack -L' into a dict: proto, orig and reply (src, dst, sport, dport), and
    what else it says. For ICMP, sport is the id and dport is type << 8 | code.
    """
    fields = re.findall(r"(\w+)=(\S+)", line)
    entry = {"proto": line.split()[0], "line": line}
    sides = [{}, {}]
    seen = set()
    side = 0
    for key, value in fields:
        if key in ("src", "dst", "sport", "dport", "type", "code", "id"):
            if key == "src" and "src" in seen:
                side = 1
            seen.add(key)
            sides[side][key] = value
        else:
            entry[key] = int(value)
    entry["orig"], entry["reply"] = (_tuple(side) for side in sides)
    return entry


def _tuple(side):
    if "id" in side:
        ports = (int(side["id"]), int(side["type"]) << 8 | int(side["code"]))
    else:
        ports = (int(side["sport"]), int(side["dport"]))
    return (ip_address(side["src"]), ip_address(side["dst"]), *ports)


def flat(flow):
    """A FiveTuple in the form of parse_entry()."""
    return (flow.src, flow.dst, flow.sport, flow.dport)


def wait_until(condition, patience_s=PATIENCE_S):
    """Wait for a condition; return its value."""
    end = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return value


def echo_request(version, identifier, payload=b"srcip"):
    """An ICMP or ICMPv6 echo request; the kernel fills in the latter's checksum."""
    kind = {4: 8, 6: 128}[version]
    message = struct.pack("!BBHHH", kind, 0, 0, identifier, 1) + payload
    if version == 6:
        return message
    return message[:2] + struct.pack("!H", _checksum(message)) + message[4:]


def _checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def udp_datagram(sport, dport, payload=b"x", checksum=0):
    """A UDP datagram for a raw IPv4 socket; a checksum of 0 means none."""
    return struct.pack("!HHHH", sport, dport, 8 + len(payload), checksum) + payload


def ipv4_packet(source, destination, datagram):
    """An IPv4 packet with UDP for a raw socket that takes headers; the kernel adds the rest."""
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    return (
        struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, 0, 64, socket.IPPROTO_UDP, 0) + addresses + datagram
    )


def sctp_init(sport, dport):
    """An SCTP packet with an INIT chunk."""
    chunk = struct.pack("!BBHIIHHI", 1, 0, 20, 0x12345678, 65535, 1, 1, 1)
    packet = struct.pack("!HHII", sport, dport, 0, 0) + chunk
    return packet[:8] + struct.pack("<I", _crc32c(packet)) + packet[12:]


def _crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def package_root():
    """Where the checkout is."""
    return Path(__file__).parents[2]
