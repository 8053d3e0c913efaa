"""Bearer tokens, checked by an API server over HTTPS."""

import threading

import pytest

from tests.unit.apiserver import running
from tracer.cluster import review
from tracer.cluster.errors import ClusterError
from tracer.cluster.review import ALLOWED_S, REFUSED_S, Reviewer

SCRAPER = {
    "username": "system:serviceaccount:monitoring:prometheus",
    "uid": "1",
    "groups": ["system:authenticated"],
    "extra": {"authentication.kubernetes.io/pod-name": ["prometheus-0"]},
}


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def api():
    with running() as server:
        server.users = {"good": SCRAPER, "other": {"username": "somebody"}}
        server.allowed = {(SCRAPER["username"], "get", "/metrics")}
        yield server


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def reviewer(api, clock, tmp_path):
    reviewer = Reviewer(kubeconfig=api.kubeconfig(tmp_path / "config"), clock_s=clock)
    yield reviewer
    reviewer.close()


def test_allowed(api, reviewer):
    """A known token that may get /metrics is admitted; the review asks about all of its user."""
    assert reviewer.refusal("Bearer good", "/metrics") is None
    assert api.asked("create", "tokenreviews") == [{"token": "good"}]
    (spec,) = api.asked("create", "subjectaccessreviews")
    assert spec == {
        "user": SCRAPER["username"],
        "uid": "1",
        "groups": SCRAPER["groups"],
        "extra": SCRAPER["extra"],
        "nonResourceAttributes": {"path": "/metrics", "verb": "get"},
    }


@pytest.mark.parametrize(
    ("header", "status", "reason"),
    [
        ("", 401, "a bearer token is required"),
        ("Basic good", 401, "a bearer token is required"),
        ("Bearer", 401, "a bearer token is required"),
        ("Bearer bad", 401, "the API server does not accept this token"),
        (f"Bearer {'x' * 20000}", 401, "the API server does not accept this token"),
        ("Bearer go\x00od", 401, "the API server does not accept this token"),
        ("Bearer other", 403, "'somebody' may not get /metrics"),
    ],
)
def test_refused(reviewer, header, status, reason):
    """No token or an unknown one is 401, a user without permission is 403."""
    assert reviewer.refusal(header, "/metrics") == (status, reason)


def test_a_right_to_one_path_is_none_to_another(api, reviewer):
    """Permission to scrape is none to listen, nor the reverse; each answer is cached separately."""
    name = SCRAPER["username"]
    for _ in range(2):
        assert reviewer.refusal("Bearer good", "/metrics") is None
        assert reviewer.refusal("Bearer good", "/stream") == (403, f"'{name}' may not get /stream")
    asked = api.asked("create", "subjectaccessreviews")
    assert [spec["nonResourceAttributes"]["path"] for spec in asked] == ["/metrics", "/stream"]


def test_the_scheme_is_case_insensitive(reviewer):
    """RFC 9110: so are all schemes."""
    assert reviewer.refusal("bearer  good ", "/metrics") is None


def test_answers_are_kept_for_a_while(api, reviewer, clock):
    """A scraper costs two requests a minute, and a revoked token is admitted no longer."""
    for _ in range(3):
        assert reviewer.refusal("Bearer good", "/metrics") is None
    assert len(api.asked("create", "tokenreviews")) == 1
    api.users.clear()
    clock.now_s += ALLOWED_S - 1
    assert reviewer.refusal("Bearer good", "/metrics") is None
    clock.now_s += 2
    assert reviewer.refusal("Bearer good", "/metrics")[0] == 401
    api.users["good"] = SCRAPER
    clock.now_s += REFUSED_S - 1
    assert reviewer.refusal("Bearer good", "/metrics")[0] == 401
    clock.now_s += 2
    assert reviewer.refusal("Bearer good", "/metrics") is None


def test_a_flood_of_tokens(api, reviewer, clock):
    """A client that makes up tokens causes only a limited number of requests a second."""
    answers = [reviewer.refusal(f"Bearer made-up-{i}", "/metrics")[0] for i in range(100)]
    assert len(api.asked("create", "tokenreviews")) == answers.count(401) == 20
    assert answers.count(503) == 80
    clock.now_s += 1
    assert reviewer.refusal("Bearer good", "/metrics") is None


