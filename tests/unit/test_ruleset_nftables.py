"""What ``nft -j list ruleset`` prints, and how it is walked."""

import json
from dataclasses import replace
from ipaddress import ip_address

import pytest

from tracer.model import ICMP, TCP
from tracer.ruleset.errors import RulesetError
from tracer.ruleset.iptables import parse_save
from tracer.ruleset.model import Action, Flow, Owner, Ruleset
from tracer.ruleset.nftables import parse_ruleset

FLOW = Flow(
    src=ip_address("10.1.0.5"),
    dst=ip_address("192.0.2.7"),
    sport=40000,
    dport=80,
    proto=TCP,
    orig_dst=ip_address("10.96.0.1"),
    orig_dport=8080,
    mark=0x4001,
    iif="veth1",
    oif="eth0",
    local_addresses=frozenset({ip_address("192.0.2.1")}),
)
SADDR = {"payload": {"protocol": "ip", "field": "saddr"}}
DADDR = {"payload": {"protocol": "ip", "field": "daddr"}}
DADDR6 = {"payload": {"protocol": "ip6", "field": "daddr"}}
DPORT = {"payload": {"protocol": "th", "field": "dport"}}
L4PROTO = {"meta": {"key": "l4proto"}}
MARK = {"meta": {"key": "mark"}}
OIF = {"meta": {"key": "oifname"}}
STATE = {"ct": {"key": "state"}}
MASQUERADE = {"masquerade": None}
NET = {"prefix": {"addr": "10.1.0.0", "len": 16}}
SETS = (
    ("set", {"name": "addresses", "type": "ipv4_addr", "elem": ["192.0.2.7", "192.0.2.9"]}),
    ("set", {"name": "nets", "type": "ipv4_addr", "flags": ["interval"], "elem": [NET]}),
    ("set", {"name": "empty", "type": "ipv4_addr"}),
    ("set", {"name": "dynamic", "type": "ipv4_addr", "flags": ["timeout"], "elem": ["192.0.2.7"]}),
    (
        "set",
        {
            "name": "pairs",
            "type": ["ipv4_addr", "inet_service"],
            "elem": [
                {"concat": ["192.0.2.9", 80]},
                {"elem": {"val": {"concat": [{"range": ["192.0.2.1", "192.0.2.8"]}, 80]}}},
            ],
        },
    ),
)


def match(left, right, op="=="):
    return {"match": {"op": op, "left": left, "right": right}}


def document(chains, *, family="inet", table="t", base=None):
    """A table with these chains; ``base`` is the hook of the one named "base"."""
    where = {"family": family, "table": table}
    hook = {"type": "nat", "hook": "postrouting", "prio": 100, "policy": "accept"} | (base or {})
    objects = [{"metainfo": {}}, {"table": {"family": family, "name": table}}]
    objects += [{kind: body | where} for kind, body in SETS]
    for name, rules in chains.items():
        objects.append({"chain": where | {"name": name} | (hook if name == "base" else {})})
        for rule in rules:
            body = rule if isinstance(rule, dict) else {"expr": rule}
            objects.append({"rule": where | {"chain": name} | body})
    return json.dumps({"nftables": objects})


def ruleset(*rules, **chains):
    options = {key: chains.pop(key) for key in ("family", "table", "base") if key in chains}
    return Ruleset.of([parse_ruleset(document({"base": rules, **chains}, **options))])


def answer(*statements, flow=FLOW):
    """Whether all matches hold: yes, no, or maybe."""
    candidates = ruleset([*statements, MASQUERADE]).snat_candidates(flow)
    if candidates.certain:
        return "yes"
    return "maybe" if candidates.possible else "no"


