"""A tracer in the test's own process, with what it has seen so far."""

import os
from collections import Counter

from tests.kernel import compiled
from tests.kernel.box import wait_until
from tracer.decode import decode
from tracer.kernel import ladder
from tracer.kernel.ladder import Rung
from tracer.kernel.source import Settings
from tracer.model import Accept, Connection, Drop, Hop
from tracer.proxy_headers import Declared

# The way to look in these tests, if not the first that the kernel offers.
RUNG = os.environ.get("SRCIP_TEST_RUNG")


def open_source(namespaces, settings=None):
    """Look at the kernel in the way that the tests are run for."""
    with compiled.loading():
        return ladder.open_programs(
            namespaces, settings or Settings(), Rung(RUNG) if RUNG else None
        )


class Trace:
    """Reads the kernel and keeps everything."""

    def __init__(self, box, **settings):
        self.source = open_source([box.target()], Settings(**settings))
        self.records = []

    def read(self, timeout_s=0):
        """Take what is there."""
        self.records += map(decode, self.source.read(timeout_s) or [])

    @property
    def connections(self):
        return [record for record in self.records if isinstance(record, Connection)]

    @property
    def drops(self):
        return [record for record in self.records if isinstance(record, Drop)]

    @property
    def accepts(self):
        return [record for record in self.records if isinstance(record, Accept)]

    @property
    def declared(self):
        return [record for record in self.records if isinstance(record, Declared)]

    @property
    def hops(self):
        return [record for record in self.records if isinstance(record, Hop)]

    def wait_for(self, condition):
        """Read until a condition on this trace holds."""

        def check():
            self.read(0.05)
            return condition(self)

        return wait_until(check)

    def flush(self):
        """
        Read until nothing more is under way.

        Programs run before the packet is sent on: once the test has seen a packet's effect, its
        record is in the ring, and one read of the ring returns it.
        """
        self.read()

    def lost(self):
        """What could not be told, but for accepts: those of the whole machine are heard."""
        programs = self.source.lost_by_program()
        del programs["accepts"]
        totals = Counter(self.source._declared.lost() if "segments" in programs else ())
        for lost in programs.values():
            totals.update(lost)
        return totals

    def lost_accepts(self):
        """How many accepts could not be told, others' among them."""
        return self.source.lost_by_program()["accepts"]["ring_full"]

    def close(self):
        self.source.close()
