"""What kube-proxy's rules say of the Service that they are for."""

import re


def names_port(rule, case):
    """
    Whether a rule names the Service's port of a case.

    Comments begin with it ("default/echo:http has no endpoints"), chains of nftables end in it
    ("firewall-LZQZAOED-default/echo/tcp/http").
    """
    port = {"tcp": "http", "udp": "dns"}[case.proto]
    name = rf"\bdefault/{case.scenario.service}(:|/{case.proto}/){port}\b"
    return re.search(name, f"{rule} {rule.comment}") is not None
