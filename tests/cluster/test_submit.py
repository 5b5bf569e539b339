"""Submitting a job to a cluster whose job agent is not up yet, with a fake instead of Ray's client."""

import sys

import pytest

from cluster import on_ray
from cluster.errors import StorageError
from cluster.on_ray import LocalCluster, join_or_start, submit_job

NO_AGENT = "Request failed with status code 500: No available agent to submit job, please try again later."
DUPLICATE = "Request failed with status code 400: Job with submission_id x already exists."


class FakeClient:
    """Refuses with each of `refusals` in turn, then accepts."""

    refusals: list[str] = []  # noqa: RUF012 (each test sets its own)
    ids: list[str] = []  # noqa: RUF012

    def __init__(self, address: str):
        self.address = address

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict) -> str:
        self.ids.append(submission_id)
        if self.refusals:
            raise RuntimeError(self.refusals.pop(0))
        return submission_id


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    FakeClient.refusals, FakeClient.ids = [], []
    monkeypatch.setattr(on_ray, "JobSubmissionClient", FakeClient)
    monkeypatch.setattr(on_ray, "_RETRY_S", 0.01)
    return FakeClient


def test_submitting_waits_for_the_job_agent(client: type[FakeClient]):
    client.refusals = [NO_AGENT, NO_AGENT]
    job = submit_job("http://head:8265", "true")
    assert len(client.ids) == 3
    assert set(client.ids) == {job.job_id}, "every attempt has the same id, so the job cannot run twice"


def test_a_retry_that_is_a_duplicate_was_accepted_before(client: type[FakeClient]):
    client.refusals = [NO_AGENT, DUPLICATE]
    assert submit_job("http://head:8265", "true").job_id == client.ids[0]


def test_an_agent_that_never_comes_up_is_named_in_the_error(client: type[FakeClient]):
    client.refusals = [NO_AGENT] * 1000
    with pytest.raises(StorageError, match=r"job agent did not accept the job within 0 s: .*No available agent"):
        submit_job("http://head:8265", "true", timeout_s=0.05)
    assert 1 < len(client.ids) < 1000


@pytest.mark.parametrize("refusal", ["Request failed with status code 400: bad runtime_env", DUPLICATE])
def test_other_refusals_are_raised_at_once(client: type[FakeClient], refusal: str):
    client.refusals = [refusal]
    with pytest.raises(RuntimeError, match="status code 400"):
        submit_job("http://head:8265", "true")
    assert len(client.ids) == 1


def head_that(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Make LocalCluster start this Python code instead of a Ray head."""
    monkeypatch.setattr(on_ray, "_head_command", lambda *settings: [sys.executable, "-c", code])


def test_the_error_for_a_head_that_never_answers_names_what_was_awaited(monkeypatch: pytest.MonkeyPatch):
    head_that(monkeypatch, "import time; print('starting', flush=True); time.sleep(60)")
    with pytest.raises(StorageError, match=r"(?s)job API at http://127.0.0.1:\d+/api/jobs/ did not answer .*starting"):
        LocalCluster(timeout_s=2.0)


def test_a_head_that_ends_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch):
    head_that(monkeypatch, "print('no room'); raise SystemExit(3)")
    with pytest.raises(StorageError, match=r"(?s)ended with code 3.*no room"):
        LocalCluster()


def test_a_cluster_is_started_only_if_none_runs(monkeypatch: pytest.MonkeyPatch):
    started: list[str] = []

    class FakeCluster:
        address = "127.0.0.1:1"

        def __enter__(self) -> "FakeCluster":
            started.append("enter")
            return self

        def __exit__(self, *error: object) -> None:
            started.append("exit")

    def connect(address: str = "auto") -> None:
        if address == "auto":
            raise ConnectionError("none is running")

    monkeypatch.setattr(on_ray, "LocalCluster", FakeCluster)
    monkeypatch.setattr(on_ray, "connect", connect)
    with pytest.raises(StorageError, match="No Ray cluster is running"), join_or_start(may_start=False):
        pass
    assert started == []
    with join_or_start(may_start=True) as cluster:
        assert isinstance(cluster, FakeCluster)
    assert started == ["enter", "exit"]
    monkeypatch.setattr(on_ray, "connect", lambda: None)
    with join_or_start(may_start=True) as cluster:
        assert cluster is None
    with pytest.raises(ZeroDivisionError), join_or_start(may_start=True):
        _ = 1 / 0
    assert started == ["enter", "exit"]
