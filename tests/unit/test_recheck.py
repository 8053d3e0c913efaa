"""Tokens of running streams: who may no longer listen is told so, and nobody waits for it."""

import json
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing
from itertools import pairwise
from types import SimpleNamespace

import pytest

from tests.unit import samples
from tests.unit.apiserver import running
from tests.unit.patience import PATIENCE_S
from tests.unit.streaming import Streaming, to_the_end
from tests.unit.streaming import gate as usual_gate
from tracer.cluster.review import Reviewer
from tracer.pipeline import Wanted
from tracer.stream import recheck
from tracer.stream.client import AgentStream
from tracer.stream.errors import StreamError
from tracer.stream.protocol import request_line

REPLACED = samples.judged(*samples.REPLACED)
GONE = (401, "the API server does not accept this token")


class Gate:
    """Who may listen: `refusal` is the answer to all questions from the second on."""

    def __init__(self):
        self.refusal = None
        self.asked_s = []
        self.changed = threading.Condition()

    def __call__(self, authorization, path):
        first = usual_gate(authorization, path)
        with self.changed:
            self.asked_s.append(time.monotonic())
            self.changed.notify_all()
        refusal = self.refusal
        if isinstance(refusal, Exception):
            raise refusal
        return first or refusal

    def wait_for(self, count):
        """Wait for so many more questions."""
        with self.changed:
            count += len(self.asked_s)
            assert self.changed.wait_for(lambda: len(self.asked_s) >= count, PATIENCE_S)


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Intervals of a test's patience."""
    monkeypatch.setattr(recheck, "EVERY_S", 0.05)
    monkeypatch.setattr(recheck, "PAUSE_S", 0.01)
    monkeypatch.setattr(recheck, "LONG_PAUSE_S", 0.02)


@pytest.fixture
def streaming(tmp_path, gate):
    with closing(Streaming(tmp_path, gate=gate)) as streaming:
        yield streaming


def read_to_the_end(client):
    while (lines := client.read(0.05)) is not None:
        yield from client.judge(lines)


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        (
            GONE,
            r"does not accept this token \(401\); name a file with a valid token by --token-file$",
        ),
        ((403, "'viewer' may not get /stream"), r"may not get /stream \(403\); bind that"),
    ],
)
def test_a_token_that_does_not_do_any_more(streaming, gate, refusal, said):
    """What waits for the client still comes, then the reason and the end; others go on."""
    with closing(streaming.listen(streaming.path, Wanted())) as local:
        client = streaming.listen(streaming.agent(), Wanted())
        with closing(client):
            streaming.offer(REPLACED)
            gate.wait_for(2)
            assert streaming.server.clients == 2
            gate.refusal = refusal
            found = []
            with pytest.raises(StreamError, match=f"ends the stream: .*{said}"):
                found += read_to_the_end(client)
        streaming.wait(lambda: streaming.server.clients == 1)
        streaming.offer(REPLACED)
        local.hang_up()
        assert len(list(read_to_the_end(local))) == 2


def test_what_is_said_on_the_wire(streaming, gate):
    """An error is the last line, and has the status of a refusal at the door."""
    sock, rest = streaming.raw(behind=request_line(Wanted()))
    with closing(sock):
        gate.wait_for(1)
        gate.refusal = GONE
        lines = [json.loads(line) for line in to_the_end(sock, rest).splitlines()]
    assert [line["kind"] for line in lines] == ["hello", "error"]
    assert lines[-1] == {"kind": "error", "version": 1, "message": GONE[1], "status": 401}


def test_a_client_that_hangs_up_meanwhile(streaming, gate):
    """One that has all it wanted, and waits for the summary alone, is told the reason, too."""
    with closing(streaming.listen(streaming.agent(), Wanted())) as client:
        gate.refusal = GONE
        streaming.wait(lambda: streaming.server.clients == 0)
        client.hang_up()
        with pytest.raises(StreamError, match="ends the stream: the API server does not accept"):
            client.take_summary()


@pytest.mark.parametrize("refusal", [(503, "cannot be asked"), OSError("a bug")], ids=str)
def test_no_answer(streaming, gate, refusal, caplog):
    """The stream goes on, and the question is asked again, until there is an answer."""
    with closing(streaming.listen(streaming.agent(), Wanted())) as client:
        gate.refusal = refusal
        gate.wait_for(5)
        streaming.offer(REPLACED)
        gate.refusal = None
        gate.wait_for(2)
        client.hang_up()
        assert len(list(read_to_the_end(client))) == 1
    assert ("a token was not checked" in caplog.text) is isinstance(refusal, OSError)


def test_no_answer_for_long(streaming, gate):
    """After an hour nobody listens unseen; a single answer in between is enough to go on."""
    skew_s = 0
    streaming.server._recheck._clock_s = lambda: time.monotonic() + skew_s
    with closing(streaming.listen(streaming.agent(), Wanted())) as client:
        for _ in range(2):
            gate.refusal = (503, "cannot be asked")
            skew_s += 3500
            gate.wait_for(3)
            assert streaming.server.clients == 1
            gate.refusal = None
            gate.wait_for(2)
        gate.refusal = (503, "cannot be asked")
        skew_s += 3700
        with pytest.raises(StreamError, match=r"could not be asked about its token .*\(503\)$"):
            list(read_to_the_end(client))
    streaming.wait(lambda: streaming.server.clients == 0)


