"""Which lines of JSON belong to which of a test's connections."""

from lab import hosts
from lab.hosts import FAMILIES

# The proxy of S9 is on the router, and is trusted.
HEADERS = ["--read-proxy-headers"]
TRUSTED = [f"--trusted-proxy={hosts.ROUTER_TO_NODES.of(family)}" for family in FAMILIES]


def keys(line):
    """Yield what identifies a connection's or path's line: its tuple, the declared client."""
    orig = line.get("orig", {})
    if "sport" in orig:
        yield line["proto"], orig["src"], orig["sport"], orig["dst"], orig["dport"]
    client = line.get("proxy", {}).get("client", {})
    if "port" in client:
        yield "proxied", client["address"], client["port"]


def key_of(case, answer):
    """What the lines of a case's connection have; behind a proxy, of the one that this opened."""
    address, port = answer.local
    if case.scenario.relay is not None:
        return "proxied", str(address), port
    return case.proto, str(address), port, str(case.destination), case.port


def relayed(chosen):
    """The scenarios that take the proxy."""
    scenarios = dict.fromkeys(case.scenario for case in chosen)
    return [scenario for scenario in scenarios if scenario.relay is not None]