@pytest.mark.parametrize(
    ("left", "op", "right", "expected"),
    [
        (SADDR, "==", "10.1.0.5", "yes"),
        (SADDR, "!=", NET, "no"),
        (SADDR, "==", {"range": ["10.1.0.1", "10.1.0.9"]}, "yes"),
        (SADDR, "==", {"set": ["10.1.0.4", NET]}, "yes"),
        (SADDR, "==", "@nets", "yes"),
        (DADDR, "==", "@addresses", "yes"),
        (DADDR, "!=", "@addresses", "no"),
        (DADDR, "==", "@empty", "no"),
        (DADDR, "!=", "@empty", "yes"),
        (DADDR, "==", "@dynamic", "maybe"),
        (DADDR, "==", "@missing", "maybe"),
        # A packet of the other family has no such field: it never matches.
        (DADDR6, "==", "2001:db8::1", "no"),
        (DADDR6, "!=", "2001:db8::1", "no"),
        ({"concat": [DADDR, DPORT]}, "==", "@pairs", "yes"),
        ({"concat": [DADDR, DPORT]}, "!=", "@pairs", "no"),
        ({"concat": [DADDR, L4PROTO]}, "==", {"concat": ["192.0.2.7", "tcp"]}, "yes"),
        (DPORT, "==", 80, "yes"),
        (DPORT, "==", {"set": [443, {"range": [79, 81]}]}, "yes"),
        (DPORT, "<", 80, "no"),
        (DPORT, "<=", 80, "yes"),
        (DPORT, ">", 79, "yes"),
        (DPORT, ">=", 81, "no"),
        ({"payload": {"protocol": "tcp", "field": "dport"}}, "==", 80, "yes"),
        ({"payload": {"protocol": "udp", "field": "dport"}}, "!=", 53, "no"),
        ({"payload": {"protocol": "ip", "field": "protocol"}}, "==", "tcp", "yes"),
        ({"payload": {"protocol": "ip", "field": "ttl"}}, "==", 64, "maybe"),
        # What is not understood still needs its protocol.
        ({"payload": {"protocol": "icmp", "field": "type"}}, "==", "echo-request", "no"),
        ({"payload": {"protocol": "ip6", "field": "hoplimit"}}, "==", 64, "no"),
        ({"&": [{"payload": {"protocol": "udp", "field": "length"}}, 1]}, "==", 1, "no"),
        ({"payload": {"base": "nh", "offset": 0, "len": 8}}, "==", 1, "maybe"),
        (L4PROTO, "==", {"set": ["tcp", "udp"]}, "yes"),
        ({"meta": {"key": "nfproto"}}, "==", "ipv4", "yes"),
        ({"meta": {"key": "protocol"}}, "==", "ip6", "no"),
        ({"meta": {"key": "skuid"}}, "==", 0, "maybe"),
        (OIF, "==", "eth0", "yes"),
        (OIF, "==", "eth*", "yes"),
        (OIF, "==", "eth\\*", "no"),
        (OIF, "!=", "docker0", "yes"),
        (OIF, "==", {"set": ["lo", "eth0"]}, "yes"),
        (OIF, "!=", {"set": ["lo", "eth0"]}, "no"),
        (OIF, "!=", {"set": ["lo", "cni0"]}, "yes"),
        ({"meta": {"key": "oif"}}, "==", 7, "maybe"),
        (MARK, "==", 0x4001, "yes"),
        (MARK, "!=", 0x4001, "no"),
        (MARK, "==", {"set": [1, 0x4001]}, "yes"),
        (MARK, "==", {"range": [1, 0x5000]}, "maybe"),
        ({"&": [MARK, 0x4000]}, "==", 0x4000, "yes"),
        ({"&": [MARK, 0x4000]}, "!=", 0, "yes"),
        ({"&": [MARK, 0x8000]}, "!=", 0, "no"),
        ({"ct": {"key": "mark"}}, "==", 1, "maybe"),
        (STATE, "in", "new", "yes"),
        (STATE, "in", ["established", "related"], "no"),
        (STATE, "==", {"set": ["established", "new"]}, "yes"),
        (STATE, "!=", "invalid", "yes"),
        # The state is compared with both bits at once: this always holds.
        (STATE, "!=", ["established", "new"], "maybe"),
        ({"ct": {"key": "status"}}, "in", "dnat", "yes"),
        ({"ct": {"key": "status"}}, "in", ["snat", "assured", "seen-reply"], "no"),
        ({"ct": {"key": "status"}}, "in", "expected", "maybe"),
        ({"ct": {"key": "status"}}, "==", "dnat", "maybe"),
        ({"ct": {"key": "direction"}}, "==", "original", "yes"),
        ({"ct": {"key": "direction"}}, "==", "reply", "no"),
        ({"ct": {"key": "ip daddr", "dir": "original"}}, "==", "10.96.0.1", "yes"),
        ({"ct": {"key": "proto-dst", "dir": "original"}}, "==", 8081, "no"),
        ({"ct": {"key": "ip saddr", "dir": "reply"}}, "==", "10.96.0.1", "maybe"),
        ({"fib": {"result": "type", "flags": ["daddr"]}}, "==", "local", "no"),
        ({"fib": {"result": "type", "flags": "daddr"}}, "!=", "local", "yes"),
        ({"fib": {"result": "type", "flags": ["daddr", "iif"]}}, "==", "local", "maybe"),
        ({"fib": {"result": "oif", "flags": ["saddr"]}}, "==", False, "maybe"),
    ],
)
def test_matches(left, op, right, expected):
    """A match holds, does not hold, or is unknown."""
    assert answer(match(left, right, op)) == expected


