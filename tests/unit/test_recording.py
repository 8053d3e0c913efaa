"""A recording gives back what was recorded, and a damaged one says where."""

import json
import os
import struct
import sys
import threading
from dataclasses import replace
from ipaddress import ip_address, ip_network
from itertools import chain

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.unit import samples
from tests.unit.fake_source import FakeSource
from tracer.decode import decode
from tracer.errors import DecodeError, RecordingError
from tracer.recording import MAGIC, Recorder, RecordingSource
from tracer.ruleset.model import Flow
from tracer.views import FixedViews

INFO, RECORD, SYMBOL, LOST, END = 1, 2, 3, 4, 5
HEADER = {
    "wire_version": 1,
    "byte_order": sys.byteorder,
    "clock_offset_ns": 5,
    "nodes": {"4026532001": "node2"},
    "drop_reasons": {"8": "NETFILTER_DROP"},
    "rung": "a test",
    "not_seen": [],
    "places": {},
}
PLACE = {
    "addresses": ["10.240.0.5", "2001:db8:240::12"],
    "interfaces": {"2": "eth0"},
    "proxy_mode": "nftables",
    "masquerade_mark": 0x8000,
    "has_masquerade_all": False,
    "cluster_cidrs": ["10.244.0.0/16"],
}
DROPPED = samples.drop(location=0xFFFF_FFFF_8100_0010, dst_input=0xFFFF_FFFF_8200_0010)
RECORDS = [
    samples.connection_bytes(samples.connection()),
    samples.drop_bytes(DROPPED),
    samples.accept_bytes(samples.accept()),
    samples.connection_bytes(samples.connection(*samples.REPLACED6)),
]
SYMBOLS = {0xFFFF_FFFF_8100_0010: "nf_hook_slow", 0xFFFF_FFFF_8200_0010: "ip_local_deliver"}
# The fixture's path differs from example to example only in what is in it.
same_path = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def frame(kind, payload):
    """Write a frame by its description: type, length in little endian, content."""
    if not isinstance(payload, bytes):
        payload = json.dumps(payload).encode()
    return struct.pack("<BI", kind, len(payload)) + payload


def recording(*frames, header=None):
    return MAGIC + frame(INFO, HEADER if header is None else header) + b"".join(frames)


def record(path, batches, **fake):
    recorder = Recorder(path, FakeSource([], samples.INFO, **fake))
    for batch in batches:
        recorder.write(batch)
    recorder.close()


def read_all(source):
    """Read to the end; return the records and what ended it, None for the end mark."""
    records = []
    try:
        while (batch := source.read(0)) is not None:
            records += batch
    except RecordingError as error:
        return records, error
    finally:
        source.close()
    return records, None


def read_bytes(path, data):
    """Read a file of these bytes to where it ends or breaks."""
    path.write_bytes(data)
    try:
        source = RecordingSource(path)
    except RecordingError as error:
        return [], error
    return read_all(source)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "night.srcip"


@pytest.fixture
def whole(path):
    """Bytes of a good recording of four records."""
    record(path, [RECORDS[:2], RECORDS[2:]], lost={"ring_full": 3}, symbols=SYMBOLS)
    return path.read_bytes()


def test_round_trip(path, whole):
    """Records come back byte for byte, with clock, nodes, reasons, symbols and losses."""
    source = RecordingSource(path)
    records, error = read_all(source)
    assert (records, error) == (RECORDS, None)
    assert source.info == samples.INFO
    assert source.lost() == {"ring_full": 3}
    assert {address: source.symbol(address) for address in SYMBOLS} == SYMBOLS
    assert source.symbol(1) is None


@pytest.mark.parametrize("is_told", [True, False])
def test_proxy_headers(path, is_told):
    """A recording says whether proxies' headers were read, so that a replay waits for them."""
    info = replace(samples.INFO, has_proxy_headers=is_told)
    Recorder(path, FakeSource([], info)).close()
    source = RecordingSource(path)
    assert source.info == info
    source.close()


