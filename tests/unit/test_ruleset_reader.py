"""Running the node's tools, without root: they are scripts of the test's own."""

import os
from pathlib import Path

import pytest

from tracer.ruleset import nfnetlink, reader, tool
from tracer.ruleset.model import Owner
from tracer.ruleset.reader import Watcher, read
from tracer.ruleset.tool import Limits, run

FILES = Path(__file__).parents[1] / "data" / "rulesets"
LIMITS = Limits(timeout_s=5, output_bytes=1 << 20)
NFT_SAVE = "iptables-nft-save"


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A node with nf_tables and no tools; the test installs those that it needs."""
    return Node(tmp_path, monkeypatch)


class Node:
    def __init__(self, root, monkeypatch):
        self.bin, self.net = root / "bin", root / "net"
        self.bin.mkdir()
        self.net.mkdir()
        self.tables = frozenset()
        self.generation = 1
        monkeypatch.setitem(tool._ENVIRONMENT, "PATH", str(self.bin))
        monkeypatch.setattr(reader, "_OWN_NET", self.net)
        monkeypatch.setattr(reader, "has_nf_tables", lambda: True)
        monkeypatch.setattr(reader, "Nftables", lambda: Netlink(self))

    def install(self, name, script):
        path = self.bin / name
        path.write_text(f"#!/bin/sh\nPATH={os.environ['PATH']}\n{script}\n")
        path.chmod(0o755)

    def prints(self, name, file):
        self.install(name, f"cat {FILES / file}")


class Netlink:
    """Answers as the kernel would."""

    def __init__(self, node):
        self.node = node

    def tables(self):
        if isinstance(self.node.tables, OSError):
            raise self.node.tables
        return self.node.tables

    def generation(self):
        if isinstance(self.node.generation, OSError):
            raise self.node.generation
        return self.node.generation

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_all_tools(node):
    """The outputs of the tools are combined."""
    node.prints("nft", "kube-proxy-node1.json")
    node.prints(NFT_SAVE, "flannel.iptables")
    node.install("ip6tables-nft-save", "true")
    rules = read()
    assert rules.owners == {Owner.KUBE_PROXY, Owner.FLANNEL}
    assert rules.unread == ()


def test_plain_name_of_the_tool(node):
    """Without iptables-nft-save, iptables-save is asked for its variant."""
    node.prints("nft", "masquerade-node1.json")
    node.install(
        "iptables-save",
        f'[ "$1" = -V ] && echo "iptables-save v1.8.9 (nf_tables)" || cat {FILES}/flannel.iptables',
    )
    assert read().owners == {Owner.FLANNEL}
    node.install("iptables-save", f"cat {FILES}/flannel.iptables")
    assert read().owners == set()


def test_legacy_is_read_only_where_it_has_tables(node):
    """The tool for legacy tables runs only if the kernel has some: it could create them."""
    node.prints("nft", "masquerade-node1.json")
    node.install("iptables-legacy-save", f"touch {node.net}/ran; cat {FILES}/docker.iptables")
    assert read().owners == set()
    (node.net / "ip_tables_names").write_text("")
    assert read().owners == set()
    assert not (node.net / "ran").exists()
    (node.net / "ip_tables_names").write_text("nat\nfilter\n")
    rules = read()
    assert rules.owners == {Owner.DOCKER}
    assert {rule.tool for rule in rules.rules} == {"nftables", "iptables-legacy"}


def test_legacy_tables_without_their_tool(node):
    """Tables that no tool here can read are noted."""
    node.prints("nft", "masquerade-node1.json")
    (node.net / "ip6_tables_names").write_text("nat\n")
    assert read().unread == ("legacy tables nat (ipv6): ip6tables-save is not installed",)


@pytest.mark.parametrize(
    ("tables", "unread"),
    [
        (set(), ()),
        ({("ip", "nat"), ("ip", "filter")}, ()),
        (
            {("ip", "nat"), ("inet", "lab-masq")},
            ("table inet lab-masq: nft is not installed",),
        ),
        (OSError(1, "no"), ("nftables: nft is not installed",)),
    ],
)
def test_without_nft(node, tables, unread):
    """Without nft, tables that iptables-save does not print are noted, if there are any."""
    node.tables = tables
    node.prints(NFT_SAVE, "flannel.iptables")
    assert read().unread == unread


def test_without_any_tool(node):
    """A node without tools is no error; what is unread is noted."""
    node.tables = {("ip", "nat")}
    rules = read()
    assert rules.rules == ()
    assert rules.unread == ("table ip nat: nft is not installed",)


def test_without_nf_tables(node, monkeypatch):
    """If the kernel has no nf_tables, its tools are not run: they would load it."""
    monkeypatch.setattr(reader, "has_nf_tables", lambda: False)
    node.install("nft", f"touch {node.net}/ran")
    node.install(NFT_SAVE, f"touch {node.net}/ran")
    assert read().unread == ()
    assert not (node.net / "ran").exists()


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        (
            "echo 'Operation not permitted (you must be root)' >&2; echo more >&2; exit 1",
            "nftables: nft -j list ruleset failed (1): Operation not permitted (you must be root)",
        ),
        ("exec sleep 60", "nftables: nft -j list ruleset took longer than 2 s"),
        ("exec yes", "nftables: nft -j list ruleset printed more than 1 MiB"),
        ("exec yes >&2", "nftables: nft -j list ruleset printed more than 1 MiB"),
        ("exec >&- 2>&-; exec sleep 60", "nftables: nft -j list ruleset took longer than 2 s"),
        (
            "echo '{'",
            "nftables: the output of nft -j list ruleset cannot be parsed: JSONDecodeError: "
            "Expecting property name enclosed in double quotes: line 2 column 1 (char 2)",
        ),
    ],
)
def test_tools_that_fail(node, script, complaint):
    """A tool that fails, hangs, floods or babbles leaves a line, and the others are still read."""
    node.install("nft", script)
    node.prints(NFT_SAVE, "flannel.iptables")
    rules = read(limits=Limits(timeout_s=2, output_bytes=1 << 20))
    assert rules.unread == (complaint,)
    assert rules.owners == {Owner.FLANNEL}


def test_iptables_save_fails(node):
    """It fails on some of nft's own rules in its tables. nft prints all of them."""
    node.install(NFT_SAVE, "echo 'Parsing nftables rule failed' >&2; exit 1")
    node.prints("nft", "masquerade-node1.json")
    assert read().unread == ()
    node.install("nft", "exit 1")
    assert [line.split(":")[0] for line in read().unread] == ["tables of iptables", "nftables"]


