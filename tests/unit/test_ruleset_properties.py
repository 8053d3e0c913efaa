"""What holds for any rules and any packet."""

import json
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.kube_proxy import DATA
from tracer.ruleset.errors import RulesetError
from tracer.ruleset.iptables import parse_save
from tracer.ruleset.model import Flow, Ruleset
from tracer.ruleset.nftables import parse_ruleset

FILES = Path(__file__).parents[1] / "data" / "rulesets"
HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
NODE = frozenset({ip_address("10.0.0.1")})

addresses = st.sampled_from(["10.0.0.1", "10.0.0.2", "10.1.0.1", "192.0.2.1"]).map(ip_address)
ports = st.sampled_from([80, 443, 40000])
flows = st.builds(
    Flow,
    src=addresses,
    dst=addresses,
    sport=ports,
    dport=ports,
    proto=st.sampled_from([6, 17]),
    orig_dst=addresses,
    orig_dport=ports,
    mark=st.sampled_from([0, 1, 2, 3, 0x4000]),
    ct_mark=st.sampled_from([0, 1]),
    iif=st.sampled_from(["", "eth0", "veth1"]),
    oif=st.sampled_from(["", "eth0", "veth1"]),
    local_addresses=st.just(NODE),
)
MATCHES = (
    "", "-s 10.0.0.0/24", "! -s 10.0.0.1/32", "-d 10.1.0.0/16", "! -d 192.0.2.0/24", "-p tcp",
    "! -p udp", "-o eth0", "! -o eth0", "-i veth+", "-p tcp -m tcp --dport 80",
    "-m mark --mark 0x1/0x1", "-m mark ! --mark 0x2/0x3", "-m addrtype --dst-type LOCAL",
    "-m addrtype ! --src-type LOCAL", "-m conntrack --ctstate DNAT", "-m connmark --mark 0x1",
    "-m conntrack --ctorigdstport 80",
)  # fmt: skip
TARGETS = (
    "MASQUERADE", "SNAT --to-source 192.0.2.1", "RETURN", "ACCEPT", "MARK --set-xmark 0x1/0x1",
    "MARK --set-xmark 0x3/0x0", "LOG", "A", "B", "C",
)  # fmt: skip
UNDECIDED = ("RETURN", "ACCEPT", "MASQUERADE", "SNAT --to-source 192.0.2.9", "STRANGE")
# A chain leads only to later ones, as the kernel requires.
CHAINS = ("POSTROUTING", "A", "B", "C")


def can_lead(chain, target):
    return target not in CHAINS or CHAINS.index(target) > CHAINS.index(chain)


rules = st.tuples(
    st.sampled_from(CHAINS),
    st.sampled_from(MATCHES),
    st.sampled_from(("-j", "-g")),
    st.sampled_from(TARGETS),
).filter(lambda rule: can_lead(rule[0], rule[3]))


def line(rule):
    chain, match, how, target = rule
    how = how if target in CHAINS else "-j"
    return " ".join(f"-A {chain} {match} {how} {target}".split())


def numbered(lines):
    # Equal lines are one rule to the parser; here each must be distinct.
    return [
        text.replace(" -j", f" -m comment --comment {number} -j", 1).replace(
            " -g", f" -m comment --comment {number} -g", 1
        )
        for number, text in enumerate(lines)
    ]


def ruleset(lines):
    heads = [":POSTROUTING ACCEPT [0:0]", *(f":{chain} - [0:0]" for chain in CHAINS[1:])]
    return Ruleset.of([parse_save("\n".join(["*nat", *heads, *lines, "COMMIT"]), "ipv4")])


FACTS = ("mark", "ct_mark", "iif", "oif", "local_addresses", "orig_dst", "orig_dport")


@given(st.lists(rules, max_size=12), flows, st.sets(st.sampled_from(FACTS)))
@settings(max_examples=400, deadline=None)
def test_less_knowledge_never_misleads(some, flow, unknown):
    """With unknown facts, the rule that matches is still a candidate, and no other is certain."""
    rules_ = ruleset(numbered(line(rule) for rule in some))
    truth = rules_.snat_candidates(flow)
    assert truth.certain is not None or truth.possible == ()
    blurred = rules_.snat_candidates(replace(flow, **dict.fromkeys(unknown)))
    assert blurred.certain in (None, truth.certain)
    assert set(truth.possible) <= set(blurred.possible)
    assert truth.may_pass <= blurred.may_pass


@given(st.lists(rules, max_size=10), flows, st.data())
@settings(max_examples=400, deadline=None)
def test_what_is_not_understood_leaves_nothing_certain(some, flow, data):
    """A rule that is not understood, put where the packet passes, leaves no rule certain."""
    lines = numbered(line(rule) for rule in some)
    before = ruleset(lines).snat_candidates(flow)
    target = data.draw(st.sampled_from(UNDECIDED))
    # At the head of the hook, all packets pass.
    strange = f"-A POSTROUTING -m strange --option x -j {target}"
    after = ruleset([strange, *lines]).snat_candidates(flow)
    assert after.certain is None
    assert set(before.possible) <= set(after.possible)


@given(flows, st.integers(min_value=0), st.sampled_from(UNDECIDED))
@settings(max_examples=100, deadline=None)
def test_what_is_not_understood_before_kube_proxy(flow, place, target):
    """Nor does it in kube-proxy's own chain, at any place before its masquerade."""
    lines = (DATA / "iptables" / "node1.iptables").read_text().splitlines()
    chain = [number for number, text in enumerate(lines) if text.startswith("-A KUBE-POSTROUTING")]
    lines.insert(chain[place % len(chain)], f"-A KUBE-POSTROUTING -m strange -j {target}")
    rules_ = Ruleset.of([parse_save("\n".join(lines), "ipv4")])
    # The mark must not be cleared before, or the packet does not pass the place.
    candidates = rules_.snat_candidates(replace(flow, mark=0x4000))
    assert candidates.certain is None
    assert any(rule.chain == "KUBE-POSTROUTING" for rule in candidates.possible)