def test_questions_are_spread(streaming, gate, monkeypatch):
    """However many clients come at once, they are asked about one by one, each in its turn."""
    monkeypatch.setattr(recheck, "PAUSE_S", 0.03)
    with ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(streaming.listen(streaming.agent(), Wanted()))
        gate.wait_for(4)
        start = len(gate.asked_s)
        gate.wait_for(24)
        between = [later - before for before, later in pairwise(gate.asked_s[start:])]
    assert min(between) >= 0.03


def test_who_has_gone_is_not_asked_about(streaming, gate):
    """After the last client there is nothing to ask, and nothing is kept of its token."""
    with closing(streaming.listen(streaming.agent(), Wanted())):
        gate.wait_for(2)
    streaming.wait(lambda: streaming.server._recheck._watched == {})
    assert streaming.server.clients == 0
    with closing(streaming.listen(streaming.path, Wanted())):
        # A question may have been on its way.
        before = len(gate.asked_s)
        streaming.offer(REPLACED)
        steps = streaming.steps
        streaming.wait(lambda: streaming.steps > steps + 10)
        assert len(gate.asked_s) <= before + 1


def test_a_question_that_hangs(streaming, gate):
    """It holds up nobody: not the client that it is about, not a new one, not the end."""
    has_begun, is_over = threading.Event(), threading.Event()

    def hang():
        has_begun.set()
        is_over.wait(PATIENCE_S)
        return GONE

    with closing(streaming.listen(streaming.agent(), Wanted())) as client:
        (watched,) = streaming.server._recheck._watched.values()
        watched.ask = hang
        assert has_begun.wait(PATIENCE_S)
        streaming.offer(REPLACED)
        with closing(streaming.listen(streaming.agent(), Wanted())) as other:
            streaming.offer(REPLACED)
            for each, expected in ((client, 2), (other, 1)):
                each.hang_up()
                assert len(list(read_to_the_end(each))) == expected
    streaming.wait(lambda: streaming.server.clients == 0)
    is_over.set()
    streaming.listen(streaming.agent(), Wanted()).close()


def test_no_thread(streaming, monkeypatch):
    """Without a thread that could ask nobody listens on the port; the next client tries again."""

    class Thread:
        def __init__(self, **_):
            pass

        def start(self):
            raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(recheck, "threading", SimpleNamespace(Thread=Thread))
        with (
            closing(AgentStream(streaming.agent(), Wanted())) as client,
            pytest.raises(StreamError, match="refuses: the agent has no thread"),
        ):
            client.wait(PATIENCE_S)
        streaming.listen(streaming.path, Wanted()).close()
    streaming.listen(streaming.agent(), Wanted()).close()


def test_the_real_thing(tmp_path):
    """
    An API server forgets a token, or takes the role away: a nobody's `srcip trace` says so.

    Where the API server is away for a while, the stream goes on.
    """
    with running() as api:
        api.users = {"good": {"username": "viewer"}}
        api.allowed = {("viewer", "get", "/stream")}
        reviewer = Reviewer(
            kubeconfig=api.kubeconfig(tmp_path / "config"),
            # Answers grow old in less than a test's patience.
            clock_s=lambda: time.monotonic() * 1000,
        )
        with closing(reviewer), closing(Streaming(tmp_path, gate=reviewer.refusal)) as streaming:
            for right, why in (
                (api.users, "the API server does not accept this token (401)"),
                (api.allowed, "'viewer' may not get /stream (403)"),
            ):
                with listening(streaming, tmp_path) as client:
                    wait_for_questions(api, 2)
                    api.is_broken = True
                    wait_for_questions(api, 3)
                    assert client.poll() is None
                    right.clear()
                    api.is_broken = False
                    out, err = client.communicate(timeout=PATIENCE_S)
                assert client.returncode == 1
                assert (out, err.count("\n")) == ("", 1)
                assert f"ends the stream: {why}; " in err
                api.users["good"] = {"username": "viewer"}
                api.allowed.add(("viewer", "get", "/stream"))


def wait_for_questions(api, count):
    count += len(api.asked("create", "tokenreviews"))
    api.wait_for(lambda: len(api.asked("create", "tokenreviews")) >= count)


def listening(streaming, directory):
    """A client of the command line that has been greeted."""
    token = directory / "token"
    token.write_text("good\n")
    url = f"https://127.0.0.1:{streaming.pages.port}"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tracer.cli", "trace", "--agent", url, "-o", "json"),
            *("--token-file", str(token), "--ca-file", str(streaming.ca_file)),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = process.stderr.readline()
    assert "through its agent" in line, line + process.stderr.read()
    return process
