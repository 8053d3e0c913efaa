import pytest

from lab import topology


@pytest.fixture(scope="module")
def lab(kernel):
    """Build one lab for all tests of a module. Each loads the rules that it needs."""
    with topology.build() as lab:
        yield lab