@pytest.mark.parametrize(
    "statement",
    [
        {"limit": {"rate": 5, "per": "second"}},
        {"set": {"op": "add", "elem": SADDR, "set": "@dynamic"}},
        {"xt": {"type": "match", "name": "statistic"}},
        {"ct count": {"val": 20, "inv": True}},
        {"tproxy": {"port": 15001}},
        {"flow": {"op": "add", "flowtable": "@fast"}},
        {"mangle": {"key": MARK, "value": {"map": {"key": SADDR, "data": {"set": []}}}}},
        {"counter": {"map": {"key": SADDR, "data": "@counters"}}},
    ],
)
def test_statements_that_may_end_a_rule(statement):
    """A limit may be reached, a map lack the element; a match of iptables shows only its name."""
    assert answer(statement) == "maybe"


SIX = replace(FLOW, src=ip_address("2001:db8::1"), dst=ip_address("2001:db8::2"), orig_dst=None)


@pytest.mark.parametrize(
    ("statement", "flow", "applies"),
    [
        ({"snat": {"family": "ip", "addr": "192.0.2.1"}}, FLOW, True),
        ({"snat": {"family": "ip", "addr": "192.0.2.1"}}, SIX, False),
        ({"snat": {"family": "ip6", "addr": "2001:db8::9"}}, FLOW, False),
        ({"dnat": {"family": "ip6", "addr": "2001:db8::9"}}, FLOW, False),
        ({"reject": {"type": "tcp reset"}}, FLOW, True),
        ({"reject": {"type": "tcp reset"}}, replace(FLOW, proto=17), False),
        ({"reject": {"type": "icmp", "expr": "port-unreachable"}}, SIX, False),
        ({"reject": {"type": "icmpv6", "expr": "port-unreachable"}}, SIX, True),
        ({"reject": {"type": "icmpx", "expr": "port-unreachable"}}, SIX, True),
        ({"mangle": {"key": {"payload": {"protocol": "ip", "field": "dscp"}}}}, SIX, False),
        ({"mangle": {"key": {"tcp option": {"name": "maxseg"}}}}, replace(FLOW, proto=17), False),
    ],
)
def test_statements_for_some_packets(statement, flow, applies):
    """nft leaves out the protocol that a statement is for; other packets meet the next rule."""
    candidates = ruleset([statement, {"accept": None}], DONE).snat_candidates(flow)
    assert bool(candidates.certain and candidates.certain.action == "masquerade") != applies


@pytest.mark.parametrize(
    "statement", [{"counter": {"packets": 3, "bytes": 9}}, {"log": None}, {"notrack": None}]
)
def test_statements_that_change_nothing(statement):
    """Counting and logging do not matter, and are not in the rule's text."""
    rules = ruleset([statement, MASQUERADE])
    assert rules.snat_candidates(FLOW).certain is not None
    assert "packets" not in rules.rules[0].text


def jump(chain, kind="jump"):
    return {kind: {"target": chain}}


LOCAL = match(OIF, "eth0")
OTHER = match(OIF, "eth1")
MAYBE = {"xt": {"type": "match", "name": "x"}}
DONE = [MASQUERADE]
SNAT = [{"snat": {"addr": "192.0.2.1"}}]


