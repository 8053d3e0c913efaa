"""Which way of observing the kernel is chosen, and the message if there is none."""

import os

import pytest

from tracer.errors import LoadError
from tracer.kernel import kprobe, ladder, probing
from tracer.kernel.attach import Links
from tracer.kernel.ladder import Rung
from tracer.kernel.probing import Probes
from tracer.kernel.programs import DROPS, PROBED_CONNECTIONS

NOT_HERE = r"^kernel \S+ has no BPF netfilter links \(Linux 6\.4\)"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A kernel without netfilter links; its files say what probes there are."""
    monkeypatch.setattr(ladder, "has_netfilter_links", lambda: False)
    monkeypatch.setattr(kprobe, "_PMU_TYPE", tmp_path / "type")
    monkeypatch.setattr(kprobe, "_SWITCHES", (tmp_path / "enabled", tmp_path / "none"))
    monkeypatch.setattr(probing, "_MODULES", tmp_path)
    return tmp_path


def test_neither(machine):
    """Where there are neither links nor probes, one line names both."""
    with pytest.raises(LoadError, match=NOT_HERE + r", and this kernel \(\S+\) has no kprobes$"):
        ladder.require_programs(None)


def test_probes_in_place_of_links(machine):
    """Probes are enough, unless links were asked for."""
    (machine / "type").write_text("6\n")
    ladder.require_programs(None)
    ladder.require_programs(Rung.PROBES)
    with pytest.raises(LoadError, match=NOT_HERE + "$"):
        ladder.require_programs(Rung.LINKS)


def test_switched_off(machine):
    """Probes that an administrator has disabled do not count; enabled ones need no message."""
    (machine / "type").write_text("6\n")
    (machine / "enabled").write_text("1\n")
    ladder.require_programs(Rung.PROBES)
    (machine / "enabled").write_text("0\n")
    with pytest.raises(LoadError, match=r"^probes are switched off: \S+/enabled is 0$"):
        ladder.require_programs(Rung.PROBES)


def test_probe_that_is_refused(monkeypatch):
    """The message names the function, also if the kernel makes the probe but runs no program."""
    monkeypatch.setattr(kprobe, "_open", lambda function: os.open(os.devnull, os.O_RDONLY))
    why = r"^cannot probe nf_some_function: Inappropriate ioctl for device$"
    with pytest.raises(LoadError, match=why):
        Links().attach_probe("nf_some_function", 0)


def probes_of(machine):
    names = ("nf_conntrack", "nft_chain_nat", "iptable_nat")
    return Probes(
        connections=PROBED_CONNECTIONS,
        drops=DROPS,
        nat=(),
        modules={name: probing._module(name) for name in names},
    )


def test_nat_that_comes_later(machine):
    """NAT that is loaded, or loaded again, after the start is reported; unloading is not."""
    for name in ("nf_conntrack", "nft_chain_nat"):
        (machine / name).mkdir()
    probes = probes_of(machine)
    assert probes.unseen() is None
    (machine / "nft_chain_nat").rmdir()
    assert probes.unseen() is None
    (machine / "iptable_nat").mkdir()
    assert probes.unseen() == (
        "marks where iptable_nat replaces sources: loaded after srcip, which must be restarted"
    )


def test_conntrack_that_went_away(machine):
    """Without the probed module nothing is seen any more: that is an error."""
    (machine / "nf_conntrack").mkdir()
    probes = probes_of(machine)
    (machine / "nf_conntrack").rmdir()
    with pytest.raises(LoadError, match=r"^the module nf_conntrack was unloaded"):
        probes.unseen()


def test_conntrack_that_is_built_in(machine):
    """A name that is not a module does not go away."""
    assert probes_of(machine).unseen() is None