def test_places(path):
    """What is known of a node comes back, and makes the view that its connections need."""
    path.write_bytes(recording(frame(END, {}), header=HEADER | {"places": {"7": PLACE}}))
    source = RecordingSource(path)
    (place,) = source.places.values()
    source.close()
    recorder = Recorder(path, FakeSource([], samples.INFO), {7: place})
    recorder.close()
    again = RecordingSource(path)
    again.close()
    assert again.places == {7: place}
    view = FixedViews(places=again.places).at(7, "node2", 0)
    assert view.addresses == {ip_address("10.240.0.5"), ip_address("2001:db8:240::12")}
    assert (view.mode, view.masquerade_mark, view.interfaces) == ("nftables", 0x8000, {2: "eth0"})
    assert view.rules.cluster_cidrs == (ip_network("10.244.0.0/16"),)
    assert view.rules.snat_candidates(Flow.of(samples.connection())).certain is None


def test_format(path):
    """The file is what its description says: magic, then frames, the last one an END."""
    record(path, [[b"abc"]], lost={"ring_full": 1})
    rest = path.read_bytes().removeprefix(MAGIC)
    kinds, payloads = [], []
    while rest:
        kind, length = struct.unpack_from("<BI", rest)
        kinds.append(kind)
        payloads.append(rest[5 : 5 + length])
        rest = rest[5 + length :]
    assert kinds == [INFO, RECORD, LOST, END]
    assert json.loads(payloads[0])["nodes"] == {"4026532001": "node2"}
    assert payloads[1] == b"abc"
    assert json.loads(payloads[2]) == {"ring_full": 1}


def test_symbols_once(path):
    """Each function is named once, and before the first record that mentions it."""
    record(path, [[RECORDS[1]], [RECORDS[1]]], symbols=SYMBOLS)
    data = path.read_bytes()
    assert data.count(b"nf_hook_slow") == 1
    assert data.index(b"nf_hook_slow") < data.index(RECORDS[1])


def test_unknown_symbol(path):
    """A function that the kernel did not name has no name in a replay either."""
    record(path, [[RECORDS[1]]])
    source = RecordingSource(path)
    assert read_all(source) == ([RECORDS[1]], None)
    assert source.symbol(DROPPED.location) is None


def test_empty_run(path):
    """A run that saw nothing is a recording without records, not an error."""
    record(path, [])
    assert read_all(RecordingSource(path)) == ([], None)


def test_many_records(path):
    """Records beyond one batch of the reader keep their order."""
    many = [struct.pack("=I", n) for n in range(5000)]
    record(path, [many[:7], many[7:]])
    assert read_all(RecordingSource(path)) == (many, None)


@given(st.lists(st.lists(st.binary(max_size=200))))
@same_path
def test_any_records(path, batches):
    """Whatever bytes a source delivered come back, decodable or not: judging them comes later."""
    record(path, batches)
    assert read_all(RecordingSource(path)) == (list(chain.from_iterable(batches)), None)


def test_a_kind_byte_alone_makes_no_drop(path):
    """A cut-off drop is recorded as it came, without looking for addresses in it."""
    cut = samples.drop_bytes(DROPPED)[:60]
    record(path, [[cut]])
    assert read_all(RecordingSource(path)) == ([cut], None)


def test_truncated_anywhere(path, whole):
    """Records before the cut come out; then one line names the file, the count and the byte."""
    ends = [whole.index(each) + len(each) for each in RECORDS]
    for cut in range(len(whole)):
        records, error = read_bytes(path, whole[:cut])
        assert records == RECORDS[: sum(end <= cut for end in ends)]
        assert error is not None, f"cut at {cut}"
        assert str(path) in str(error)
        assert "\n" not in str(error)
        if cut > len(MAGIC):
            assert f"is cut off after {len(records)} records (byte " in str(error)


