"""What the rule tools printed, kept in a recording and read again."""

import json
import zlib
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.kube_proxy import DATA
from tests.unit import samples, world
from tests.unit.fake_source import FakeSource
from tracer import recording
from tracer.errors import RecordingError
from tracer.recording import MAGIC, Recorder, RecordingSource
from tracer.ruleset import printed
from tracer.ruleset.printed import Output, Printed, pack, unpack
from tracer.views import FixedViews, Place

SAVED = {
    family: (DATA / "iptables" / f"node2.{name}").read_text()
    for family, name in (("ipv4", "iptables"), ("ipv6", "ip6tables"))
}
IPTABLES = Printed(
    outputs=tuple(
        Output(tool="iptables", family=family, where=f"tables of {family}", text=text)
        for family, text in SAVED.items()
    ),
    unread=("nftables: nft is not installed",),
)
NFTABLES = Printed(
    outputs=(
        Output(
            tool="nftables",
            family=None,
            where="nftables",
            text=(world.FILES / "kube-proxy-node2.json").read_text(),
        ),
    )
)
MASQUERADED = world.entry(
    world.CLIENT, world.NODE2, world.NODE_PORT, world.P11, world.NODE2, mark=0x4000
)


def record(path, batches, rules):
    """Record batches; before each the rules are what the next of ``rules`` says."""
    told = iter(rules)
    now = {}

    def packed():
        now.update(next(told, {}))
        return now

    places = {samples.NETNS: Place()}
    recorder = Recorder(path, FakeSource([], samples.INFO), places, packed)
    for batch in batches:
        recorder.write(batch)
    recorder.close()


@pytest.mark.parametrize("rules", [IPTABLES, NFTABLES, Printed()])
def test_round_trip(rules):
    """Packed rules are unpacked unchanged, from a fraction of the bytes, and parse the same."""
    packed = pack(rules)
    assert unpack(packed) == rules
    length = sum(len(output.text) for output in rules.outputs)
    assert len(packed) < length / 8 or not length
    assert unpack(packed).ruleset == rules.ruleset


def test_rules_are_those_that_were_read():
    """Parsed again, they are what the recorded cluster's tests know."""
    assert NFTABLES.ruleset == world.recorded("nftables", "node2")
    assert IPTABLES.ruleset.unread == ("nftables: nft is not installed",)
    assert IPTABLES.ruleset.proxy_mode == "iptables"


def test_a_replay_names_the_rule(tmp_path):
    """A recording with rules is judged as the trace was: the rule is named."""
    path = tmp_path / "night.srcip"
    record(path, [[samples.connection_bytes(MASQUERADED)]], [{samples.NETNS: pack(NFTABLES)}])
    source = RecordingSource(path)
    assert source.read(0)
    views = FixedViews(cluster=world.CLUSTER, places=source.places)
    source.close()
    view = views.at(samples.NETNS, "node2", 0)
    assert view.rules == NFTABLES.ruleset
    assert views.at(samples.NETNS, "node2", 1) is view
    opinion = world.judge(MASQUERADED, view)
    assert opinion.rule == world.judge(MASQUERADED, world.view("node2", "nftables")).rule
    assert opinion.rule is not None


def test_rules_that_change_all_the_time(tmp_path):
    """Rules that change faster than they may be written are written once in a while."""
    path = tmp_path / "night.srcip"
    changes = [{samples.NETNS: pack(IPTABLES)} for _ in range(10)]
    assert len(changes[0][samples.NETNS]) > 1000
    record(path, [[b"x"]] * 9, changes)
    assert path.read_bytes().count(changes[0][samples.NETNS]) < 3


def test_rules_that_change(tmp_path, monkeypatch):
    """Records before a change are judged by the old rules, and those after it by the new ones."""
    monkeypatch.setattr(recording, "_RULES_RATE", float("inf"))
    path = tmp_path / "night.srcip"
    one, two = ([samples.connection_bytes(samples.connection(zone=zone))] for zone in (1, 2))
    first, second = pack(IPTABLES), pack(NFTABLES)
    rules = [{samples.NETNS: first}, {}, {samples.NETNS: second}, {}]
    record(path, [one, two, two], rules)
    source = RecordingSource(path)
    views = FixedViews(places=source.places)
    seen = []
    while (batch := source.read(0)) is not None:
        mode = views.at(samples.NETNS, "node2", 0).rules.proxy_mode
        seen += [(record, mode) for record in batch]
    source.close()
    assert seen == [(*one, "iptables"), (*two, "nftables"), (*two, "nftables")]
    # What does not change is written once.
    assert path.read_bytes().count(first) == path.read_bytes().count(second) == 1