@pytest.mark.parametrize(
    ("base", "chains", "certain", "possible"),
    [
        ([DONE, SNAT], {}, "masquerade", 1),
        ([[OTHER, *DONE], SNAT], {}, "snat", 1),
        ([[jump("a")], SNAT], {"a": [[{"return": None}], DONE]}, "snat", 1),
        ([[jump("a")], SNAT], {"a": [[{"accept": None}], DONE]}, None, 0),
        ([[jump("a", "goto")], SNAT], {"a": [[OTHER, *DONE]]}, None, 0),
        ([[jump("a")], SNAT], {"a": [[jump("b", "goto")], DONE], "b": []}, "snat", 1),
        ([[MAYBE, *DONE], SNAT], {}, None, 2),
        ([[MAYBE, {"accept": None}], SNAT], {}, None, 1),
        ([[MAYBE, {"continue": None}], SNAT], {}, "snat", 1),
        ([[{"xt": {"type": "target", "name": "X"}}], SNAT], {}, None, 2),
        ([[{"queue": {"num": 1}}], SNAT], {}, None, 2),
        ([[{"something": "new"}], SNAT], {}, None, 2),
        ([[jump("missing")], SNAT], {}, None, 1),
        ([[jump("a")], SNAT], {"a": [[jump("a")], DONE]}, None, 2),
        ([[{"snat": {"addr": {"map": {"key": SADDR, "data": "@m"}}}}]], {}, None, 1),
    ],
)
def test_walk(base, chains, certain, possible):
    """Chains are walked as the kernel does; a rule is certain only if nothing else can be."""
    candidates = ruleset(*base, **chains).snat_candidates(FLOW)
    assert (candidates.certain and candidates.certain.action) == certain
    assert len(candidates.possible) == possible


def vmap(key, data):
    return {"vmap": {"key": key, "data": data}}


def verdicts(*pairs):
    return {"set": [[key, verdict] for key, verdict in pairs]}


@pytest.mark.parametrize(
    ("statement", "certain", "possible"),
    [
        (vmap(OIF, verdicts(("eth0", jump("a")), ("eth1", {"accept": None}))), "snat", 1),
        (vmap(OIF, verdicts(("eth1", jump("a")))), "masquerade", 1),
        (vmap(OIF, verdicts(("eth0", {"accept": None}))), None, 0),
        (vmap(DPORT, verdicts(({"range": [1, 100]}, jump("a", "goto")))), "snat", 1),
        (vmap(STATE, verdicts(("new", jump("a")), ("established", {"accept": None}))), "snat", 1),
        # The selector is not understood: any of them may match, or none.
        (vmap({"numgen": {"mode": "random", "mod": 2}}, verdicts((0, jump("a")))), None, 2),
    ],
)
def test_verdict_maps(statement, certain, possible):
    """A verdict map is looked up, inline too; without a hit, the next rule is met."""
    candidates = ruleset([statement], DONE, a=[SNAT]).snat_candidates(FLOW)
    assert (candidates.certain and candidates.certain.action) == certain
    assert len(candidates.possible) == possible


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0x4000, True),
        ({"|": [MARK, 0x4000]}, True),
        ({"^": [MARK, 0x4000]}, False),
        ({"&": [MARK, 0xFFFF3FFF]}, False),
        ({"|": [{"&": [MARK, 0xFF]}, 0x4000]}, True),
        ({"^": [{"&": [MARK, 0xFFFF]}, 0x4000]}, False),
        (MARK, True),
        ({"ct": {"key": "mark"}}, None),
        ({"<<": [MARK, 1]}, None),
    ],
)
def test_marks_changed_on_the_way(value, expected):
    """A match after a change of the mark sees the changed mark, in the same rule too."""
    change = {"mangle": {"key": MARK, "value": value}}
    asked = match({"&": [MARK, 0x4000]}, 0, "!=")
    candidates = ruleset([change, asked, MASQUERADE]).snat_candidates(FLOW)
    assert (candidates.certain is not None) == (expected is True)
    assert bool(candidates.possible) == (expected is not False)


def test_change_of_the_connection_mark_makes_it_unknown():
    """Once a rule sets the connection's mark, its earlier value does not help."""
    asked = match({"ct": {"key": "mark"}}, 7)
    flow = replace(FLOW, ct_mark=7)
    assert ruleset([asked, MASQUERADE]).snat_candidates(flow).certain
    change = {"mangle": {"key": {"ct": {"key": "mark"}}, "value": MARK}}
    candidates = ruleset([OTHER, change], [asked, MASQUERADE]).snat_candidates(flow)
    assert (candidates.certain, len(candidates.possible)) == (None, 1)


