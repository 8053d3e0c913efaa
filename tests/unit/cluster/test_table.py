"""The table behind the index: a mapping whose former states stay as they were."""

from hypothesis import given
from hypothesis import strategies as st

from tracer.cluster.table import Table

KEYS = st.integers(0, 5) | st.integers(0, 3).map(lambda number: number * 1021)


@given(st.lists(st.lists(st.tuples(KEYS, st.none() | st.integers()), max_size=5), max_size=8))
def test_every_state_stays(rounds):
    """Each table keeps what it held when it was made, whatever was derived from it since."""
    table, expected = Table(), {}
    states = [(table, dict(expected))]
    for changes in rounds:
        editor = table.edit()
        for key, value in changes:
            editor.set(key, value)
            expected[key] = value
            if value is None:
                del expected[key]
            assert editor.get(key) == value
        table = editor.finish()
        states.append((table, dict(expected)))
    for each, held in states:
        assert dict(each.items()) == held
        assert sorted(each.values()) == sorted(held.values())
        assert len(each) == len(held)
        assert all(each.get(key) == held.get(key) for key in range(6))


def test_no_change_no_copy():
    """An editor that was not used gives the table back."""
    table = Table()
    assert table.edit().finish() is table
    assert table == Table()
