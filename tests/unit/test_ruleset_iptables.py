"""What ``iptables-save`` prints, and how it is walked."""

import pickle
from dataclasses import replace
from ipaddress import ip_address

import pytest

from tracer.model import ICMP, TCP, UDP, Connection, FiveTuple, Hook, Status
from tracer.ruleset.errors import RulesetError
from tracer.ruleset.iptables import parse_save
from tracer.ruleset.model import Action, Flow, Owner, Range, Ruleset

HEADS = (":PREROUTING", ":INPUT", ":FORWARD", ":OUTPUT", ":POSTROUTING")
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


def save(*lines, table="nat", policies=()):
    chains = {line.split()[1] for line in lines} - {head[1:] for head in HEADS}
    heads = [f"{head} ACCEPT [0:0]" for head in HEADS] + [f":{chain} - [0:0]" for chain in chains]
    return "\n".join([f"*{table}", *heads, *policies, *lines, "COMMIT", ""])


def ruleset(*lines, **options):
    return Ruleset.of([parse_save(save(*lines, **options), "ipv4")])


def answer(match, flow=FLOW):
    """Whether a match holds: yes, no, or maybe."""
    candidates = ruleset(f"-A POSTROUTING {match} -j MASQUERADE").snat_candidates(flow)
    if candidates.certain:
        return "yes"
    return "maybe" if candidates.possible else "no"


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("", "yes"),
        ("-s 10.1.0.0/16", "yes"),
        ("-s 10.1.0.5/32", "yes"),
        ("-s 10.2.0.0/16", "no"),
        ("! -s 10.2.0.0/16", "yes"),
        ("! -s 10.1.0.0/16 -d 192.0.2.0/24", "no"),
        ("-d 192.0.2.7/32 -p tcp", "yes"),
        ("-p udp", "no"),
        ("! -p udp", "yes"),
        ("-p 6", "yes"),
        ("-p nonsense", "maybe"),
        ("-o eth0", "yes"),
        ("-o eth+", "yes"),
        ("! -o docker0", "yes"),
        ("-o eth1", "no"),
        ("-i veth+", "yes"),
        ("-p tcp -m tcp --dport 80", "yes"),
        ("-p tcp -m tcp --dport 8080", "no"),
        ("-p tcp -m tcp --dport 1:100", "yes"),
        ("-p tcp -m tcp --dport :79", "no"),
        ("-p tcp -m tcp ! --dport 443", "yes"),
        ("-p tcp -m tcp --sport 40000:", "yes"),
        ("-p tcp -m multiport --dports 22,70:90", "yes"),
        ("-p tcp -m multiport ! --dports 22,70:90", "no"),
        ("-p tcp -m multiport --ports 80", "maybe"),
        ("-p tcp -m tcp --tcp-flags SYN SYN", "maybe"),
        ("-m mark --mark 0x4000/0x4000", "yes"),
        ("-m mark --mark 0x4000", "no"),
        ("-m mark --mark 0x4001", "yes"),
        ("-m mark ! --mark 0x4000/0x4000", "no"),
        ("-m connmark --mark 0x1/0x1", "maybe"),
        ("-m conntrack --ctstate NEW", "yes"),
        ("-m conntrack --ctstate RELATED,ESTABLISHED", "no"),
        ("-m conntrack --ctstate DNAT", "yes"),
        ("-m conntrack --ctstate SNAT", "no"),
        ("-m conntrack ! --ctstate INVALID,DNAT", "no"),
        ("-m conntrack --ctdir ORIGINAL", "yes"),
        ("-m conntrack --ctdir REPLY", "no"),
        ("-m conntrack --ctorigdst 10.96.0.1/32 --ctorigdstport 8080", "yes"),
        ("-m conntrack --ctorigdst 10.96.0.2/32", "no"),
        ("-m conntrack --ctstatus ASSURED", "maybe"),
        ("-m state --state NEW", "yes"),
        ("-m addrtype ! --dst-type LOCAL", "yes"),
        ("-m addrtype --src-type LOCAL", "no"),
        ("-m addrtype --dst-type UNICAST", "maybe"),
        ("-m addrtype --src-type LOCAL --limit-iface-out", "no"),
        ("-m addrtype ! --src-type LOCAL --limit-iface-out", "maybe"),
        ("-m iprange --src-range 10.1.0.1-10.1.0.9", "yes"),
        ("-m iprange ! --dst-range 192.0.2.1-192.0.2.9", "no"),
        ('-m comment --comment "-j DROP, said \\"he\\" \\\\ -s 10.9.0.0/16"', "yes"),
        ("-m comment --comment -dash", "yes"),
        ("-m nfacct --nfacct-name  some_name", "yes"),
        ("-m set --match-set pods src", "maybe"),
        ("-m set --match-set pods src -s 10.9.0.0/16", "no"),
        ("-m statistic --mode random --probability 0.5", "maybe"),
        ("-m limit --limit 5/sec", "maybe"),
        ("-m socket", "maybe"),
        ("-m physdev --physdev-is-bridged", "maybe"),
        ("--some-option", "maybe"),
        ("-f", "maybe"),
    ],
)
def test_matches(match, expected):
    """A match holds, does not hold, or is unknown."""
    assert answer(match) == expected


