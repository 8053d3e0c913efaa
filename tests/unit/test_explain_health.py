"""What 'srcip explain --probe-health' says of a node's answer."""

import pytest

from tracer.commands.explain import _health_line
from tracer.kernel.health import Health


@pytest.mark.parametrize(
    ("health", "is_expected", "line"),
    [
        (Health(node="n", status=200), True, "  n: 200; as the objects say"),
        (Health(node="n", status=503), False, "  n: 503; as the objects say"),
        (Health(node="n", status=503), True, "  n: 503; the objects say 200"),
        (Health(node="n", error="timed out"), True, "  n: timed out; the objects say 200"),
        (
            Health(node="n", status=404),
            True,
            "  n: 404 is not an answer of kube-proxy: something else listens there; "
            "the objects say 200",
        ),
    ],
)
def test_line(health, is_expected, line):
    """kube-proxy answers 200 or 503; any other status comes from another program."""
    assert _health_line(health, is_expected=is_expected, is_json=False) == line
