"""The local cluster, the connection and the job API, with real Ray processes."""

import os
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from cluster.errors import StorageError
from cluster.on_ray import JobFailedError, LocalCluster, connect, submit_job

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(num_cpus=2) as running:
        yield running


def test_a_job_runs_and_returns_its_log(cluster: LocalCluster, tmp_path: Path):
    (tmp_path / "hello.py").write_text("import os\nprint('one', flush=True)\nprint('two', os.environ['WORD'])\n")
    job = submit_job(cluster.dashboard_url, f"{sys.executable} hello.py", env={"WORD": "ready"}, working_dir=tmp_path)
    lines = list(job.tail(poll_s=0.1))
    job.wait(timeout_s=30)
    assert [line for line in lines if line in ("one", "two ready")] == ["one", "two ready"]


def test_a_failed_job_says_why(cluster: LocalCluster):
    job = submit_job(cluster.dashboard_url, "echo before; echo the reason >&2; exit 3")
    with pytest.raises(JobFailedError, match=r"(?s)FAILED.*the reason"):
        job.wait(timeout_s=30)


def test_a_job_that_takes_too_long_is_reported_and_can_be_stopped(cluster: LocalCluster):
    job = submit_job(cluster.dashboard_url, "sleep 1000")
    with pytest.raises(JobFailedError, match="still"):
        job.wait(timeout_s=0.5)
    job.stop()
    with pytest.raises(JobFailedError, match="STOPPED"):
        job.wait(timeout_s=30)


def test_a_job_can_be_submitted_as_soon_as_the_cluster_has_started():
    """On a busy machine the job agent comes up after the dashboard; `submit_job` waits for it."""
    with LocalCluster(num_cpus=1) as fresh:
        job = submit_job(fresh.dashboard_url, "echo accepted")
        job.wait(timeout_s=60)
        assert "accepted" in job.logs()


def test_a_wrong_address_is_a_storage_error():
    with pytest.raises(StorageError, match="No Ray dashboard"):
        submit_job("http://127.0.0.1:9", "true")


def test_two_clusters_run_side_by_side_and_stop_leaves_no_process(cluster: LocalCluster):
    with LocalCluster(num_cpus=1) as second:
        connect(second.address)
        assert ray.cluster_resources()["CPU"] == 1
        niceness = ray.get(ray.remote(lambda: os.nice(0)).remote())
        assert niceness == os.nice(0), "with 15 more, Ray's default, the service would starve"
        job = submit_job(second.dashboard_url, "sleep 987654")  # a driver that never joins Ray also has to end
        deadline = time.monotonic() + 30
        while not _sleepers() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert _sleepers(), job.logs()
        pids = {process.pid for process in second.processes()}
        agents = {p.pid for p in psutil.process_iter(["cmdline"]) if _is_agent(p)}
        assert len(pids) > 5
        assert agents & pids, "agents have overwritten their environment, but are found"
    assert not ray.is_initialized()
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    assert not _sleepers()
    assert not second.folder.exists()
    assert cluster.processes(), "the other cluster still runs"


def _is_agent(process: psutil.Process) -> bool:
    return "DashboardAgent" in " ".join(process.info["cmdline"] or [])


def _sleepers() -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "987654"]]