@pytest.mark.parametrize(
    ("match", "blurred"),
    [
        ("-m mark --mark 0x4000/0x4000", {"mark": None}),
        ("-o eth0", {"oif": None}),
        ("! -i eth0", {"iif": None}),
        ("-m addrtype --dst-type LOCAL", {"local_addresses": None}),
        ("-m conntrack --ctstate DNAT", {"orig_dst": None}),
        ("-m conntrack --ctorigdstport 8080", {"orig_dport": None}),
        ("-m conntrack --ctstate NEW", {"states": frozenset({"new", "established"})}),
        ("-m conntrack --ctorigsrc 10.1.0.5/32", {"is_reply": True}),
    ],
)
def test_facts_that_are_not_known(match, blurred):
    """Without the fact that a match looks at, it is unknown."""
    assert answer(match, replace(FLOW, **blurred)) == "maybe"


def test_loopback_is_always_local():
    """127.0.0.0/8 is local even if the node's addresses are not known."""
    flow = replace(FLOW, src=ip_address("127.0.0.1"), local_addresses=None)
    assert answer("-m addrtype --src-type LOCAL", flow) == "yes"


def test_icmp_has_no_ports():
    """The id of an ICMP query is not taken for a port."""
    flow = replace(FLOW, proto=ICMP, sport=40000, dport=8 << 8)
    assert answer("-p tcp -m tcp --sport 40000", flow) == "no"
    assert answer("-p icmp", flow) == "yes"


def test_absent_interface_is_none_of_those_named():
    """A packet from the node itself has no incoming interface: no name fits."""
    local = replace(FLOW, iif="")
    assert answer("-i veth1", local) == "no"
    assert answer("-i v+", local) == "no"
    assert answer("! -i veth1", local) == "yes"


