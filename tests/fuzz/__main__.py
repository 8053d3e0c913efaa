"""
A million damaged headers through everything that reads them: ``make fuzz``.

Each input is a header of a real shape, damaged at a few places, cut, spliced with another, or put
together from pieces that mean something. It must not raise, must be decided when all of it is
there, and only addresses and short tokens may come out.
"""

import argparse
import random
import sys
import time
from collections import Counter
from ipaddress import ip_address

from tests.unit.declared.test_proxy_protocol import INET, INET6, LONGEST, TLV, WHOLE, v2
from tests.unit.declared.test_request import get
from tracer.declared.opening import read_opening
from tracer.declared.stream import Stream
from tracer.decode import decode
from tracer.encode import encode_declared
from tracer.model import FiveTuple
from tracer.proxy_headers import CLIENT_TOKEN, ClientForm, Declared

SEEDS = [
    *WHOLE,
    LONGEST,
    v2(body=INET + TLV * 3),
    v2(family=2, body=INET6 + TLV),
    v2(command=0),
    get("X-Forwarded-For: 198.51.100.7, 10.0.0.1, [2001:db8::1]:80, unknown"),
    get('Forwarded: for="[2001:db8:cafe::17]:4711";proto=https;by=_x, for=192.0.2.1, for=_hidden'),
    get("X-Forwarded-For: 1.1.1.1", "\t, 2.2.2.2", 'Forwarded: for="a\\"b,c;d=e";host=x'),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]
PIECES = [
    b"PROXY ", b"TCP4 ", b"TCP6 ", b"UNKNOWN", b"\r\n", b"\n", b"\r\n\r\n", b"GET / HTTP/1.1\r\n",
    b"X-Forwarded-For: ", b"Forwarded: ", b"for=", b'"', b"\\", b",", b";", b"=", b"[", b"]", b":",
    b"1.2.3.4", b"::1", b"::ffff:1.2.3.4", b"65535", b"65536", b"99999999999", b"unknown", b"_a",
    b"\x1b[31m", b"\x9b", b"<script>", b"\xe2\x80\xae", b"%eth0", b"\0", b"\t", b" ", WHOLE[2][:12],
]  # fmt: skip
FLOW = FiveTuple(
    src=ip_address("192.0.2.1"), dst=ip_address("192.0.2.2"), sport=1, dport=2, proto=6
)


def damaged(chance):
    """Return one input."""
    if chance.random() < 0.2:
        return b"".join(chance.choices(PIECES, k=chance.randrange(1, 40)))
    data = bytearray(chance.choice(SEEDS))
    if chance.random() < 0.3:
        data += chance.choice(SEEDS)
    for _ in range(chance.randrange(5)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del data[at : at + chance.randrange(1, 9)]
            case 2:
                data[at:at] = chance.choice(PIECES)
            case 3:
                data[at:at] = data[at : at + chance.randrange(60)] * chance.randrange(1, 9)
            case 4:
                del data[at:]
    return bytes(data)


def check(data, chance):
    """Read one input whole and in segments, and look at what comes out."""
    found = read_opening(data, is_all=True)
    assert found is not None
    early = read_opening(data, is_all=False)
    assert early in (None, found)
    for client in found.clients:
        assert (client.address is not None) == (client.form is ClientForm.ADDRESS)
        assert client.token is None or CLIENT_TOKEN.fullmatch(client.token)
        text = str(client)
        assert text.isascii()
        assert text.isprintable()
        assert not set(text) & set("<>&\"'\\%")
    declared = Declared(
        ktime_ns=1, netns=2, flow=FLOW, opening=found.opening, clients=found.clients
    )
    assert decode(encode_declared(declared)) == declared
    cut = chance.randrange(len(data) + 1)
    stream = Stream()
    stream.add(cut, data[cut:], is_end=True)
    stream.add(0, data[:cut])
    assert stream.data == data
    return found


def main():
    """Run, and say how many there were of each outcome."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    outcomes, began = Counter(), time.monotonic()
    for number in range(arguments.count):
        data = damaged(chance)
        try:
            found = check(data, chance)
        except Exception:
            print(f"input {number} of seed {arguments.seed}: {data!r}", file=sys.stderr)
            raise
        outcomes[found.opening.name] += 1
        outcomes["with clients"] += bool(found.clients)
    told = ", ".join(f"{count:,} {name.lower()}" for name, count in sorted(outcomes.items()))
    print(f"{arguments.count:,} inputs in {time.monotonic() - began:.0f} s: {told}")


if __name__ == "__main__":
    main()
