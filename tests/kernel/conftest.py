import pytest

from tests.kernel import box as boxes
from tests.kernel.trace import Trace


@pytest.fixture
def box(kernel):
    """A client, a node and a server, without rules."""
    with boxes.built() as built:
        yield built


@pytest.fixture
def trace(box):
    """A tracer on the box's node, closed afterwards."""
    tracers = []

    def start(**settings):
        tracers.append(Trace(box, **settings))
        return tracers[-1]

    yield start
    for tracer in tracers:
        tracer.close()