def test_a_flood_keeps_no_scraper_out(api, reviewer, clock, monkeypatch):
    """A client that was admitted before is reviewed again in spite of a flood of others."""
    monkeypatch.setattr(review, "_REMEMBERED", 5)
    assert reviewer.refusal("Bearer good", "/metrics") is None
    for i in range(100):
        reviewer.refusal(f"Bearer made-up-{i}", "/metrics")
        clock.now_s += 0.02
    clock.now_s += ALLOWED_S
    answers = [reviewer.refusal(f"Bearer more-{i}", "/metrics")[0] for i in range(30)]
    assert answers[-1] == 503
    assert reviewer.refusal("Bearer good", "/metrics") is None
    # Nor does a slow review of an unknown client.
    clock.now_s += ALLOWED_S + 1
    with reviewer._strangers.asking:
        assert reviewer.refusal("Bearer good", "/metrics") is None
    # Once refused, it counts as unknown until it is admitted again.
    api.users.clear()
    clock.now_s += ALLOWED_S + 1
    assert reviewer.refusal("Bearer good", "/metrics")[0] == 401
    assert len(reviewer._friends._known) == 0


def test_memory_is_bounded(api, reviewer, clock, monkeypatch):
    """However many tokens there are, only a limited number of each kind is remembered."""
    monkeypatch.setattr(review, "_REMEMBERED", 5)
    api.users |= {f"real-{i}": SCRAPER for i in range(10)}
    for i in range(10):
        reviewer.refusal(f"Bearer made-up-{i}", "/metrics")
        assert reviewer.refusal(f"Bearer real-{i}", "/metrics") is None
        clock.now_s += 1
    assert [len(each._known) for each in (reviewer._friends, reviewer._strangers)] == [5, 5]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda api: setattr(api, "is_broken", True), "the API server answered 500"),
        (lambda api: api.forbidden.add(("create", "tokenreviews")), 'resources: ["tokenreviews"]'),
        (
            lambda api: api.forbidden.add(("create", "subjectaccessreviews")),
            'apiGroups: ["authorization.k8s.io"]',
        ),
        (lambda api: setattr(api, "token", "new"), "rejects the credentials"),
    ],
    ids=["broken", "no reviews of tokens", "no reviews of access", "own token expired"],
)
def test_nobody_is_let_in_unseen(api, reviewer, break_it, said, caplog):
    """Without an answer it is 503, said once in the log with what to do, and asked again."""
    break_it(api)
    for _ in range(2):
        status, reason = reviewer.refusal("Bearer good", "/metrics")
        assert (status, reason) == (503, "cannot ask the API server about this token")
    assert len(caplog.messages) == 1
    assert said in caplog.messages[0]
    api.is_broken, api.token = False, "secret"
    api.forbidden.clear()
    assert reviewer.refusal("Bearer good", "/metrics") is None


def test_answers_that_are_none(api, reviewer, monkeypatch, caplog):
    """A server that answers something else opens nothing."""
    for answer in ({}, {"authenticated": "true", "user": SCRAPER}, {"authenticated": True}):
        monkeypatch.setattr(
            "tests.unit.apiserver._Handler._review", lambda *_, answer=answer: answer
        )
        assert reviewer.refusal(f"Bearer {answer}", "/metrics")[0] == 401
    monkeypatch.setattr("tests.unit.apiserver._Handler._review", lambda *_: None)
    assert reviewer.refusal("Bearer good", "/metrics")[0] == 503


def test_one_question_for_many(api, reviewer):
    """Scrapers that come at once with one token are answered by one question."""
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(reviewer.refusal("Bearer good", "/metrics")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [None] * 8
    assert len(api.asked("create", "tokenreviews")) == 1


def test_no_cluster_to_ask(tmp_path):
    """A kubeconfig that is not there is one line at the start."""
    with pytest.raises(ClusterError, match="cannot be read"):
        Reviewer(kubeconfig=tmp_path / "none")