def test_connection_mark_that_is_changed_after_snat():
    """The entry's mark is read at the end of the hook, where a later chain may have set it."""
    mark = {"ct": {"key": "mark"}}
    asks = parse_ruleset(document({"base": [[match(mark, 7), MASQUERADE], SNAT]}))
    change = [{"mangle": {"key": mark, "value": 7}}]
    flow = replace(FLOW, ct_mark=7)
    for prio, expected in ((150, None), (50, "masquerade")):
        base = {"type": "filter", "prio": prio}
        sets = parse_ruleset(document({"base": [change]}, table="sets", base=base))
        certain = Ruleset.of([asks, sets]).snat_candidates(flow).certain
        assert (certain and certain.action) == expected


def test_packets_without_an_entry():
    """Without a conntrack entry there is no direction and no original address to compare with."""
    flow = replace(FLOW, states=frozenset({"untracked"}), orig_dst=FLOW.dst)
    base = {"type": "filter", "hook": "prerouting", "prio": -300}
    for condition in (
        match({"ct": {"key": "direction"}}, "original"),
        match({"ct": {"key": "ip daddr", "dir": "original"}}, "192.0.2.7"),
    ):
        rules = ruleset([condition, {"drop": None}], base=base)
        candidates = rules.drop_candidates(flow, "prerouting")
        assert (candidates.certain, len(candidates.possible)) == (None, 1)


@pytest.mark.parametrize("flags", ["dormant", ["dormant"]])
def test_dormant_tables(flags):
    """The kernel does not run the chains of a dormant table."""
    objects = json.loads(document({"base": [DONE]}))["nftables"]
    objects[1]["table"]["flags"] = flags
    assert parse_ruleset(json.dumps({"nftables": objects})).base_chains == ()


def test_a_single_flag_without_a_list():
    """nft 1.1.4 prints the only flag of a set as a string."""
    text = document({"base": [[match(DADDR, "@dynamic"), MASQUERADE]]})
    text = text.replace('"flags": ["timeout"]', '"flags": "timeout"')
    assert Ruleset.of([parse_ruleset(text)]).snat_candidates(FLOW).certain is None


def test_priorities_order_base_chains():
    """The chain with the smaller priority comes first, whatever the order of the tables."""
    late = parse_ruleset(document({"base": [DONE]}, table="late", base={"prio": 110}))
    early = parse_ruleset(document({"base": [SNAT]}, table="early", base={"prio": 90}))
    assert Ruleset.of([late, early]).snat_candidates(FLOW).certain.table == "early"


def test_accepted_in_one_table_is_translated_in_the_next():
    """In nat, too, accept ends a base chain and not the hook (nf_nat_inet_fn)."""
    first = parse_ruleset(document({"base": [[{"accept": None}], DONE]}, base={"prio": 90}))
    second = parse_ruleset(document({"base": [SNAT]}, table="second"))
    assert Ruleset.of([first, second]).snat_candidates(FLOW).certain.table == "second"


def test_families():
    """Chains of ip and ip6 see their own packets, those of inet both."""
    six = replace(FLOW, src=ip_address("2001:db8::1"), dst=ip_address("2001:db8::2"))
    for family, expected in (("ip", (True, False)), ("ip6", (False, True)), ("inet", (True, True))):
        rules = ruleset(DONE, family=family)
        found = tuple(bool(rules.snat_candidates(flow).certain) for flow in (FLOW, six))
        assert found == expected


@pytest.mark.parametrize("family", ["arp", "bridge", "netdev"])
def test_families_that_see_no_connections(family):
    """Tables of other families are left out."""
    assert ruleset(DONE, family=family).rules == ()


def test_ports_of_icmp():
    """``th dport`` of an ICMP packet looks at something that is not known."""
    flow = replace(FLOW, proto=ICMP, dport=8 << 8)
    assert answer(match(DPORT, 80), flow=flow) == "maybe"
    assert answer(match({"payload": {"protocol": "tcp", "field": "dport"}}, 80), flow=flow) == "no"