def test_incomplete_tables_without_nft(node):
    """Tables of which iptables-save leaves out a part are noted, too."""
    node.tables = {("ip", "nat")}
    node.install(
        NFT_SAVE,
        f"""echo "# Table \\`nat' contains incompatible base-chains, use 'nft' tool to list them."
        cat {FILES}/flannel.iptables""",
    )
    assert read().unread == ("table ip nat: nft is not installed",)


def test_clean_environment(node, monkeypatch):
    """Tools get none of our variables and no input, and no shell sees their arguments."""
    monkeypatch.setenv("SECRET", "1")
    node.install("show", 'env | cut -d= -f1 | sort | tr "\\n" " "; cat; echo; echo "$1"; pwd')
    output = run(("show", "; $HOME"), LIMITS)
    assert "SECRET" not in output.text
    assert "LC_ALL" in output.text
    assert output.text.splitlines()[-2:] == ["; $HOME", "/"]


def test_tool_that_cannot_be_run(node):
    """For a file that is not a program, the kernel's reason is shown."""
    (node.bin / "nft").write_text("no program")
    assert run(("nft",), LIMITS).problem == "nft cannot be run: Permission denied"


def test_watcher_reads_only_what_has_changed(node):
    """The rules are read again when the kernel counted a change, and not before."""
    node.install("nft", f"echo >> {node.net}/runs; cat {FILES}/masquerade-node1.json")
    with Watcher() as watcher:
        assert watcher.has_changed()
        first = watcher.ruleset()
        assert not watcher.has_changed()
        assert watcher.ruleset() is first
        node.generation += 1
        assert watcher.has_changed()
        assert watcher.ruleset() is not first
        assert not watcher.has_changed()
    assert (node.net / "runs").read_text().count("\n") == 2


@pytest.mark.parametrize("blind", ["legacy", "not permitted"])
def test_watcher_reads_at_intervals_what_is_not_counted(node, blind):
    """Legacy tables have no count, nor is there one without privileges: time decides."""
    node.prints("nft", "masquerade-node1.json")
    if blind == "legacy":
        (node.net / "ip_tables_names").write_text("nat\n")
    else:
        node.generation = OSError(1, "no")
    with Watcher(legacy_interval_s=3600) as patient, Watcher(legacy_interval_s=0) as eager:
        patient.ruleset()
        eager.ruleset()
        assert not patient.has_changed()
        assert eager.has_changed()
        assert eager.has_changed()


def test_watcher_notices_the_first_legacy_table(node):
    """Legacy tables that come later are found, at the interval."""
    node.prints("nft", "masquerade-node1.json")
    with Watcher(legacy_interval_s=0) as watcher:
        watcher.ruleset()
        assert not watcher.has_changed()
        (node.net / "ip_tables_names").write_text("nat\n")
        assert watcher.has_changed()


def test_symbols_tell_of_a_built_in_nf_tables(tmp_path, monkeypatch):
    """nf_tables built into the kernel may show only among its symbols."""
    monkeypatch.setattr(nfnetlink, "_MODULE", tmp_path / "none")
    symbols = tmp_path / "kallsyms"
    monkeypatch.setattr(nfnetlink, "_SYMBOLS", symbols)
    for text, expected in (("0 t other\n", False), ("0 t nft_do_chain\n", True)):
        symbols.write_text(text)
        nfnetlink._is_built_in.cache_clear()
        assert nfnetlink.has_nf_tables() is expected
    nfnetlink._is_built_in.cache_clear()