@pytest.mark.parametrize(
    ("lines", "certain", "possible"),
    [
        # The first that matches wins.
        (["POSTROUTING -j MASQUERADE", "POSTROUTING -j SNAT --to-source 192.0.2.1"], 0, [0]),
        # Returned from a chain, the next rule is met; accepted, none.
        (["POSTROUTING -j A", "POSTROUTING -j MASQUERADE", "A -j RETURN"], 1, [1]),
        (["POSTROUTING -j A", "POSTROUTING -j MASQUERADE", "A -j ACCEPT"], None, []),
        # A goto comes back to the caller of the chain that it stands in.
        (
            ["POSTROUTING -j A", "POSTROUTING -j MASQUERADE", "A -g B", "A -j SNAT", "B -p udp"],
            1,
            [1],
        ),
        (["POSTROUTING -g A", "POSTROUTING -j MASQUERADE", "A -p udp -j SNAT"], None, []),
        # An unknown match makes two ways.
        (["POSTROUTING -m x -j MASQUERADE", "POSTROUTING -j SNAT"], None, [0, 1]),
        (["POSTROUTING -m x -j RETURN", "POSTROUTING -j MASQUERADE"], None, [1]),
        (["POSTROUTING -m x -j A", "A -j ACCEPT", "POSTROUTING -j MASQUERADE"], None, [2]),
        (["POSTROUTING -m x -j A", "A -j RETURN", "POSTROUTING -j MASQUERADE"], 2, [2]),
        # Rules that only log do not matter, whatever they match.
        (["POSTROUTING -m x -j LOG", "POSTROUTING -j MASQUERADE"], 1, [1]),
        (["POSTROUTING -m x", "POSTROUTING -j MASQUERADE"], 1, [1]),
        # A target that is not understood may do anything.
        (["POSTROUTING -j STRANGE", "POSTROUTING -j MASQUERADE"], None, [0, 1]),
        (["POSTROUTING -p udp -j STRANGE", "POSTROUTING -j MASQUERADE"], 1, [1]),
        # A chain that nothing leads to, and one that leads to itself.
        (["A -j MASQUERADE"], None, []),
        (["POSTROUTING -j A", "A -j A", "A -j MASQUERADE"], None, [2]),
    ],
)
def test_walk(lines, certain, possible):
    """Chains are walked as the kernel does; a rule is certain only if nothing else can be."""
    lines = [f"-A {line}" for line in lines]
    candidates = ruleset(*lines).snat_candidates(FLOW)
    assert [rule.text for rule in candidates.possible] == [lines[number] for number in possible]
    assert candidates.certain == (None if certain is None else candidates.possible[0])
    assert certain is None or candidates.certain.text == lines[certain]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("MARK --set-xmark 0x4000/0x4000", True),
        ("MARK --set-xmark 0x0/0x4000", False),
        ("MARK --set-xmark 0x4000/0x0", False),
        ("MARK --set-xmark 0x4000/0xffffffff", True),
        ("MARK --set-mark 0x1", False),
        ("MARK --or-mark 0x8000", True),
        ("MARK --and-mark 0xffff3fff", False),
        ("MARK --xor-mark 0x4000", False),
        ("CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff", None),
        ("CONNMARK --save-mark", True),
        ("MARK --strange 1", None),
    ],
)
def test_marks_changed_on_the_way(change, expected):
    """A rule after a change of the mark sees the changed mark, as kube-proxy's own rules do."""
    rules = ruleset(
        f"-A POSTROUTING -j {change}",
        "-A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE",
    )
    candidates = rules.snat_candidates(FLOW)
    assert (candidates.certain is not None) == (expected is True)
    assert bool([rule for rule in candidates.possible if rule.is_snat]) == (expected is not False)


def test_mark_of_which_some_bits_are_known():
    """A bit that a rule set is known even if the mark was not."""
    flow = replace(FLOW, mark=None)
    rules = ruleset(
        "-A POSTROUTING -j MARK --set-xmark 0x4000/0x4000",
        "-A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE",
        "-A POSTROUTING -j SNAT --to-source 192.0.2.1",
    )
    assert rules.snat_candidates(flow).certain.action is Action.MASQUERADE


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("SNAT --to-source 192.0.2.1", ["192.0.2.1"]),
        ("SNAT --to-source 192.0.2.1-192.0.2.9:1024-65535 --random-fully", ["192.0.2.1-192.0.2.9"]),
        ("SNAT --to-source 192.0.2.1:53", ["192.0.2.1"]),
        ("SNAT --to-source :53", []),
        ("NETMAP --to 192.0.2.0/24", ["192.0.2.0-192.0.2.255"]),
        ("MASQUERADE --to-ports 1024-65535", []),
    ],
)
def test_new_sources(target, expected):
    """The addresses that a rule translates to are read, and ports are not taken for them."""
    (rule,) = ruleset(f"-A POSTROUTING -j {target}").rules
    assert [str(to) for to in rule.to_addresses] == expected


def test_new_sources_of_ipv6():
    """In IPv6, an address with a port is in brackets."""
    text = save("-A POSTROUTING -j SNAT --to-source [2001:db8::1]:1024-2048")
    (rule,) = parse_save(text, "ipv6").rules
    one = ip_address("2001:db8::1")
    assert rule.to_addresses == (Range(first=one, last=one),)


def test_rule_that_leads_elsewhere_is_not_the_one():
    """A rule whose source is not the one that the backend saw cannot have matched."""
    rules = ruleset(
        "-A POSTROUTING -m x -j SNAT --to-source 192.0.2.1",
        "-A POSTROUTING -j SNAT --to-source 192.0.2.2",
    )
    seen = replace(FLOW, seen_source=ip_address("192.0.2.2"))
    assert rules.snat_candidates(seen).only.text.endswith("192.0.2.2")
    other = replace(FLOW, seen_source=ip_address("192.0.2.3"))
    candidates = rules.snat_candidates(other)
    assert (candidates.certain, candidates.possible) == (None, ())
    assert "a source other than the one seen" in candidates.reason