def test_absent_interface():
    """Whether "not this interface" holds where there is none depends on the kernel."""
    local = replace(FLOW, iif="")
    iif = {"meta": {"key": "iifname"}}
    assert answer(match(iif, "lo"), flow=local) == "no"
    assert answer(match(iif, "lo", "!="), flow=local) == "maybe"


def test_before_dnat_a_packet_has_its_first_destination():
    """Chains at prerouting and before DNAT see where the client sent the packet."""
    base = {"type": "filter", "hook": "prerouting"}
    rule = [match(DADDR, "10.96.0.1"), {"drop": None}]
    before = ruleset(rule, base=base | {"prio": -110})
    assert before.drop_candidates(FLOW, "prerouting").certain is not None
    after = ruleset(rule, base=base | {"prio": -90})
    assert after.drop_candidates(FLOW, "prerouting").possible == ()


def test_after_snat_a_packet_has_its_new_source():
    """Chains at postrouting and after SNAT see the source that the backend sees."""
    rule = [match(SADDR, "192.0.2.1"), {"drop": None}]
    rules = ruleset(rule, base={"type": "filter", "prio": 300})
    seen = replace(FLOW, seen_source=ip_address("192.0.2.1"))
    assert rules.drop_candidates(seen, "postrouting").certain is not None
    assert rules.drop_candidates(FLOW, "postrouting").only is not None
    assert rules.drop_candidates(FLOW, "postrouting").certain is None


def test_drops_in_maps_have_the_comment_of_their_element():
    """An element that drops, or leads to a helper that does, is identified by its own comment."""
    key = {"elem": {"val": 80, "comment": "default/echo:http"}}
    base = {"type": "filter", "hook": "forward", "prio": 0}
    direct = ruleset(
        [vmap(DPORT, verdicts((key, {"drop": None})))], base=base, family="ip", table="kube-proxy"
    )
    helped = ruleset(
        [vmap(DPORT, verdicts((key, jump("helper", "goto"))))],
        helper=[[{"reject": {"type": "icmp", "expr": "port-unreachable"}}]],
        base=base,
        family="ip",
        table="kube-proxy",
    )
    for rules, action in ((direct, Action.DROP), (helped, Action.REJECT)):
        rule = rules.drop_candidates(FLOW, "forward").certain
        assert (rule.action, rule.comment) == (action, "default/echo:http")
    assert direct.rules[0].text.endswith("# 80 : drop")


def test_policy_that_drops():
    """What reaches the end of a base chain with policy drop is dropped by it."""
    base = {"type": "filter", "hook": "forward", "prio": 0, "policy": "drop"}
    rules = ruleset([LOCAL, {"counter": None}], base=base)
    rule = rules.drop_candidates(FLOW, "forward").certain
    assert rule.text == "type filter hook forward priority 0; policy drop;"
    accepting = ruleset([LOCAL, {"accept": None}], base=base)
    assert accepting.drop_candidates(FLOW, "forward").possible == ()


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (
            [LOCAL, match(SADDR, NET), match(DADDR, NET, "!="), MASQUERADE],
            'oifname "eth0" ip saddr 10.1.0.0/16 ip daddr != 10.1.0.0/16 masquerade',
        ),
        (
            [
                match({"&": [MARK, 0x4000]}, 0, "!="),
                {"mangle": {"key": MARK, "value": {"^": [MARK, 0x4000]}}},
                {"masquerade": {"flags": "fully-random"}},
            ],
            "meta mark & 0x00004000 != 0x00000000 meta mark set meta mark ^ 0x00004000 "
            "masquerade fully-random",
        ),
        (
            [match(STATE, ["established", "related"], "in"), {"drop": None}],
            "ct state established,related drop",
        ),
        (
            {"expr": [match(DPORT, {"set": [80, 443]}), *SNAT], "comment": "mine"},
            'th dport { 80, 443 } snat to 192.0.2.1 comment "mine"',
        ),
        (
            [
                match({"fib": {"result": "type", "flags": ["daddr"]}}, "local"),
                {"reject": {"type": "tcp reset"}},
            ],
            "fib daddr type local reject with tcp reset",
        ),
        ([{"snat": {"family": "ip", "addr": "192.0.2.1", "port": 7}}], "snat ip to 192.0.2.1:7"),
    ],
)
def test_text_is_that_of_nft(rule, text):
    """A rule is written as ``nft list ruleset`` prints it, in one line."""
    assert ruleset(rule).rules[0].text == text


