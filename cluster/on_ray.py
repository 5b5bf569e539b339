"""Ray for all packages: start a local cluster and clean up after it, connect to a cluster, submit jobs over HTTP."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.errors import ReloraError, StorageError
from cluster.processes import end_all, marked_processes

# Every process of a local cluster inherits this variable; its value is the cluster's folder. Process groups would not
# find all of them, because Ray puts job drivers and workers into groups of their own.
_MARK = "RELORA_CLUSTER"
# More than most machines have, because engines, workers and trials wait for each other most of the time.
LOCAL_CPUS = 16
# A head starts in about 10 s on an idle machine; on a busy one the dashboard and the job agent take minutes.
START_TIMEOUT_S = 300.0
_RETRY_S = 0.5
_NO_AGENT = "No available agent"  # how the dashboard says that the head's job agent has not registered yet
_IS_DUPLICATE = "already exists"  # how the job agent says that it has accepted a job of this id before
_HOST = "127.0.0.1"
_DEFAULTS = {
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",  # do not start an idle Python process for each of `num_cpus`
    "RAY_worker_niceness": "0",  # with Ray's default of 15, other programs on the machine would starve the service
}


class JobFailedError(ReloraError):
    """A submitted job failed or was stopped; the message ends with the last lines of its log."""


class LocalCluster:
    """A Ray head on this machine with dashboard and job API on 127.0.0.1; `stop` leaves no process behind.

    Several clusters can run side by side: each picks free ports and has its own session folder. The folder lies
    directly under /tmp because Ray's Unix sockets allow paths of about 100 characters. We never call `ray stop`, which
    kills every Ray process on the machine.

    Ray hands out `num_cpus` CPUs; more than the machine has is fine for actors that mostly wait. Raises StorageError
    if the dashboard does not answer within `timeout_s`.
    """

    def __init__(
        self,
        num_cpus: float = LOCAL_CPUS,
        *,
        object_store_bytes: int = 256 * 2**20,
        env: Mapping[str, str] | None = None,
        timeout_s: float = START_TIMEOUT_S,
    ):
        _settle_auth_mode()
        self.folder = Path(tempfile.mkdtemp(prefix="relora-", dir="/tmp"))
        ports = _free_ports(4)
        self.address = f"{_HOST}:{ports[0]}"
        self.dashboard_url = f"http://{_HOST}:{ports[1]}"
        command = _head_command(self.folder, ports, num_cpus, object_store_bytes)
        self._log = self.folder / "head.log"
        with self._log.open("wb") as log:
            self._head = subprocess.Popen(
                command,
                env={**_DEFAULTS, **os.environ, **(env or {}), _MARK: str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready(timeout_s)
        except BaseException:
            self.stop()
            raise

    def processes(self) -> list[psutil.Process]:
        """Return every living process of this cluster, including jobs and workers."""
        return marked_processes(_MARK, str(self.folder))

    def stop(self, grace_s: float = 3.0) -> None:
        """Disconnect this process and end all processes of the cluster; kill those still alive after `grace_s`."""
        if ray.is_initialized() and _port(ray.get_runtime_context().gcs_address) == _port(self.address):
            ray.shutdown()
        end_all(self.processes, grace_s)
        self._head.wait()
        assert not self.processes(), "a killed process is gone"
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> "LocalCluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self, timeout_s: float) -> None:
        jobs_url = f"{self.dashboard_url}/api/jobs/"
        deadline = time.monotonic() + timeout_s
        while not _answers(jobs_url):
            if self._head.poll() is not None:
                raise StorageError(f"The local Ray head ended with code {self._head.poll()}:\n{self._last_lines()}")
            if time.monotonic() > deadline:
                raise StorageError(
                    f"The local Ray cluster did not start: its job API at {jobs_url} did not answer within "
                    f"{timeout_s:.0f} s. The head's last log lines:\n{self._last_lines()}"
                )
            time.sleep(0.2)

    def _last_lines(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])


def _head_command(folder: Path, ports: list[int], num_cpus: float, object_store_bytes: int) -> list[str]:
    gcs_port, dashboard_port, client_port, agent_port = ports
    options = {
        "temp-dir": folder,
        "port": gcs_port,
        "ray-client-server-port": client_port,
        "include-dashboard": "true",
        "dashboard-host": _HOST,
        "dashboard-port": dashboard_port,
        "dashboard-agent-listen-port": agent_port,
        "object-store-memory": object_store_bytes,
        "num-cpus": f"{num_cpus:g}",
    }
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    return start + [f"--{name}={value}" for name, value in options.items()]


def _settle_auth_mode() -> None:
    """Set the auth mode of this process and its children; a cluster with tokens sets RAY_AUTH_MODE=token itself."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind((_HOST, 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _port(address: str) -> str:
    return address.rsplit(":", 1)[-1]  # compare ports only: Ray replaces 127.0.0.1 by the machine's address


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def connect(address: str = "auto", *, namespace: str = "relora") -> None:
    """Connect this process to a cluster as a driver, unless it is connected already.

    "auto" is the cluster that runs this process as a job, or else the one on this machine. Raises ConnectionError if
    there is none.
    """
    _settle_auth_mode()
    ray.init(address, namespace=namespace, ignore_reinit_error=True, log_to_driver=False, logging_level="WARNING")