@given(st.text())
def test_any_text_is_read_or_refused(text):
    """Whatever the tools print, the parser refuses it or reads it, and does nothing else."""
    for read in (partial(parse_save, family="ipv4"), parse_ruleset):
        with suppress(RulesetError):
            read(text)


WORDS = """
    -A -j -g -m -s -d -p -o ! POSTROUTING KUBE-MARK-MASQ comment --comment tcp --dport 80 mark
    --mark 0x1/0x2 x/y 10.0.0.0/8 10.0.0.0/99 : :53 [ ] [x]:5 SNAT --to-source NETMAP --to
    MARK --set-xmark MASQUERADE DROP "a\\"b" "open conntrack --ctstate NEW NEW,NONE
    CONNMARK --restore-mark addrtype --dst-type LOCAL multiport --dports 1,2: -
"""
words = st.sampled_from(WORDS.split())


@given(st.lists(st.lists(words, max_size=12).map(" ".join), max_size=8), flows)
@settings(max_examples=300)
def test_any_options_are_read(some, flow):
    """Any words in a rule are read, and walking the rules raises nothing."""
    lines = [f"-A POSTROUTING {text}" for text in some]
    for family in ("ipv4", "ipv6"):
        text = "\n".join(["*nat", ":POSTROUTING ACCEPT [0:0]", *lines, "COMMIT"])
        rules_ = Ruleset.of([parse_save(text, family)])
        rules_.snat_candidates(flow)
        rules_.drop_candidates(flow, "postrouting")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["", "x", "@x", "10.0.0.1", "ip"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["op", "left", "right", "meta", "key", "mark", "set", "elem", "val", "concat", "prefix",
             "range", "addr", "len", "payload", "protocol", "field", "data", "target", "&", "|"]
        ),
        inner,
        max_size=3,
    ),
    max_leaves=8,
)  # fmt: skip
statements = st.dictionaries(
    st.sampled_from(
        ["match", "mangle", "vmap", "jump", "goto", "snat", "drop", "masquerade", "xt", "limit",
         "counter", "accept", "return", "reject", "x"]
    ),
    json_values,
    min_size=1,
    max_size=2,
)  # fmt: skip


@given(st.lists(st.lists(statements | json_values, max_size=4), max_size=4), flows)
@settings(max_examples=400)
def test_any_statements_are_read_or_refused(some, flow):
    """Any JSON in a rule is read or refused; what was read can be walked."""
    where = {"family": "ip", "table": "t"}
    base = {"name": "base", "type": "nat", "hook": "postrouting", "prio": 100}
    objects = [
        {"chain": where | base},
        *({"rule": where | {"chain": "base", "expr": expr}} for expr in some),
    ]
    walk_all(json.dumps({"nftables": objects}), flow)


@cache
def recorded():
    return (FILES / "kube-proxy-node2.json").read_text()


@given(st.data(), json_values, flows)
@settings(max_examples=60, deadline=None)
def test_recorded_rules_with_a_part_replaced(data, value, flow):
    """Wherever the output of nft differs from what is expected, it is read or refused."""
    document = json.loads(recorded())
    node, path = document["nftables"], []
    while isinstance(node, dict | list) and node and (not path or data.draw(st.booleans())):
        keys = range(len(node)) if isinstance(node, list) else sorted(node)
        path.append((node, data.draw(st.sampled_from(keys))))
        node = node[path[-1][1]]
    parent, key = path[-1]
    parent[key] = value
    walk_all(json.dumps(document), flow)


def walk_all(text, flow):
    try:
        part = parse_ruleset(text)
    except RulesetError:
        return
    rules_ = Ruleset.of([part])
    rules_.snat_candidates(flow)
    for hook in HOOKS:
        rules_.drop_candidates(flow, hook)
    assert all(str(rule) for rule in rules_.rules)


def test_branches_that_multiply_end():
    """Chains that each lead twice to the next, by matches nobody understands, end the walk."""
    names = [f"C{number}" for number in range(40)]
    lines = [
        f"-A {here} -m strange -j {there}"
        for here, there in zip(["POSTROUTING", *names], names, strict=False)
        for _ in range(2)
    ]
    heads = [":POSTROUTING ACCEPT [0:0]", *(f":{name} - [0:0]" for name in names)]
    text = "\n".join(["*nat", *heads, *lines, "-A C39 -j MASQUERADE", "COMMIT"])
    flow = Flow(
        src=ip_address("10.0.0.1"), dst=ip_address("10.0.0.2"), sport=1, dport=2, proto=6, mark=0
    )
    candidates = Ruleset.of([parse_save(text, "ipv4")]).snat_candidates(flow)
    assert candidates.certain is None
    assert candidates.only.chain == "C39"
    assert "branch too much" in candidates.reason


@pytest.mark.parametrize("name", sorted(path.name for path in FILES.glob("*.iptables")))
def test_saves_are_cut_off_anywhere(name):
    """A truncated save is refused, or ends between two tables."""
    lines = (FILES / name).read_text().splitlines()
    for end in range(len(lines)):
        text = "\n".join(lines[:end])
        if not end or lines[end - 1] == "COMMIT":
            parse_save(text, "ipv4")
        else:
            with pytest.raises(RulesetError, match="truncated"):
                parse_save(text, "ipv4")
