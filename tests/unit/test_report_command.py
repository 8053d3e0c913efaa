"""srcip report: recordings in, one page out."""

import pytest

from tests.unit import samples
from tests.unit.fake_source import FakeSource
from tracer.recording import Recorder


@pytest.fixture
def recorded(tmp_path):
    """Write a recording of one connection and one drop."""

    def make(name, *records, lost=None):
        file = tmp_path / name
        source = FakeSource([], samples.INFO, lost=lost)
        recorder = Recorder(file, source)
        recorder.write(records or DEFAULT)
        recorder.close()
        return file

    return make


DEFAULT = [
    samples.connection_bytes(samples.connection(mark=0x4000)),
    samples.drop_bytes(
        samples.drop(packet=samples.flow("192.0.2.9", 9, "10.0.0.1", 80), orig=None)
    ),
]
OTHER = [samples.connection_bytes(samples.connection(*samples.REPLACED6))]


def test_page(srcip, recorded, tmp_path):
    """The page has a row for the connection and one for the drop; the summary is printed."""
    output = tmp_path / "report.html"
    code, out, err = srcip("report", recorded("a.srcip"), "-o", output)
    assert (code, out) == (0, "")
    assert err.splitlines() == [
        "1 connection, 1 drop; lost: nothing",
        "not seen: what the test leaves out",
    ]
    page = output.read_text()
    assert page.count("<tr data-verdict") == 2
    for text in ("198.51.100.10:46356", "192.0.2.9:9", "a.srcip", "what the test leaves out"):
        assert text in page


def test_filter(srcip, recorded, tmp_path):
    """Filters leave out what is not wanted."""
    output = tmp_path / "report.html"
    srcip("report", recorded("a.srcip"), "-o", output, "--filter-verdict", "dropped")
    assert output.read_text().count("<tr data-verdict") == 1


def test_losses(srcip, recorded, tmp_path):
    """What several tracers lost is added up."""
    output = tmp_path / "report.html"
    files = [recorded(name, lost={"ring_full": 3}) for name in ("a.srcip", "b.srcip")]
    code, _, err = srcip("report", *files, "-o", output)
    assert code == 0
    assert "lost: 6 ring_full" in err
    assert "<li>6 ring_full</li>" in output.read_text()


def test_damaged(srcip, recorded, tmp_path):
    """For a damaged recording the page shows what is good and notes it, and the exit code is 1."""
    output = tmp_path / "report.html"
    damaged = recorded("a.srcip")
    damaged.write_bytes(damaged.read_bytes()[:-5])
    code, _, err = srcip("report", damaged, recorded("b.srcip", *OTHER), "-o", output)
    assert code == 1
    assert "is cut off after 2 records" in err
    page = output.read_text()
    assert page.count("<tr data-verdict") == 3
    assert "is cut off after 2 records" in page


def test_one_connection_in_two_recordings(srcip, recorded, tmp_path):
    """What two tracers of a node recorded is one connection, and a note says so."""
    output = tmp_path / "report.html"
    srcip("report", recorded("a.srcip"), recorded("b.srcip"), "-o", output)
    page = output.read_text()
    assert page.count("<tr data-verdict") == 2
    assert "connections were in two recordings of one node" in page


def test_no_recording(srcip, recorded, tmp_path):
    """A file that is not a recording is reported, and no page is written."""
    other = tmp_path / "x"
    other.write_text("hello")
    output = tmp_path / "report.html"
    code, _, err = srcip("report", recorded("a.srcip"), other, "-o", output)
    assert code == 1
    assert "is not a srcip recording" in err
    assert not output.exists()


def test_recordings_are_safe(srcip, recorded):
    """A recording is not overwritten by its own page."""
    file = recorded("a.srcip")
    before = file.read_bytes()
    code, _, err = srcip("report", file, "-o", file)
    assert code == 2
    assert "is one of the recordings" in err
    assert file.read_bytes() == before


def test_page_that_cannot_be_written(srcip, recorded):
    """A page that cannot be written is one clear line."""
    code, _, err = srcip("report", recorded("a.srcip"), "-o", "/nowhere/report.html")
    assert code == 1
    assert err.splitlines()[-1] == (
        "srcip: cannot write /nowhere/report.html: No such file or directory"
    )
