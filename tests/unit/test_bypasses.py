"""Flowtables by what nft prints: the kernels at hand for the kernel tests may have none."""

import pytest

from tracer.kernel.bypasses import flowtables

PRINTED = """{"nftables": [{"metainfo": {"version": "1.0.6", "json_schema_version": 1}},
 {"flowtable": {"family": "inet", "name": "fast", "table": "t", "handle": 2, "hook": "ingress",
  "prio": 0, "dev": ["n0", "n1"]}}]}"""


def test_flowtables():
    """A flowtable is named with its table."""
    assert list(flowtables(PRINTED)) == [
        "flowtable inet t fast forwards established connections past netfilter's hooks"
    ]


@pytest.mark.parametrize("printed", ["", '{"nftables": []}'])
def test_none(printed):
    """Without flowtables, or without nft, there is nothing to say."""
    assert list(flowtables(printed)) == []


@pytest.mark.parametrize("printed", ["x", "[]", '{"nftables": [{"flowtable": 1}]}', "{}"])
def test_nonsense(printed):
    """An answer that makes no sense is said to make none."""
    assert list(flowtables(printed)) == ["perhaps flowtables: nft's list of them cannot be parsed"]
