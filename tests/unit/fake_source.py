"""A source of records that a test has."""


class FakeSource:
    """Records from memory, with what was lost and what the kernel's functions are called."""

    def __init__(self, batches, info, *, lost=None, symbols=None):
        self.info = info
        self._batches = list(batches)
        self._lost = dict(lost or {})
        self._symbols = dict(symbols or {})

    def read(self, timeout_s):
        return self._batches.pop(0) if self._batches else None

    def lost(self):
        return self._lost

    def symbol(self, address):
        return self._symbols.get(address)

    def close(self):
        pass
