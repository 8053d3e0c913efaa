"""Names of IP protocols as the rule tools print them (``/etc/protocols``)."""

_NUMBERS = {
    "icmp": 1, "igmp": 2, "ipencap": 4, "ipip": 4, "tcp": 6, "udp": 17, "dccp": 33, "ipv6": 41,
    "gre": 47, "esp": 50, "ah": 51, "icmpv6": 58, "ipv6-icmp": 58, "ospf": 89, "pim": 103,
    "comp": 108, "ipcomp": 108, "vrrp": 112, "l2tp": 115, "sctp": 132, "mobility-header": 135,
    "mh": 135, "udplite": 136, "mptcp": 262,
}  # fmt: skip


def protocol(name: str | int) -> int:
    """
    Return a protocol's number.

    Raises:
        ValueError: If the name is not known.
    """
    if isinstance(name, int):
        return name
    if name.isascii() and name.isdecimal():
        return int(name)
    if name not in _NUMBERS:
        raise ValueError(f"no protocol {name!r}")
    return _NUMBERS[name]