def test_truncated_place(path):
    """The byte in the message is where the first incomplete frame begins."""
    start = recording(frame(RECORD, b"good"))
    _, error = read_bytes(path, start + frame(RECORD, b"lost")[:-1])
    assert str(error) == (
        f"recording {path} is cut off after 1 records (byte {len(start)}): it has no end mark"
    )


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        pytest.param(frame(9, b""), "unknown frame type 9", id="type"),
        pytest.param(struct.pack("<BI", 2, 1 << 31), "a frame claims 2147483648 bytes", id="huge"),
        pytest.param(frame(SYMBOL, b"\xff"), "a frame is not JSON", id="not-utf8"),
        pytest.param(frame(SYMBOL, b"{"), "a frame is not JSON", id="not-json"),
        pytest.param(frame(LOST, b"[" * 200_000), "a frame is not JSON", id="deep"),
        pytest.param(frame(SYMBOL, b"9" * 5000), "a frame is not JSON", id="long-number"),
        pytest.param(
            frame(SYMBOL, ["1", "x"]), "a function name is malformed", id="symbol-address"
        ),
        pytest.param(frame(SYMBOL, [1, 2]), "a function name is malformed", id="symbol-name"),
        pytest.param(frame(SYMBOL, {}), "a function name is malformed", id="symbol-shape"),
        pytest.param(frame(LOST, []), "its losses are malformed", id="losses-shape"),
        pytest.param(frame(LOST, {"a": "b"}), "its losses are malformed", id="losses-value"),
    ],
)
def test_damaged_frame(path, damage, what):
    """A frame that cannot be is named with its place, after the records before it."""
    start = recording(frame(RECORD, b"good"))
    records, error = read_bytes(path, start + damage)
    assert records == [b"good"]
    assert str(error) == (
        f"recording {path} is damaged after 1 records (byte {len(start)}): {what}"
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"wire_version": 99}, "wire version 99, expected 1"),
        ({"byte_order": samples.OTHER_ORDER}, f"recorded on a {samples.OTHER_ORDER}-endian"),
        ({"nodes": []}, "its header is malformed"),
        ({"nodes": {"x": "node"}}, "its header is malformed"),
        ({"drop_reasons": None}, "its header is malformed"),
        ({"clock_offset_ns": "soon"}, "its header is malformed"),
        ({"clock_offset_ns": None}, "its header is malformed"),
        ({"clock_offset_ns": float("inf")}, "its header is malformed"),
        # Times beyond the year 9999 could not be shown.
        ({"clock_offset_ns": 10**21}, "its header is malformed"),
        ({"clock_offset_ns": -(10**21)}, "its header is malformed"),
        ({"not_seen": 5}, "its header is malformed"),
        ({"places": []}, "its header is malformed"),
        ({"places": {"x": PLACE}}, "its header is malformed"),
        ({"places": {"1": {}}}, "its header is malformed"),
        ({"places": {"1": PLACE | {"addresses": ["node2"]}}}, "its header is malformed"),
        ({"places": {"1": PLACE | {"interfaces": []}}}, "its header is malformed"),
        ({"places": {"1": PLACE | {"proxy_mode": "userspace"}}}, "its header is malformed"),
        ({"places": {"1": PLACE | {"masquerade_mark": None}}}, "its header is malformed"),
        (
            {"places": {"1": PLACE | {"cluster_cidrs": ["10.244.0.1/16"]}}},
            "its header is malformed",
        ),
    ],
)
def test_wrong_header(path, change, what):
    """A header of another machine, version or shape is refused with the reason."""
    records, error = read_bytes(path, recording(header=HEADER | change))
    assert records == []
    assert what in str(error)


@pytest.mark.parametrize("missing", HEADER)
def test_incomplete_header(path, missing):
    """A header that lacks a key is refused, and the key is named."""
    header = {key: value for key, value in HEADER.items() if key != missing}
    _, error = read_bytes(path, recording(header=header))
    assert missing in str(error)


@pytest.mark.parametrize("header", [[], 5, None, "x"], ids=repr)
def test_header_is_no_object(path, header):
    """A header that is JSON but no object is refused."""
    _, error = read_bytes(path, MAGIC + frame(INFO, json.dumps(header).encode()))
    assert "its header is malformed" in str(error)


def test_first_frame_is_no_header(path):
    """A file that begins with another frame is refused."""
    _, error = read_bytes(path, MAGIC + frame(RECORD, b"x"))
    assert "it begins with frame type 2" in str(error)


@pytest.mark.parametrize("data", [b"", b"\0", b"#!/bin/sh\n", MAGIC[:-1], b"SRCIPREC\x02\n"])
def test_no_recording(path, data):
    """Another file, an empty one, or a recording of another format is named as what it is not."""
    _, error = read_bytes(path, data)
    assert str(error) == f"{path} is not a srcip recording"


def test_no_such_file(path):
    """A missing file is an error with its name."""
    with pytest.raises(RecordingError, match=r"cannot read recording .*: No such file"):
        RecordingSource(path)


def test_directory(tmp_path):
    """A directory is neither read nor written."""
    with pytest.raises(RecordingError, match="Is a directory"):
        RecordingSource(tmp_path)
    with pytest.raises(RecordingError, match=r"cannot write recording .*: Is a directory"):
        Recorder(tmp_path, FakeSource([], samples.INFO))


