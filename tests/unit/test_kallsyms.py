"""Names of kernel functions by address, from a file like /proc/kallsyms."""

from contextlib import closing

import pytest

from tracer.errors import LoadError
from tracer.kernel.kallsyms import KALLSYMS, Kallsyms

# The core kernel is sorted; modules and BPF programs follow in any order.
TEXT = """\
ffffffff81000000 T _stext
ffffffff81001000 t nf_hook_slow
ffffffff81002000 D not_a_function
ffffffff81003000 W ip_local_deliver
ffffffff82000000 B __bss_start
ffffffffc0400000 t nf_nat_packet\t[nf_nat]
ffffffffc0200000 t nft_do_chain\t[nf_tables]
ffffffffc0100000 t bpf_prog_6deef7357e7b4530\t[bpf]
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "kallsyms"
    path.write_text(TEXT)
    return path


@pytest.fixture
def kallsyms(path):
    kallsyms = Kallsyms(path)
    yield kallsyms
    kallsyms.close()


@pytest.mark.parametrize(
    ("address", "name"),
    [
        pytest.param(0xFFFF_FFFF_8100_1000, "nf_hook_slow", id="first-byte"),
        pytest.param(0xFFFF_FFFF_8100_1234, "nf_hook_slow", id="inside"),
        pytest.param(0xFFFF_FFFF_8100_0FFF, "_stext", id="last-byte-of-the-one-before"),
        pytest.param(0xFFFF_FFFF_8100_2010, "nf_hook_slow", id="data-is-no-function"),
        pytest.param(0xFFFF_FFFF_8100_3000, "ip_local_deliver", id="weak"),
        pytest.param(0xFFFF_FFFF_C020_0010, "nft_do_chain", id="module"),
        pytest.param(0xFFFF_FFFF_C040_0010, "nf_nat_packet", id="modules-in-any-order"),
        pytest.param(0xFFFF_FFFF_80FF_FFFF, None, id="before-the-first"),
        pytest.param(1, None, id="no-kernel-address"),
    ],
)
def test_function(kallsyms, address, name):
    """An address belongs to the last function that begins at or before it."""
    assert kallsyms.function(address) == name


def test_read_once(kallsyms, path):
    """A name that was looked up stays known, even after the file is closed."""
    assert kallsyms.function(0xFFFF_FFFF_8100_1000) == "nf_hook_slow"
    kallsyms.close()
    assert kallsyms.function(0xFFFF_FFFF_8100_1000) == "nf_hook_slow"
    assert kallsyms.function(0xFFFF_FFFF_8100_3000) is None


def test_hidden_addresses(path):
    """If the kernel hides addresses (kptr_restrict), nothing has a name, not a wrong one."""
    path.write_text("0000000000000000 T _stext\n0000000000000000 T _etext\n")
    kallsyms = Kallsyms(path)
    assert kallsyms.function(0xFFFF_FFFF_8100_1000) is None
    kallsyms.close()


def test_closed_twice(kallsyms):
    """Closing twice does nothing more."""
    kallsyms.close()
    kallsyms.close()


def test_missing(tmp_path):
    """A kernel without the file is one line with its path."""
    with pytest.raises(LoadError, match=r"cannot read .*/none: No such file or directory"):
        Kallsyms(tmp_path / "none")


@pytest.mark.skipif(not KALLSYMS.exists(), reason=f"no {KALLSYMS}")
def test_of_this_kernel():
    """The running kernel's own file can be read to its end by anyone."""
    kallsyms = Kallsyms()
    kallsyms.function(0xFFFF_FFFF_FFFF_FFFF)
    kallsyms.close()


def test_addresses(kallsyms):
    """Functions are found by name, also in modules; other symbols and missing ones are left out."""
    assert kallsyms.addresses({"nf_hook_slow", "nft_do_chain", "not_a_function", "gone"}) == {
        "nf_hook_slow": 0xFFFF_FFFF_8100_1000,
        "nft_do_chain": 0xFFFF_FFFF_C020_0000,
    }


def test_span(kallsyms):
    """A function of the core kernel ends where the next symbol begins."""
    assert kallsyms.span("nf_hook_slow") == (0xFFFF_FFFF_8100_1000, 0xFFFF_FFFF_8100_2000)
    assert kallsyms.span("gone") == (0, 0)


def test_no_address_of_hidden_functions(tmp_path):
    """Where the kernel hides addresses, functions are known to be there, and nothing more."""
    path = tmp_path / "kallsyms"
    path.write_text("0000000000000000 T nf_hook_slow\n0000000000000000 T ip_rcv\n")
    with closing(Kallsyms(path)) as kallsyms:
        assert kallsyms.addresses({"nf_hook_slow"}) == {"nf_hook_slow": 0}
        assert kallsyms.span("nf_hook_slow") == (0, 0)