def test_other_family_is_not_met():
    """Rules of iptables do not see IPv6."""
    flow = replace(FLOW, src=ip_address("2001:db8::1"), dst=ip_address("2001:db8::2"))
    assert ruleset("-A POSTROUTING -j MASQUERADE").snat_candidates(flow).possible == ()


def test_related_connection_is_never_certain():
    """Helpers translate expected connections before any rule is met."""
    flow = replace(FLOW, states=frozenset({"related"}))
    candidates = ruleset("-A POSTROUTING -j MASQUERADE").snat_candidates(flow)
    assert candidates.certain is None
    assert candidates.only is not None
    assert "related" in candidates.reason


def test_what_is_unread_leaves_nothing_certain():
    """If some rules could not be read, they may have come first."""
    part = parse_save(save("-A POSTROUTING -j MASQUERADE"), "ipv4")
    candidates = Ruleset.of([part], ["nft is not installed"]).snat_candidates(FLOW)
    assert candidates.certain is None
    assert candidates.only is not None
    assert candidates.reason == "not all rules were read: nft is not installed"


@pytest.mark.parametrize("second", ["-j MASQUERADE", "-m mark --mark 0x1/0x1 -j MASQUERADE"])
def test_two_variants_at_the_same_priority(second):
    """Legacy and new iptables are attached to one hook with one priority: either may be first."""
    new = parse_save(save("-A POSTROUTING -s 10.0.0.0/8 -j MASQUERADE"), "ipv4")
    old = parse_save(save(f"-A POSTROUTING {second}"), "ipv4", "iptables-legacy")
    both = Ruleset.of([new, old])
    candidates = both.snat_candidates(FLOW)
    assert candidates.certain is None
    assert {rule.tool for rule in candidates.possible} == {"iptables", "iptables-legacy"}
    alone = both.snat_candidates(replace(FLOW, src=ip_address("172.16.0.1"), mark=1))
    assert alone.certain.tool == "iptables-legacy"


def test_mark_changed_by_a_chain_of_the_same_priority():
    """A mark that a chain changes may or may not be changed when the other chain is met."""
    new = parse_save(save("-A POSTROUTING -j MARK --set-xmark 0x0/0x4000"), "ipv4")
    old = parse_save(
        save("-A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE"), "ipv4", "iptables-legacy"
    )
    candidates = Ruleset.of([new, old]).snat_candidates(FLOW)
    assert candidates.certain is None
    assert candidates.only.tool == "iptables-legacy"


def test_drops_in_the_order_of_tables():
    """At a hook, the tables come in their order: raw, mangle, nat, filter, security."""
    parts = [
        parse_save(save(f"-A FORWARD -m comment --comment {name} -j DROP", table=name), "ipv4")
        for name in ("filter", "mangle", "security")
    ]
    assert Ruleset.of(parts).drop_candidates(FLOW, "forward").certain.comment == "mangle"
    assert Ruleset.of(parts).drop_candidates(FLOW, "input").possible == ()


def test_accepted_by_one_table_is_still_seen_by_the_next():
    """ACCEPT ends a table, not the hook."""
    parts = [
        parse_save(save("-A FORWARD -j ACCEPT", table="mangle"), "ipv4"),
        parse_save(save("-A FORWARD -j REJECT", table="filter"), "ipv4"),
    ]
    assert Ruleset.of(parts).drop_candidates(FLOW, "forward").certain.action is Action.REJECT


def test_mark_of_a_drop_is_that_at_the_end():
    """A dropped packet shows the mark it had then: before a rule changed it, it is not known."""
    rules = ruleset(
        "-A FORWARD -m mark --mark 0x1/0x1 -j DROP",
        "-A FORWARD -j MARK --set-xmark 0x1/0x1",
        "-A FORWARD -j DROP",
        table="filter",
    )
    candidates = rules.drop_candidates(replace(FLOW, mark=1), "forward")
    assert (candidates.certain, len(candidates.possible)) == (None, 2)
    assert len(rules.drop_candidates(replace(FLOW, mark=2), "forward").possible) == 2