def test_without_rules(tmp_path):
    """A recording that holds none says so."""
    path = tmp_path / "night.srcip"
    record(path, [], [])
    source = RecordingSource(path)
    source.close()
    view = FixedViews(places=source.places).at(samples.NETNS, "node2", 0)
    assert view.rules.unread == ("the recording does not contain the rules",)


def test_too_many_rules_are_left_out(monkeypatch):
    """Rules beyond the limit are not kept, and a line says so."""
    monkeypatch.setattr(printed, "MAX_PRINTED", 1000)
    assert unpack(pack(IPTABLES)) == Printed(
        unread=(*IPTABLES.unread, "0 MiB of rules are too many to record")
    )


def test_output_that_is_none():
    """Output that cannot be parsed is noted as unread, and the rest counts."""
    bad = replace(IPTABLES.outputs[0], text="*nat\nnonsense\n")
    rules = Printed(outputs=(bad, IPTABLES.outputs[1])).ruleset
    (line,) = rules.unread
    assert line.startswith("tables of ipv4: ")
    assert rules.rules


BOMB = zlib.compress(bytes(256 << 20))


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"nonsense",
        zlib.compress(b"nonsense"),
        zlib.compress(b"[]"),
        zlib.compress(b"{}"),
        zlib.compress(b'{"outputs": [], "unread": 1}'),
        zlib.compress(b'{"outputs": [1], "unread": []}'),
        zlib.compress(b'{"outputs": [["awk", null, "", ""]], "unread": []}'),
        zlib.compress(b'{"outputs": [["iptables", "ipx", "", ""]], "unread": []}'),
        zlib.compress(b'{"outputs": [["iptables", ["ipv4"], "", ""]], "unread": []}'),
        zlib.compress(b"[" * 100_000),
        pack(IPTABLES)[:-10],
        BOMB,
    ],
)
def test_hostile_rules(tmp_path, packed):
    """Malformed rules, or rules that expand beyond the limit, are damage: one line, no crash."""
    path = tmp_path / "night.srcip"
    record(path, [[b"x"]], [{samples.NETNS: packed}])
    source = RecordingSource(path)
    with pytest.raises(RecordingError, match=r"damaged after 0 records .* its rules are malformed"):
        source.read(0)
    source.close()


def test_rules_of_a_stranger(tmp_path):
    """Rules of a namespace of which nothing else is known are damage."""
    path = tmp_path / "night.srcip"
    record(path, [], [{1: pack(Printed())}])
    source = RecordingSource(path)
    with pytest.raises(RecordingError, match="they are of the unknown namespace 1"):
        source.read(0)
    source.close()
    assert path.read_bytes().startswith(MAGIC)


@given(st.binary(max_size=300))
def test_any_bytes(packed):
    """Any bytes are rules or a ValueError."""
    for data in (packed, zlib.compress(packed)):
        with suppress(ValueError):
            unpack(data)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
_texts = st.text() | st.sampled_from([*SAVED.values(), NFTABLES.outputs[0].text])


@given(
    st.lists(
        st.lists(_json, max_size=5)
        | st.tuples(
            st.sampled_from(["iptables", "iptables-legacy", "nftables"]),
            st.sampled_from(["ipv4", "ipv6", None]),
            st.text(),
            _texts,
        ),
        max_size=3,
    )
)
def test_any_outputs(outputs):
    """Whatever is in place of the outputs: rules that judge, or a ValueError."""
    packed = zlib.compress(json.dumps({"outputs": outputs, "unread": []}).encode())
    try:
        rules = unpack(packed).ruleset
    except ValueError:
        return
    world.judge(MASQUERADED, world.view("node2", rules=rules))