def test_unwritable(tmp_path):
    """A file in a directory that is not there cannot be written."""
    with pytest.raises(RecordingError, match=r"cannot write recording .*: No such file"):
        Recorder(tmp_path / "no" / "where", FakeSource([], samples.INFO))


def test_full_disk_at_the_start(tmp_path):
    """A disk that is full is an error with the file's name."""
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(RecordingError, match=f"cannot write {full}: No space left"):
        Recorder(full, FakeSource([], samples.INFO))


def test_full_disk_later(path):
    """After a disk has filled up, closing does not fail again over what could not be written."""
    recorder = Recorder(path, FakeSource([], samples.INFO))
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        os.dup2(full.fileno(), recorder._stream.fileno())
    with pytest.raises(RecordingError, match=f"cannot write {path}: No space left"):
        recorder.write(RECORDS)
    recorder.close()


def test_pipe(path, whole):
    """A recording may come through a pipe, such as an unpacked one on standard input."""
    pipe = path.with_name("pipe")
    os.mkfifo(pipe)
    for data, is_whole in ((whole, True), (whole[:-1], False)):
        writer = threading.Thread(target=pipe.write_bytes, args=[data])
        writer.start()
        records, error = read_all(RecordingSource(pipe))
        writer.join()
        assert (records, error is None) == (RECORDS, is_whole)


def test_error_stays(path):
    """Reading on after an error gives the same error, never records from beyond it."""
    path.write_bytes(recording(frame(RECORD, b"good"), frame(9, b""), frame(RECORD, b"beyond")))
    source = RecordingSource(path)
    assert source.read(0) == [b"good"]
    for _ in range(2):
        with pytest.raises(RecordingError, match="unknown frame type 9"):
            source.read(0)
    source.close()


@given(st.binary(max_size=300))
@example(b"\2\0\0\0\0" * 3000)
@same_path
def test_any_bytes_after_the_header(path, data):
    """Whatever follows a header is records and then an end or one error."""
    records, error = read_bytes(path, recording() + data)
    assert error is None or "\n" not in str(error)
    assert all(isinstance(each, bytes) for each in records)


@given(st.binary(max_size=300))
@same_path
def test_any_bytes(path, data):
    """Any file either is a recording or is refused."""
    read_bytes(path, data)
    read_bytes(path, MAGIC + data)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    st.sampled_from(sorted(HEADER)),
)
@same_path
def test_any_header(path, value, key):
    """Any JSON in any place of the header is read or refused."""
    read_bytes(path, recording(frame(END, b""), header=HEADER | {key: value}))
    read_bytes(path, recording(frame(SYMBOL, value), frame(LOST, value)))


@given(st.lists(st.tuples(st.integers(0), st.integers(0, 7)), min_size=1, max_size=8))
@settings(same_path, max_examples=300)
def test_flipped_bits(path, whole, flips):
    """Damage anywhere gives records, undecodable ones among them, or one error, never a crash."""
    data = bytearray(whole)
    for at, bit in flips:
        data[at % len(data)] ^= 1 << bit
    records, _ = read_bytes(path, bytes(data))
    for each in records:
        try:
            decode(each)
        except DecodeError:
            continue


def test_names_of_any_language(path):
    """Node names that are not ASCII come back as they were."""
    info = replace(samples.INFO, nodes={samples.NETNS: "knoten-ä-節點"})
    Recorder(path, FakeSource([], info)).close()
    source = RecordingSource(path)
    source.close()
    assert source.info.nodes == info.nodes


def test_what_turned_out_not_to_be_seen(path):
    """What could not be seen from some time on is in the recording, too."""
    source = FakeSource([], samples.INFO)
    recorder = Recorder(path, source)
    source.info = replace(samples.INFO, not_seen=("tc of n2",))
    recorder.close()
    replayed = RecordingSource(path)
    assert replayed.info.not_seen == samples.INFO.not_seen
    assert read_all(replayed) == ([], None)
    assert replayed.info.not_seen == ("tc of n2",)


@pytest.mark.parametrize("payload", [b"{}", b"1", b"nonsense"])
def test_damaged_not_seen(path, payload):
    """A frame of what was not seen that makes no sense is damage."""
    _, error = read_bytes(path, recording(frame(7, payload), frame(END, b"")))
    assert "is damaged after 0 records" in str(error)