def test_counters_make_no_difference():
    """``iptables-save -c`` is read as without counters."""
    plain = save("-A POSTROUTING -s 10.0.0.0/8 -j MASQUERADE")
    counted = plain.replace("-A POST", "[12:345] -A POST").replace("ACCEPT [0:0]", "ACCEPT [7:9]")
    assert parse_save(counted, "ipv4").rules == parse_save(plain, "ipv4").rules
    (rule,) = parse_save(counted, "ipv4").rules
    assert rule.text == "-A POSTROUTING -s 10.0.0.0/8 -j MASQUERADE"


def test_comment_is_unquoted():
    """Quotes and escapes of a comment are those of the tool, not of the comment."""
    line = r'-A POSTROUTING -m comment --comment "say \"hi\" \\ it\'s -j DROP" -j MASQUERADE'
    (rule,) = ruleset(line).rules
    assert rule.comment == 'say "hi" \\ it\'s -j DROP'
    assert rule.text == line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-A POSTROUTING -j ACCEPT\n", "line 1 is outside any table"),
        ("*nat\n:POSTROUTING ACCEPT [0:0]\n", "ends within table nat"),
        ("*nat\nnonsense\nCOMMIT\n", "line 2 is neither a rule nor a chain: nonsense"),
        ("iptables-save: command not found\n", "outside any table"),
    ],
)
def test_what_is_no_output_of_the_tool(text, message):
    """Output that is truncated, or of something else, is refused: rules may be missing."""
    with pytest.raises(RulesetError, match=message) as error:
        parse_save(text, "ipv4")
    assert "\n" not in str(error.value)


def test_empty_output_is_no_rules():
    """A namespace without rules prints nothing."""
    part = parse_save("", "ipv4")
    assert (part.base_chains, part.rules, part.owners) == ((), (), frozenset())


def test_unowned_masquerade_is_of_unknown_owner():
    """A rule without a known name has no known owner."""
    (rule,) = ruleset("-A POSTROUTING -s 10.0.0.0/8 -j MASQUERADE").rules
    assert rule.owner is Owner.UNKNOWN


def tuple_(src, dst, sport, dport, proto=UDP):
    return FiveTuple(
        src=ip_address(src), dst=ip_address(dst), sport=sport, dport=dport, proto=proto
    )


def connection(**changes):
    fields = {
        "ktime_ns": 0,
        "netns": 1,
        "hook": Hook.NF_POSTROUTING,
        "orig": tuple_("198.51.100.10", "10.240.0.3", 5000, 30053),
        "reply": tuple_("10.244.1.11", "10.244.1.1", 8053, 61000),
        "status": Status.CONFIRMED,
        "zone": 0,
        "mark": 0x4000,
        "ct_mark": 0,
        "is_related": False,
        "iif": 2,
        "oif": 0,
    }
    return Connection(**(fields | changes))


def test_flow_of_a_connection():
    """At POSTROUTING a packet has its own source and the backend's address."""
    flow = Flow.of(connection(), iif="eth0")
    assert (str(flow.src), flow.sport) == ("198.51.100.10", 5000)
    assert (str(flow.dst), flow.dport) == ("10.244.1.11", 8053)
    assert (str(flow.orig_dst), flow.orig_dport) == ("10.240.0.3", 30053)
    assert str(flow.seen_source) == "10.244.1.1"
    assert (flow.mark, flow.iif, flow.oif) == (0x4000, "eth0", "")
    assert flow.states == {"new"}


def test_flow_of_a_connection_that_was_there_before():
    """An entry from conntrack's table has neither a known mark nor known interfaces."""
    flow = Flow.of(connection(hook=Hook.CONNTRACK, mark=None, iif=0, is_related=True))
    assert (flow.mark, flow.ct_mark, flow.iif, flow.oif) == (None, None, None, None)
    assert flow.states == {"related"}


def test_rules_travel_between_processes():
    """A snapshot can be sent from a process that may read rules to one that may not."""
    rules = ruleset("-A POSTROUTING -s 10.1.0.0/16 -j MASQUERADE")
    there = pickle.loads(pickle.dumps(rules))  # noqa: S301 - our own
    assert there == rules
    assert there.snat_candidates(FLOW) == rules.snat_candidates(FLOW)