def test_new_sources():
    """The addresses that a rule translates to are read."""
    for addr, expected in (
        ("192.0.2.1", "192.0.2.1"),
        ({"range": ["192.0.2.1", "192.0.2.3"]}, "192.0.2.1-192.0.2.3"),
        ({"prefix": {"addr": "192.0.2.0", "len": 24}}, "192.0.2.0-192.0.2.255"),
    ):
        (rule,) = ruleset([{"snat": {"addr": addr}}]).rules
        assert [str(to) for to in rule.to_addresses] == [expected]


POSTROUTING = "*nat\n:POSTROUTING ACCEPT [0:0]\n-A POSTROUTING -j MASQUERADE\nCOMMIT\n"


def nat(rules, **options):
    """What nft prints of iptables' own chain."""
    where = {"family": "ip", "table": "nat"} | options
    text = document({"base": rules}, **where)
    return parse_ruleset(text.replace('"base"', '"POSTROUTING"'))


def test_chains_of_iptables_count_once():
    """What iptables-save shows is left out of what nft shows, and only that."""
    shown = parse_save(POSTROUTING, "ipv4")
    both = Ruleset.of([shown, nat([DONE])])
    assert [rule.tool for rule in both.rules] == ["iptables"]
    assert both.snat_candidates(FLOW).certain.tool == "iptables"
    both = Ruleset.of([shown, nat([DONE], family="ip6")])
    assert [rule.tool for rule in both.rules] == ["iptables", "nftables"]
    assert [rule.tool for rule in Ruleset.of([nat([DONE])]).rules] == ["nftables"]


def test_other_chains_in_tables_of_iptables():
    """iptables-save leaves out base chains that iptables does not make, and shows empty ones."""
    shown = parse_save("*nat\n:POSTROUTING ACCEPT [0:0]\nCOMMIT\n", "ipv4")
    named = parse_ruleset(document({"base": [DONE]}, family="ip", table="nat"))
    for other in (named, nat([DONE], base={"prio": 90})):
        certain = Ruleset.of([shown, other]).snat_candidates(FLOW).certain
        assert certain.tool == "nftables"


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        # iptables-nft-save 1.8.9 prints the first three without a condition.
        (match(SADDR, "@nets"), "nftables"),
        (match(SADDR, {"set": ["10.1.0.4"]}), "nftables"),
        (match({"concat": [SADDR, DADDR]}, {"set": []}), "nftables"),
        (match(SADDR, {"range": ["10.1.0.1", "10.1.0.9"]}), "nftables"),
        (match(SADDR, "10.1.0.5", ">"), "nftables"),
        ({"mangle": {"key": MARK, "value": 1}}, "nftables"),
        (match(SADDR, "10.1.0.5"), "iptables"),
        (match(DPORT, {"range": [80, 90]}), "iptables"),
        (match({"&": [MARK, 1]}, 1), "iptables"),
    ],
)
def test_own_rules_of_nft_in_chains_of_iptables(condition, expected):
    """A chain with a rule that iptables-save misprints is read from nft."""
    rules = Ruleset.of([parse_save(POSTROUTING, "ipv4"), nat([[condition, MASQUERADE]])]).rules
    assert [rule.tool for rule in rules] == [expected]


def test_tables_of_iptables_have_its_chain_names():
    """If only nft is installed, chains in iptables' tables still show their owner."""
    rules = ruleset(
        [jump("FLANNEL-POSTRTG")],
        family="ip",
        table="nat",
        **{"FLANNEL-POSTRTG": [[{"xt": {"type": "target", "name": "MASQUERADE"}}]]},
    )
    candidates = rules.snat_candidates(FLOW)
    assert candidates.certain is None
    assert candidates.owners == {Owner.FLANNEL}
    assert candidates.only.action is Action.UNKNOWN


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"nftables": 5}', '{"nftables": [5]}', '{"nftables": [{"rule": {}}]}'],
)
def test_what_is_no_output_of_the_tool(text):
    """Output that is truncated, or of something else, is refused in one line."""
    with pytest.raises(RulesetError, match="nft -j list ruleset") as error:
        parse_ruleset(text)
    assert "\n" not in str(error.value)