def join() -> None:
    """Connect to the cluster that runs this process as a job, or to the one on this machine.

    Raises StorageError, with what to do about it, if there is none.
    """
    try:
        connect()
    except ConnectionError as error:
        raise StorageError(
            "No Ray cluster is running: submit this command as a job (`ray job submit --address URL -- relora ...`), "
            "or start a cluster here with `relora serve`, without --detach."
        ) from error


def describe() -> str:
    """Join the running cluster and say what it has. Raises StorageError if there is none."""
    join()
    total, free = ray.cluster_resources(), ray.available_resources()
    kinds = [f"{free.get(kind, 0.0):g} of {total[kind]:g} {kind}s free" for kind in ("CPU", "GPU") if kind in total]
    return f"{len(ray.nodes())} nodes, {', '.join(kinds)}"


@contextmanager
def join_or_start(*, may_start: bool) -> Iterator[LocalCluster | None]:
    """Join the running cluster, or start one that lives as long as the block; yields the cluster if it was started.

    Raises StorageError if no cluster is running and `may_start` is False.
    """
    try:
        join()
    except StorageError:
        if not may_start:
            raise
    else:
        yield None
        return
    with LocalCluster() as cluster:
        connect(cluster.address)
        yield cluster


@dataclass(frozen=True)
class JobHandle:
    """A job that a cluster has accepted."""

    client: JobSubmissionClient
    job_id: str

    def status(self) -> JobStatus:
        """Return PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        return self.client.get_job_status(self.job_id)

    def logs(self) -> str:
        """Return what the job has printed so far."""
        return str(self.client.get_job_logs(self.job_id))

    def tail(self, poll_s: float = 0.5) -> Iterator[str]:
        """Yield the log line by line as it grows, until the job has ended in any status."""
        num_seen = 0
        is_over = False
        while not is_over:
            is_over = self.status().is_terminal()
            lines = self.logs().splitlines(keepends=True)
            whole = lines if is_over or not lines or lines[-1].endswith("\n") else lines[:-1]
            yield from (line.rstrip("\n") for line in whole[num_seen:])
            num_seen = len(whole)
            if not is_over:
                time.sleep(poll_s)

    def wait(self, timeout_s: float, poll_s: float = 0.5) -> None:
        """Wait until the job has succeeded.

        Raises JobFailedError if it failed, was stopped, or is still running after `timeout_s` (it is not stopped then).
        """
        deadline = time.monotonic() + timeout_s
        while not (status := self.status()).is_terminal():
            if time.monotonic() > deadline:
                raise JobFailedError(f"Job {self.job_id} is still {status} after {timeout_s:.0f} s:\n{self._end()}")
            time.sleep(poll_s)
        if status != JobStatus.SUCCEEDED:
            message = self.client.get_job_info(self.job_id).message
            raise JobFailedError(f"Job {self.job_id} ended {status}: {message}\n{self._end()}")

    def stop(self) -> None:
        """Ask the cluster to end the job; a job that has already ended stays as it is."""
        self.client.stop_job(self.job_id)

    def _end(self) -> str:
        return "\n".join(self.logs().splitlines()[-20:])


def submit_job(
    dashboard_url: str,
    entrypoint: str,
    *,
    env: Mapping[str, str] | None = None,
    working_dir: Path | None = None,
    timeout_s: float = START_TIMEOUT_S,
) -> JobHandle:
    """Submit a shell command to a cluster's job API, as `ray job submit --address URL -- ENTRYPOINT` does.

    `env` is set for the command and its children; `working_dir` is uploaded to the cluster and becomes the command's
    current folder. Right after a cluster has started, its job agent may not be up yet: the call then retries until
    `timeout_s` have passed. Raises StorageError if no dashboard answers, or if the agent never comes up.
    """
    runtime_env: dict[str, Any] = {"env_vars": dict(env or {})}
    if working_dir is not None:
        runtime_env["working_dir"] = str(working_dir)
    try:
        client = JobSubmissionClient(dashboard_url)
        return JobHandle(client, _submit_with_retry(client, entrypoint, runtime_env, timeout_s))
    except ConnectionError as error:
        raise StorageError(f"No Ray dashboard answers at {dashboard_url}: {error}") from error


def _submit_with_retry(
    client: JobSubmissionClient, entrypoint: str, runtime_env: dict[str, Any], timeout_s: float
) -> str:
    """Submit until the job agent accepts; every attempt has the same id, so that the job cannot run twice."""
    job_id = f"relora-{uuid.uuid4().hex}"
    deadline = time.monotonic() + timeout_s
    is_retry = False
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=runtime_env))
        except RuntimeError as error:  # the client raises this for every refusal of the dashboard
            if is_retry and _IS_DUPLICATE in str(error):
                return job_id
            if _NO_AGENT not in str(error):
                raise
            if time.monotonic() > deadline:
                raise StorageError(
                    f"The Ray cluster's job agent did not accept the job within {timeout_s:.0f} s: {error} "
                    "See dashboard_agent.log in the cluster's session folder."
                ) from error
        is_retry = True
        time.sleep(_RETRY_S)
