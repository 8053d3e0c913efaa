"""The interfaces of a namespace, against what ip made of them."""

from contextlib import closing
from ipaddress import ip_address

import pytest

from tests.kernel import box as boxes
from tests.kernel.box import CLIENT, NODE, NODE_INSIDE, wait_until
from tracer.kernel.interfaces import InterfaceWatcher

pytestmark = pytest.mark.usefixtures("kernel")
SERVICES = {"10.0.170.92", "2001:db8:96::5c"}


def test_addresses_of_services():
    """What kube-proxy in IPVS mode binds to its device is the node's, and told apart."""
    with boxes.built() as box, closing(InterfaceWatcher(box.target())) as watcher:
        before = watcher.snapshot()
        usual = {ip_address(one) for one in (*NODE.values(), *NODE_INSIDE.values())}
        assert usual <= before.addresses
        assert ip_address(CLIENT[4]) not in before.addresses
        assert before.service_addresses == frozenset()
        # A bridge does for the dummy that it is, which not every kernel has.
        box.run("node", "ip", "link", "add", "kube-ipvs0", "type", "bridge")
        for service in SERVICES:
            box.run("node", "ip", "address", "add", service, "dev", "kube-ipvs0")
        services = set(map(ip_address, SERVICES))
        wait_until(lambda: watcher.snapshot().service_addresses == services)
        assert watcher.snapshot().addresses >= usual | services
