"""Ray for the whole system: a local cluster that cleans up after itself, a connection, jobs submitted over HTTP."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.errors import ReloraError, StorageError

# Every process of a local cluster inherits this variable; its value is the cluster's own folder. Process groups do not
# reach them all: Ray gives job drivers and workers groups of their own.
_MARK = "RELORA_CLUSTER"
# More than most machines have: engines, workers and trials wait for each other most of the time.
LOCAL_CPUS = 16
_HOST = "127.0.0.1"
_DEFAULTS = {
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",  # one idle Python process for each of `num_cpus`, which may be many
    "RAY_worker_niceness": "0",  # Ray's 15 lets whatever else runs here starve the service
}


class JobFailedError(ReloraError):
    """A submitted job failed or was stopped; the message ends with the last lines of its log."""


class LocalCluster:
    """A Ray head on this machine with the dashboard and the job API on 127.0.0.1; `stop` leaves no process behind.

    Several may run beside each other: all ports are free ones and the session folder is the cluster's own. It lies
    directly under /tmp because Ray's Unix sockets allow paths of about 100 characters. `ray stop` is never used, since
    it kills every Ray process on the machine.

    `num_cpus` is what Ray may hand out; more than the machine has is fine for actors that mostly wait.
    StorageError when the head does not come up within `timeout_s`.
    """

    def __init__(
        self,
        num_cpus: float = LOCAL_CPUS,
        *,
        object_store_bytes: int = 256 * 2**20,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
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
        """Every living process of this cluster, jobs and workers included.

        Children count besides the marked, because a process that has set its title has overwritten its environment.
        """
        marked = [p for p in psutil.process_iter() if _environment_of(p).get(_MARK) == str(self.folder)]
        return list({*marked, *(child for process in marked for child in _children_of(process))})

    def stop(self, grace_s: float = 3.0) -> None:
        """Disconnects this process and ends every process of the cluster: asked first, killed after `grace_s`."""
        if ray.is_initialized() and _port(ray.get_runtime_context().gcs_address) == _port(self.address):
            ray.shutdown()
        known = set(self.processes())  # the children of those that end first could not be told afterwards
        for sent in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):  # twice: what was just being born
            known.update(self.processes())
            _end([process for process in known if process.is_running()], sent, grace_s)
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
        deadline = time.monotonic() + timeout_s
        while not _answers(f"{self.dashboard_url}/api/jobs/"):
            if self._head.poll() is not None or time.monotonic() > deadline:
                last_lines = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
                raise StorageError(f"The local Ray cluster did not start within {timeout_s:.0f} s:\n{last_lines}")
            time.sleep(0.2)


def _head_command(folder: Path, ports: list[int], num_cpus: float, object_store_bytes: int) -> list[str]:
    gcs_port, dashboard_port, client_port, agent_port = ports
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *(f"--temp-dir={folder}", f"--port={gcs_port}", f"--ray-client-server-port={client_port}"),
        *("--include-dashboard=true", f"--dashboard-host={_HOST}", f"--dashboard-port={dashboard_port}"),
        *(
            f"--dashboard-agent-listen-port={agent_port}",
            f"--object-store-memory={object_store_bytes}",
            f"--num-cpus={num_cpus:g}",
        ),
    ]


def _settle_auth_mode() -> None:
    """One mode for this process and all that it starts; a cluster with tokens has RAY_AUTH_MODE=token everywhere."""
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
    return address.rsplit(":", 1)[-1]  # Ray puts the machine's own address in place of 127.0.0.1


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):  # gone meanwhile, or somebody else's
        return {}


def _children_of(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _end(processes: list[psutil.Process], sent: signal.Signals, grace_s: float) -> None:
    for process in processes:
        try:
            process.send_signal(sent)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=grace_s)


def connect(address: str = "auto", *, namespace: str = "relora") -> None:
    """Connects this process to a cluster as a driver; nothing happens if it is connected already.

    "auto" is the cluster that this process is a job of, or the one on this machine; ConnectionError if there is none.
    """
    _settle_auth_mode()
    ray.init(address, namespace=namespace, ignore_reinit_error=True, log_to_driver=False, logging_level="WARNING")


@dataclass(frozen=True)
class JobHandle:
    """A job that a cluster has accepted."""

    client: JobSubmissionClient
    job_id: str

    def status(self) -> JobStatus:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        return self.client.get_job_status(self.job_id)

    def logs(self) -> str:
        """Everything that the job has printed so far."""
        return str(self.client.get_job_logs(self.job_id))

    def tail(self, poll_s: float = 0.5) -> Iterator[str]:
        """Yields the log line by line as it grows; ends when the job has ended, however it did."""
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
        """Returns when the job has succeeded.

        JobFailedError when it failed, was stopped, or is not over after `timeout_s` (it then goes on running).
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
        """Asks the cluster to end the job; a job that is over already is left alone."""
        self.client.stop_job(self.job_id)

    def _end(self) -> str:
        return "\n".join(self.logs().splitlines()[-20:])


def submit_job(
    dashboard_url: str, entrypoint: str, *, env: Mapping[str, str] | None = None, working_dir: Path | None = None
) -> JobHandle:
    """Submits a shell command to a cluster's job API, as `ray job submit --address URL -- ENTRYPOINT` does.

    `env` is set for the command and all that it starts; `working_dir` is shipped to the cluster and becomes its
    current folder. StorageError when nothing answers at `dashboard_url`.
    """
    runtime_env: dict[str, Any] = {"env_vars": dict(env or {})}
    if working_dir is not None:
        runtime_env["working_dir"] = str(working_dir)
    try:
        client = JobSubmissionClient(dashboard_url)
        return JobHandle(client, client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env))
    except ConnectionError as error:
        raise StorageError(f"No Ray dashboard answers at {dashboard_url}: {error}") from error
